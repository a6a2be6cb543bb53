"""Recipes that could not be followed are refused."""

import re

import pytest

pytest.importorskip("jax")

from dst_optax.finetuning.recipe import Recipe

LENGTHS = {"inputs": 8, "targets": 8}


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 0},
        {"steps": True},
        {"steps": 2.0},
        {"eval_every": None},
        {"save_every": -1},
        {"snapshot_every": 0},
        {"patience": 0},
        {"lengths": {"inputs": 8}},
        {"lengths": LENGTHS | {"target": 8}},
        {"lengths": LENGTHS | {"inputs": 0}},
        {"lengths": LENGTHS | {"inputs": "8"}},
        {"lengths": "8"},
        {"dtype": "bfloat"},
        {"dtype": "int32"},
        {"dtype": None},
        {"dtype": "float64"},
        {"dtype": "float16"},
        {"remat": "False"},
        {"scan_layers": 3},
        {"score_train": "no"},
        {"dropout": 1.0},
        {"label_smoothing": 1.5},
        {"label_smoothing": float("nan")},
        {"z_loss": -1.0},
        {"z_loss": "0"},
    ],
)
def test_settings_that_make_no_sense_are_refused(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"recipe: {name} is {re.escape(repr(value))}; it must be "):
        Recipe(**{"steps": 1} | given)


def test_batches_are_computed_in_equal_parts():
    with pytest.raises(ValueError, match="batch_size 8 is no multiple of accumulate 3"):
        Recipe(steps=1, batch_size=8, accumulate=3)


def test_none_means_never_or_as_the_model_does():
    recipe = Recipe(steps=4, eval_every=2, save_every=None, snapshot_every=None, patience=None, dropout=None)
    assert [recipe.saves_at(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert not any(recipe.snapshots_at(step) for step in (1, 2, 3, 4))
