"""The script that compares our scores with those of transformers: on a tiny model they agree."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("seqio")

import decoder_cases as cases

from dst_optax.finetuning.models import decoder

SCRIPTS = Path(__file__).parents[1] / "scripts"
PAIRS = [([5, 0, 6], [7]), ([8], [0, 9]), ([8], [3])]


def script_of(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return script_of("compare_with_transformers")


def test_options_of_an_example_are_compared_with_each_other(script):
    mine, theirs = np.array([-3.0, -1.0, -5.0, -4.0]), np.array([-3.0, -1.25, -3.0, -4.0])
    assert script.compare([2, 2], mine, theirs) == (2, 1, 2.0)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_transformers_scores_as_we_do(script, tmp_path, name):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    config = cases.CONFIGS[name]
    params = cases.weights(config)
    decoder.save_hf(jax.tree.map(np.asarray, params), config, tmp_path)
    lengths = {"inputs": 4, "targets": 3}
    mine = script.our_scores(decoder.CausalLM(config), params, PAIRS, lengths)
    np.testing.assert_allclose(script.transformers_scores(tmp_path, PAIRS), mine, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_are_near_those_in_float64(tmp_path, name):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    decoder.save_hf(
        jax.tree.map(np.asarray, cases.weights(cases.CONFIGS[name])), cases.CONFIGS[name], tmp_path
    )
    rows = [given + option for given, option in PAIRS]
    for found in script_of("compare_logits").distances(str(tmp_path), rows):
        assert 0 < found.ours < 1e-5 * found.largest
        assert 0 < found.theirs < 1e-5 * found.largest
