"""What a TPU would run, compiled ahead of time: counts cross chips, nothing is sorted or gathered."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dst_optax.finetuning.tpu_plan import SILENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the extra 'tpu' (libtpu)"),
    pytest.mark.xdist_group("tpu"),  # the reports are made once
]

WORKER = pathlib.Path(__file__).with_name("tpu_worker.py")
TOPOLOGIES = ("v5e:2x4", "v5e:4x4")
TIES = ("strict", "fill")


@functools.cache
def report(topology):
    path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(WORKER), topology, "adamw", *TIES, "naive"],
        env={**os.environ, **SILENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def no_sort(found):
    return found["sorts"] == 0


def no_large_collective(found):
    return max(found["largest"].values(), default=0) <= 64 * 1024


def only_counts_in_a_pass(found):
    return 0 < found["pass_bytes"] <= 8 * found["silos"] * 4 * 2


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("holds", [no_sort, no_large_collective, only_counts_in_a_pass])
def test_step(topology, ties, holds):
    found = report(topology)[ties]
    assert holds(found), found


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("ties", TIES)
def test_temporary_memory_is_four_bytes_a_parameter(topology, ties):
    found = report(topology)
    extra = found[ties]["temp"] - found["adamw"]["temp"]
    assert extra <= 4 * found[ties]["local"], found


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_naive_quantile_is_caught(topology):
    found = report(topology)["naive"]
    assert not no_sort(found)
    assert not no_large_collective(found)
    assert found["temp"] > 4 * found["local"]
