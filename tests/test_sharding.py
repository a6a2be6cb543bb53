"""Sharded training equals training on one device bit for bit, and moves only counts between devices."""

import functools
import json
import pathlib

import multiprocess_worker as worker
import pytest
from processes import finish, run_two, start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sharding")]  # the reports are made once

WORKER = pathlib.Path(worker.__file__)
COUNTS = 7 * 8 * 2 * 4 * 2  # bytes: most silos of a rule x thresholds in a pass x limbs, twice
PLACED = [("auto", rule) for rule in worker.RULES]
PLACED += [("explicit", rule) for rule in worker.EXPLICIT_RULES]
PLACED += [("uneven", rule) for rule in worker.UNEVEN_RULES]
PLACED += [(p, "strict") for p in ("replicated", "one_of_eight", "two")]
SHARDED = [(p, rule) for p, rule in PLACED if p in ("auto", "explicit", "replicated", "two")]


@functools.cache
def report(devices, kind):
    (found,) = finish(start(WORKER, devices, kind))
    assert found["devices"] == devices
    return found


def on_mesh(placement, rule):
    got = report(8, "mesh")["runs"][placement][rule]
    assert "error" not in got, got["error"]
    return got


def only_counts(traffic):
    """Whether no program sorts and nothing as large as the smallest parameter crosses devices."""
    crossing = [size for kind, size in traffic.items() if kind != "sort"]
    return traffic["sort"] == 0 and max(crossing) <= COUNTS


@pytest.mark.parametrize(("placement", "rule"), PLACED)
def test_many_devices_equal_one(placement, rule):
    got = on_mesh(placement, rule)["digests"]
    expected = report(1, "single")["runs"]["uneven" if placement == "uneven" else "even"][rule]["digests"]
    assert got == expected
    assert len({json.dumps(d) for d in got}) == worker.STEPS  # the model moves at every step


@pytest.mark.parametrize(("placement", "rule"), SHARDED)
def test_parameters_and_seed_keep_their_shardings(placement, rule):
    assert on_mesh(placement, rule)["kept"]


@pytest.mark.parametrize(("placement", "rule"), [c for c in SHARDED if c[0] != "replicated"])
def test_only_counts_cross_devices(placement, rule):
    found = on_mesh(placement, rule)["traffic"]
    assert len(found) > 1, "no collective found in a sharded program"
    assert only_counts(found), found


def test_nothing_crosses_devices_where_parameters_are_replicated():
    assert on_mesh("replicated", "strict")["traffic"] == {"sort": 0}


def test_the_naive_quantile_is_caught():
    assert not only_counts(report(8, "mesh")["naive"])
    assert not only_counts(report(8, "mesh")["naive"] | {"sort": 0})


def test_two_processes_equal_one():
    found = run_two(WORKER, 2, "process")
    expected = report(1, "single")["runs"]["even"]
    for got in found:
        assert (got["devices"], got["processes"]) == (4, 2)
        for rule, result in got["runs"].items():
            assert result["digests"] == expected[rule]["digests"], rule
            assert result["kept"], rule
            assert only_counts(result["traffic"]), rule
