"""Sharded models, on one process and on two, give the subsets of whole ones and take them."""

import pathlib

import pytest
from processes import finish, run_two, start

WORKER = pathlib.Path(__file__).with_name("sharded_worker.py")


def run(processes):
    return run_two(WORKER, 4) if processes == 2 else finish(start(WORKER, 8))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sharded_models(processes):
    for found in run(processes):
        assert (found["processes"], found["devices"]) == (processes, 8)
        failed = [
            (kind, name) for kind, checks in found["checks"].items() for name, ok in checks.items() if not ok
        ]
        assert not failed
        assert all(len(checks) > 10 for checks in found["checks"].values())
