"""Decoding: transformers' greedy tokens, rows by themselves, one compilation a shape."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import t5_cases as cases

from dst_optax.finetuning.models import t5

RECORD = np.load(cases.RECORD)
SMALL = dataclasses.replace(cases.CONFIGS["v1_1"], vocab_size=6, num_encoder_layers=1, num_decoder_layers=1)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    inputs, _, _ = cases.batch(config)
    found = t5.decode(
        t5.Transformer(config), cases.weights(config), inputs, cases.LENGTH, eos_id=cases.EOS[name]
    )
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, RECORD[f"{name}/greedy"])


def test_rows_are_independent_and_padding_rows_are_empty():
    params, model = cases.weights(SMALL), t5.Transformer(SMALL)
    inputs = np.array([[3, 4, 5], [0, 0, 0], [2, 0, 0], [3, 4, 5]])
    found = np.asarray(t5.decode(model, params, inputs, 5))
    assert (found[1] == 0).all()
    assert (found[0] == found[3]).all()
    alone = t5.decode(model, params, inputs[[2, 2, 2, 2]], 5)
    assert (found[2] == alone[0]).all()


def test_a_new_batch_compiles_nothing():
    params, model = cases.weights(SMALL), t5.Transformer(SMALL)
    t5.decode(model, params, np.array([[3, 4, 5]]), 5)
    before = t5.decode._cache_size()
    t5.decode(t5.Transformer(SMALL), params, np.array([[2, 0, 0]]), 5)
    assert t5.decode._cache_size() == before


def test_refuses_what_cannot_be_decoded():
    with pytest.raises(ValueError, match="max_length from 1 on, got 0"):
        t5.decode(t5.Transformer(SMALL), cases.weights(SMALL), np.ones((1, 2), int), 0)
