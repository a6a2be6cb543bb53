"""Means of snapshots, and means cut to a budget, are what they say."""

import numpy as np
import pytest

for needed in ("seqio", "orbax.checkpoint"):
    pytest.importorskip(needed)

import average_snapshots  # noqa: E402

from dst_optax import subset  # noqa: E402

SEED = {"a": np.float32([0.1, 0.1, 0.1, 0.1]), "b": np.float32([[1, 2], [3, 4]])}
TUNED = [
    {"a": np.float32([0.1, 0.5, 0.1, 0.1]), "b": np.float32([[1, 2], [3, 9]])},
    {"a": np.float32([0.1, 0.7, 0.2, 0.1]), "b": np.float32([[1, 2], [3, 5]])},
    {"a": np.float32([0.1, 0.6, 0.1, 0.1]), "b": np.float32([[0, 2], [3, 4]])},
]


def test_a_mean_moves_what_some_model_moved():
    averaged = average_snapshots.mean(TUNED)
    assert averaged["a"].dtype == np.float32
    np.testing.assert_allclose(averaged["a"], [0.1, 0.6, 0.4 / 3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(averaged["b"], [[2 / 3, 2], [3, 6]], rtol=1e-6)
    assert subset.from_models(SEED, averaged).count == 4  # each model has 3 at most


def test_a_cut_mean_keeps_the_budget_and_the_entries_that_moved_furthest():
    cut = average_snapshots.cut(SEED, average_snapshots.mean(TUNED), 2)
    np.testing.assert_allclose(cut["a"], [0.1, 0.6, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(cut["b"], [[1, 2], [3, 6]], rtol=1e-6)


def test_the_last_snapshots_are_read(tmp_path):
    for step, tuned in zip((2, 4, 10), TUNED, strict=True):
        subset.from_models(SEED, tuned).save(tmp_path / "snapshots" / f"{step:08d}" / "subset")
    (tmp_path / "snapshots" / ".tmp-00000012").mkdir()
    assert list(average_snapshots.snapshots(tmp_path, 2)) == [4, 10]
    with pytest.raises(SystemExit, match="has 3 snapshots, not 4"):
        average_snapshots.snapshots(tmp_path, 4)
