"""Sharded training equals training on one device bit for bit, and moves only counts between devices."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import multiprocess_worker as worker
import pytest

pytestmark = pytest.mark.slow

WORKER = pathlib.Path(worker.__file__)
TIMEOUT = 600


def start(devices, *arguments):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(WORKER), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    try:
        results = [p.communicate(timeout=TIMEOUT) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, err) in zip(processes, results, strict=True):
        assert p.returncode == 0, err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in results]


@functools.cache
def report(devices, kind):
    (found,) = finish(start(devices, kind))
    assert found["devices"] == devices
    return found


@pytest.mark.parametrize("rule", worker.RULES)
@pytest.mark.parametrize("placement", ["auto", "explicit", "replicated", "one_of_eight", "uneven"])
def test_eight_devices_equal_one(placement, rule):
    got = report(8, "mesh")["runs"][rule][placement]
    expected = report(1, "single")["runs"][rule]["uneven" if placement == "uneven" else "even"]
    assert "error" not in got, got["error"]
    assert got["digests"] == expected["digests"]
    assert len({json.dumps(d) for d in got["digests"]}) == worker.STEPS  # the model moves at every step


def test_two_devices_equal_one():
    got = report(8, "mesh")["runs"]["strict"]["two"]
    assert got["digests"] == report(1, "single")["runs"]["strict"]["even"]["digests"]


@pytest.mark.parametrize("rule", worker.RULES)
@pytest.mark.parametrize("placement", ["auto", "explicit", "replicated"])
def test_parameters_and_seed_keep_their_shardings(placement, rule):
    got = report(8, "mesh")["runs"][rule][placement]
    assert "error" not in got, got["error"]
    assert got["kept"]
    assert got["compiled"] == 1


@pytest.mark.parametrize("rule", worker.RULES)
def test_only_counts_cross_devices(rule):
    found = report(8, "mesh")["hlo"][rule]
    assert found["sort"] == 0
    counts = 8 * 7 * 4 * 2  # silos x thresholds tried in a pass x a pair of int32 limbs, roughly
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert found.get(kind, 0) <= 1024, found
    assert found["all-reduce"] <= 4 * counts, found


def test_the_naive_quantile_would_be_caught():
    found = report(8, "mesh")["naive"]
    assert found["sort"] > 0
    assert max(found.get(k, 0) for k in ("all-gather", "all-reduce", "all-to-all")) >= 4 * 64 * 96 // 8


def test_two_processes_equal_one():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    found = finish(start(2, "process", port, "0"), start(2, "process", port, "1"))
    expected = report(1, "single")["runs"]
    for got in found:
        assert (got["devices"], got["processes"]) == (4, 2)
        for rule, result in got["runs"].items():
            assert result["digests"] == expected[rule]["even"]["digests"], rule
            assert result["kept"], rule
