"""The script that compares our scores with those of transformers: on a tiny model they agree."""

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("seqio")

import compare_logits
import compare_with_transformers
import decoder_cases as cases

from dst_optax.finetuning.models import decoder

PAIRS = [([5, 0, 6], [7]), ([8], [0, 9]), ([8], [3])]


def test_options_of_an_example_are_compared_with_each_other():
    mine, theirs = np.array([-3.0, -1.0, -5.0, -4.0]), np.array([-3.0, -1.25, -3.0, -4.0])
    assert compare_with_transformers.compare([2, 2], mine, theirs) == (2, 1, 2.0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_transformers_scores_as_we_do(tmp_path, name):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    config = cases.CONFIGS[name]
    params = cases.weights(config)
    decoder.save_hf(jax.tree.map(np.asarray, params), config, tmp_path)
    lengths = {"inputs": 4, "targets": 3}
    mine = compare_with_transformers.our_scores(decoder.CausalLM(config), params, PAIRS, lengths)
    np.testing.assert_allclose(
        compare_with_transformers.transformers_scores(tmp_path, PAIRS), mine, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_are_near_those_in_float64(tmp_path, name):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    decoder.save_hf(
        jax.tree.map(np.asarray, cases.weights(cases.CONFIGS[name])), cases.CONFIGS[name], tmp_path
    )
    rows = [given + option for given, option in PAIRS]
    for found in compare_logits.distances(str(tmp_path), rows):
        assert 0 < found.ours < 1e-5 * found.largest
        assert 0 < found.theirs < 1e-5 * found.largest
