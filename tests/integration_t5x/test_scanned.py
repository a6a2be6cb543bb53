"""T5X's scalable T5: stacked layers and layers of their own are tuned alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("t5x.models", reason="needs T5X itself; docs/t5x.md says how to install it")

import flax
import seqio
from t5x import adafactor, models, train_state, trainer
from t5x.examples.scalable_t5 import network

from t5x_integration import optimizers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("t5x"),
    pytest.mark.filterwarnings("default"),  # T5X speaks to other authors
]

FRACTION, LAYERS, STEPS = 0.05, 3, 4
RNG = np.random.default_rng(0)
BATCH = {
    name: jnp.asarray(RNG.integers(3, 100, (4, n)))
    for name, n in {
        "encoder_input_tokens": 16,
        "decoder_input_tokens": 8,
        "decoder_target_tokens": 8,
        "decoder_loss_weights": 8,
    }.items()
} | {"decoder_loss_weights": jnp.ones((4, 8), jnp.int32)}


def model(scan):
    config = network.T5Config(
        vocab_size=384,
        dtype="float32",
        emb_dim=32,
        num_heads=2,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        head_dim=16,
        mlp_dim=64,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
        scan_layers=scan,
        remat_policy="minimal" if scan else "none",
    )
    rules = adafactor.standard_logical_factor_rules()
    inner = adafactor.Adafactor(logical_factor_rules=rules, min_dim_size_to_factor=16)
    vocabulary = seqio.ByteVocabulary()
    return models.EncoderDecoderModel(
        module=network.Transformer(config),
        input_vocabulary=vocabulary,
        output_vocabulary=vocabulary,
        optimizer_def=optimizers.dynamic_subset_tuning(inner, FRACTION),
    )


def apart(params):
    flat = {}
    for path, x in flax.traverse_util.flatten_dict(flax.core.unfreeze(params)).items():
        if path[:2] in (("encoder", "encoder"), ("decoder", "decoder")):
            for i in range(LAYERS):
                flat[(path[0], f"layers_{i}", *path[2:])] = x[:, i]
        else:
            flat[path] = x
    return flax.core.freeze(flax.traverse_util.unflatten_dict(flat))


def tune(made, params):
    shapes = {name: x.shape for name, x in BATCH.items()}
    variables = flax.core.unfreeze(made.get_initial_variables(jax.random.PRNGKey(0), shapes))
    wanted = jax.tree.map(jnp.shape, variables["params"])
    params = variables["params"] if params is None else flax.core.unfreeze(params)
    assert jax.tree.map(jnp.shape, params) == wanted
    variables["params"] = params
    state = train_state.FlaxOptimTrainState.create(made.optimizer_def, flax.core.freeze(variables))
    seed = state.params

    @jax.jit
    def step(state):
        return trainer.train_with_lr(state, BATCH, 0.1, jax.random.PRNGKey(1), made, None)[0]

    for _ in range(STEPS):
        state = step(state)
    return seed, state.params


def test_scanned_and_unscanned_models_give_the_same_subset():
    seed, scanned = tune(model(scan=True), None)
    _, unscanned = tune(model(scan=False), apart(seed))
    masks = [
        flax.traverse_util.flatten_dict(
            flax.core.unfreeze(jax.tree.map(lambda a, b: np.asarray(a != b), tuned, apart(seed)))
        )
        for tuned in (apart(scanned), unscanned)
    ]
    assert masks[0].keys() == masks[1].keys()
    different = sum(int((masks[0][k] != masks[1][k]).sum()) for k in masks[0])
    free = [sum(int(m.sum()) for m in mask.values()) for mask in masks]
    print(f"{free} entries are free, {different} of them in one model only")
    assert free[0] == free[1] > 1000
    assert different <= 2  # gradients of both differ in their last bits
