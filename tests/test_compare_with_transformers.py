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

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_with_transformers.py"
PAIRS = [([5, 0, 6], [7]), ([8], [0, 9]), ([8], [3])]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_with_transformers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
