"""A method's description tells it from others, and is the same in every process."""

import os
import subprocess
import sys

import optax
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("seqio")

from dst_optax.finetuning import optimizers
from dst_optax.finetuning.methods.dst import DST
from dst_optax.finetuning.methods.full import Full
from dst_optax.finetuning.methods.identity import describe

MAKERS = {
    "rate": lambda x: Full(optax.adamw(x)),
    "decay": lambda x: Full(optax.adamw(1e-3, weight_decay=x)),
    "momentum": lambda x: Full(optax.sgd(1e-3, momentum=x)),
    "schedule": lambda x: Full(optax.sgd(optax.linear_schedule(x, 0.0, 9))),
    "function": lambda x: Full(optax.sgd(lambda step: x / (1 + step))),
    "clipped": lambda x: Full(optimizers.clipped(optax.sgd(1e-3), x)),
    "decayed": lambda x: DST(optimizers.decayed(x, steps=99), 0.1),
    "fraction": lambda x: DST(optax.sgd(1e-3), x),
    "accumulated": lambda x: Full(optax.MultiSteps(optax.adamw(x), 2).gradient_transformation()),
    "injected": lambda x: Full(optax.inject_hyperparams(optax.adam)(x)),
    "partitioned": lambda x: Full(optax.partition({"a": optax.sgd(x)}, {"w": "a"})),
}


@pytest.mark.parametrize("name", MAKERS)
def test_settings_are_told_apart(name):
    make = MAKERS[name]
    assert describe(make(0.1)) == describe(make(0.1)) != describe(make(0.2))


def test_functions_of_ones_own_are_told_apart_by_their_constants():
    assert describe(lambda step: 0.1 * step) != describe(lambda step: 0.2 * step)


def test_every_process_describes_alike():
    program = """
import optax
from dst_optax.finetuning import optimizers
from dst_optax.finetuning.methods.dst import DST
from dst_optax.finetuning.methods.identity import describe
print(describe(DST(optimizers.decayed(1e-3, steps=99), 0.1)))
"""
    said = {
        subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in "12"
    }
    assert len(said) == 1
    assert b"0x" not in said.pop()
