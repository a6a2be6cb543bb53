"""Decoding: transformers' greedy tokens, those of the network without a cache, rows apart from each other."""

import dataclasses

import decoder_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest

from dst_optax.finetuning.models import decoder

RECORD = np.load(cases.RECORD)
LLAMA = cases.CONFIGS["llama"]
NO_END = (99,)


@pytest.mark.parametrize(("name", "scan"), cases.NAMES_AND_SCAN)
def test_greedy_tokens_are_those_of_transformers(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    tokens, lengths = cases.batch(config)
    model, params = decoder.Decoder(config), cases.weights(config)
    found = decoder.decode(model, params, tokens, lengths, cases.NEW, NO_END)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, RECORD[f"{name}/greedy"])


@pytest.mark.parametrize("name", ["llama3_2", "gemma3"])
def test_cached_is_uncached(name):
    config, new = cases.CONFIGS[name], 5
    (tokens, lengths), params = cases.batch(config), cases.weights(config)
    expected = []
    for row, length in zip(tokens, lengths, strict=True):
        text = np.zeros((1, tokens.shape[1] + new), np.int32)
        text[0, :length] = row[:length]
        for end in range(length, length + new):
            text[0, end] = cases.logits(config, params, text)[0, end - 1].argmax()
        expected.append(text[0, length : length + new])
    found = decoder.decode(decoder.Decoder(config), params, tokens, lengths, new, NO_END)
    np.testing.assert_array_equal(found, expected)


def test_each_row_ends_at_the_first_of_its_ends():
    ends = (24, 13)
    (tokens, lengths), params = cases.batch(LLAMA), cases.weights(LLAMA)
    expected = []
    for row in RECORD["llama/greedy"].tolist():
        end = min((row.index(e) for e in ends if e in row), default=len(row))
        expected.append((row[: end + 1] + [ends[0]] * len(row))[: len(row)])
    assert [row.count(ends[0]) for row in expected] == [6, 4, 5]  # cut before the last, each elsewhere
    found = decoder.decode(decoder.Decoder(LLAMA), params, tokens, lengths, cases.NEW, ends)
    np.testing.assert_array_equal(found, expected)


def test_rows_do_not_see_each_other():
    (tokens, lengths), params = cases.batch(LLAMA), cases.weights(LLAMA)
    together = decoder.decode(decoder.Decoder(LLAMA), params, tokens, lengths, 4, NO_END)
    order = [2, 0, 1]
    turned = decoder.decode(decoder.Decoder(LLAMA), params, tokens[order], lengths[order], 4, NO_END)
    np.testing.assert_array_equal(turned, together[np.array(order)])


@pytest.mark.parametrize("wrong", [dict(max_length=0), dict(eos_ids=())])
def test_refuses_what_cannot_be_decoded(wrong):
    arguments = dict(max_length=3, eos_ids=NO_END) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        decoder.decode(
            decoder.Decoder(LLAMA), cases.weights(LLAMA), np.ones((1, 2), int), np.array([2]), **arguments
        )
