"""The trainer in two processes on one mesh: the bits of one process, also over a stop and a resume."""

import json

import numpy as np
import pytest

pytest.importorskip("seqio")
for needed in ("orbax.checkpoint", "clu", "rich", "tensorboard", "matplotlib"):
    pytest.importorskip(needed)

import pathlib  # noqa: E402

import processes  # noqa: E402

from dst_optax import subset  # noqa: E402

WORKER = pathlib.Path(__file__).with_name("trainer_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]


def run(directory, count, stop=0):
    port = processes.free_port()
    arguments = [(str(directory), str(stop), str(count), port, str(i)) for i in range(count)]
    return processes.finish(*(processes.start(WORKER, 8 // count, *a) for a in arguments))


def told(directory):
    """Everything measured, but for speed."""
    lines = (directory / "dst" / "rng_0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in lines]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (alone,) = run(root / "one", 1)
    assert (alone["devices"], alone["processes"]) == (8, 1)
    for found in run(root / "two", 2, stop=3):
        assert (found["devices"], found["processes"]) == (8, 2)
        assert "stopped at step 3" in found["rows"]
    rows = [[{**row, "seconds": 0} for row in found["rows"]] for found in run(root / "two", 2)]
    assert rows[0] == rows[1]
    return root / "one", root / "two"


def test_two_processes_train_as_one_does(directories):
    one, two = map(told, directories)
    assert one == [x for x in two if not (x["step"] == 2 and x in two[: two.index(x)])]
    first, second = (subset.Subset.load(d / "dst" / "rng_0" / "tuned" / "subset") for d in directories)
    assert first.count > 0
    for path, entries in first.items():
        np.testing.assert_array_equal(entries.positions, second[path].positions)
        np.testing.assert_array_equal(entries.values.view(np.uint32), second[path].values.view(np.uint32))


def test_checkpoints_of_both_are_the_same(directories):
    one, two = (sorted((d / "dst" / "rng_0" / "checkpoints").iterdir()) for d in directories)
    assert [x.name for x in two][-1] == [x.name for x in one][-1] == "00000004"
    tables = [subset.Subset.load(x[-1] / "subset") for x in (one, two)]
    assert [(p, e.fingerprint, e.positions.tolist()) for p, e in tables[0].items()] == [
        (p, e.fingerprint, e.positions.tolist()) for p, e in tables[1].items()
    ]
    names = [{str(p.relative_to(d)) for p in d.rglob("*.jsonl")} for d in directories]
    assert names[0] == names[1]
    assert not [p for d in directories for p in d.rglob(".tmp-*")]
