"""LoRA against the library qwix: the same matrices are tuned, and equal products give equal models."""

import decoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

qwix = pytest.importorskip("qwix", reason="needs qwix")

from dst_optax.finetuning.methods.lora import LoRA  # noqa: E402
from dst_optax.finetuning.models import decoder  # noqa: E402
from dst_optax.finetuning.models.base import flatten  # noqa: E402

RANK, ALPHA = 2, 6.0

pytestmark = pytest.mark.filterwarnings("ignore:.VariableState. was removed:DeprecationWarning")  # qwix 0.1.8


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_lora_is_qwixs(name):
    config = cases.CONFIGS[name]
    params = jax.tree.map(jnp.asarray, cases.weights(config))  # qwix recognises weights by identity
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    everything = qwix.LoraProvider(module_path=r"layers_.*_proj", rank=RANK, alpha=ALPHA)
    theirs = qwix.apply_lora_to_model(decoder.Decoder(config), everything)
    init = flatten(jax.eval_shape(theirs.init, jax.random.key(0), tokens)["params"])
    added = {path: leaf.shape for path, leaf in init.items() if "_lora_" in path}

    method = LoRA(optax.identity(), rank=RANK, alpha=ALPHA)
    _, tuned = method.split(params, jax.random.key(0), decoder.CausalLM(config))
    ours = {f"{path}_lora_{part}": x.shape for path, pair in tuned.items() for part, x in pair.items()}
    assert ours == added

    keys = iter(jax.random.split(jax.random.key(1), len(added)))
    tuned = jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), tuned)
    pairs = {f"{path}_lora_{part}": x for path, pair in tuned.items() for part, x in pair.items()}
    factors = decoder.parameters.unflatten(flatten(params) | pairs)
    found = theirs.apply({"params": factors}, tokens)
    expected = decoder.Decoder(config).apply({"params": method.merge(params, tuned)}, tokens)
    untuned = decoder.Decoder(config).apply({"params": params}, tokens)
    assert np.abs(expected - untuned).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
