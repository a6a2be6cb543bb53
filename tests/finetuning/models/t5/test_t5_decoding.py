"""Decoding: transformers' greedy tokens, the likeliest target by exhaustion, one compilation a shape."""

import dataclasses
import itertools

import jax
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


def log_probabilities(config, params, inputs, targets):
    """Log-probability of each target for one row of inputs, by the full network without a cache."""
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    rows = np.broadcast_to(inputs, (len(targets), inputs.size))
    real = np.ones_like(targets)  # 0 may be a token here
    logits = cases.logits(config, params, rows, shifted, real)
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    return chosen.cumsum(axis=1)


@pytest.mark.parametrize(("alpha", "scan"), [(0.0, False), (0.6, True), (3.0, False)])
def test_a_wide_beam_finds_the_likeliest_target(alpha, scan):
    length, vocab, eos = 4, SMALL.vocab_size, 1
    config = dataclasses.replace(SMALL, scan_layers=scan)
    params = cases.weights(config)
    inputs = np.array([[3, 4, 5, 2], [2, 5, 0, 0]])
    model = t5.Transformer(config)
    found = t5.decode(model, params, inputs, length, num_beams=vocab**3, eos_id=eos, alpha=alpha)

    every = np.array(list(itertools.product(range(vocab), repeat=length)))
    for row, got in zip(inputs, np.asarray(found), strict=True):
        scores = {}
        for target, sums in zip(every, log_probabilities(config, params, row, every), strict=True):
            if eos in target:
                end = int(np.argmax(target == eos))
                ended = tuple(np.where(np.arange(length) <= end, target, 0).tolist())
                scores[ended] = sums[end] / ((5 + end + 1) / 6) ** alpha
        assert tuple(got.tolist()) == max(scores, key=scores.__getitem__)


def test_a_beam_that_cannot_end_returns_its_likeliest_start():
    params, inputs = cases.weights(SMALL), np.array([[3, 4]])
    found = t5.decode(t5.Transformer(SMALL), params, inputs, 3, num_beams=36, eos_id=99)
    every = np.array(list(itertools.product(range(6), repeat=3)))
    sums = log_probabilities(SMALL, params, inputs[0], every)[:, -1]
    np.testing.assert_array_equal(found[0], every[sums.argmax()])


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_are_independent_and_padding_rows_are_empty(beams):
    params, model = cases.weights(SMALL), t5.Transformer(SMALL)
    inputs = np.array([[3, 4, 5], [0, 0, 0], [2, 0, 0], [3, 4, 5]])
    found = np.asarray(t5.decode(model, params, inputs, 5, beams))
    assert (found[1] == 0).all()
    assert (found[0] == found[3]).all()
    alone = t5.decode(model, params, inputs[[2, 2, 2, 2]], 5, beams)
    assert (found[2] == alone[0]).all()


def test_a_new_batch_compiles_nothing():
    params, model = cases.weights(SMALL), t5.Transformer(SMALL)
    t5.decode(model, params, np.array([[3, 4, 5]]), 5)
    before = t5.decode._cache_size()
    t5.decode(t5.Transformer(SMALL), params, np.array([[2, 0, 0]]), 5)
    assert t5.decode._cache_size() == before


@pytest.mark.parametrize("wrong", [dict(max_length=0), dict(num_beams=0), dict(alpha=-1.0)])
def test_refuses_what_cannot_be_decoded(wrong):
    arguments = dict(max_length=3) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        t5.decode(t5.Transformer(SMALL), cases.weights(SMALL), np.ones((1, 2), int), **arguments)
