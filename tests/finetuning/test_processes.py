"""The trainer in two processes on one mesh: the bits of one process, also over a stop and a resume."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest

pytest.importorskip("seqio")
ocp = pytest.importorskip("orbax.checkpoint")
for needed in ("clu", "rich", "tensorboard", "matplotlib"):
    pytest.importorskip(needed)

import processes  # noqa: E402

from dst_optax import subset  # noqa: E402

WORKER = pathlib.Path(__file__).with_name("trainer_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def run(directory, count, stop=0):
    port = processes.free_port()
    arguments = [(str(directory), str(stop), str(count), port, str(i)) for i in range(count)]
    return processes.finish(*(processes.start(WORKER, 4 // count, *a) for a in arguments))


def told(directory):
    """Everything measured, but for speed."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


def restored(path):
    """The arrays of the optimizer's state."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        like = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(path).item_metadata.tree
        )
        return checkpointer.restore(path, restore_args=like)


def bits_of(directory):
    """Everything in a subset."""
    found = subset.Subset.load(directory)
    return {path: (e.positions.tolist(), e.values.tobytes()) for path, e in found.items()}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(root / "cache"))
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0")
        (alone,) = run(root / "one", 1)
        assert (alone["devices"], alone["processes"]) == (4, 1)
        both = run(root / "two", 2, stop=3)
        for found in both:
            assert (found["devices"], found["processes"]) == (4, 2)
            assert "stopped at step 3" in found["stopped"]
        rows = [[{**row, "seconds": 0} for row in found["rows"]] for found in both]
    assert rows[0] == rows[1]
    return root / "one" / "dst" / "rng_0", root / "two" / "dst" / "rng_0"


def test_two_processes_train_as_one_does(directories):
    one, two = map(told, directories)
    assert one == two
    assert {x["step"] for x in one} == {1, 2, 3, 4}
    tuned = [bits_of(directory / "tuned" / "subset") for directory in directories]
    assert tuned[0] == tuned[1]
    assert sum(len(positions) for positions, _ in tuned[0].values()) > 0


def test_checkpoints_of_both_are_the_same(directories):
    last = [directory / "checkpoints" / "00000004" for directory in directories]
    assert bits_of(last[0] / "subset") == bits_of(last[1] / "subset")
    stored = [restored(path / "slots") for path in last]
    assert stored[0].keys() == stored[1].keys()
    for name, x in stored[0].items():
        np.testing.assert_array_equal(x, stored[1][name], err_msg=name)


def test_one_process_writes_the_files(directories):
    names = [{str(p.relative_to(d)) for p in d.rglob("*.json*")} for d in directories]
    assert "result.json" in names[0]
    assert names[0] - {n for n in names[0] if "checkpoints" in n} <= names[1]
    assert not [p for d in directories for p in d.rglob(".tmp-*")]
