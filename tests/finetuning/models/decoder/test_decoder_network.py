"""The network: logits of transformers; what padding, layout, dtype and a soft prompt must not change."""

import dataclasses
import pathlib

import decoder_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from dst_optax.finetuning.models import decoder
from dst_optax.finetuning.models.base import flatten
from dst_optax.finetuning.models.decoder import network

RECORD = np.load(cases.RECORD)
QWEN3, GEMMA = cases.CONFIGS["qwen3"], cases.CONFIGS["gemma3"]


@pytest.mark.parametrize(("name", "scan"), cases.NAMES_AND_SCAN)
def test_logits_are_those_of_transformers(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    tokens, lengths = cases.batch(config)
    found = cases.logits(config, cases.weights(config), tokens)
    assert found.dtype == np.float32
    for row, expected, length in zip(found, RECORD[f"{name}/logits"], lengths, strict=True):
        np.testing.assert_allclose(row[:length], expected[:length], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "scan"), cases.NAMES_AND_SCAN)
def test_names_and_shapes_are_those_of_the_network(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    made = jax.eval_shape(decoder.Decoder(config).init, jax.random.key(0), jnp.ones((1, 1), int))["params"]
    assert {path: x.shape for path, x in flatten(made).items()} == decoder.shapes(config)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2_135m", 134_515_008),
        ("llama3_2_1b", 1_235_814_400),
        ("qwen2_5_0_5b", 494_032_768),
        ("qwen3_0_6b", 596_049_920),
        ("gemma3_270m", 268_098_176),
    ],
)
def test_published_number_of_parameters(name, count):
    assert decoder.num_params(decoder.CONFIGS[name]) == count


def test_logits_are_computed_where_they_are_wanted():
    params, (tokens, _) = cases.weights(QWEN3), cases.batch(QWEN3)
    at = np.array([[23, 0], [4, 12], [7, 7]])
    expected = np.take_along_axis(cases.logits(QWEN3, params, tokens), at[:, :, None], axis=1)
    np.testing.assert_allclose(cases.logits(QWEN3, params, tokens, at), expected, atol=1e-6)
    compiled = jax.jit(lambda p, t, at: decoder.Decoder(QWEN3).apply({"params": p}, t, at=at))
    text = compiled.lower(params, tokens, at).compile().as_text()
    assert text is not None
    assert "f32[3,24,47]" not in text


def test_what_follows_changes_nothing_before():
    params, (tokens, _) = cases.weights(GEMMA), cases.batch(GEMMA)
    expected = cases.logits(GEMMA, params, tokens)
    tokens[:, 9:] = 0
    found = cases.logits(GEMMA, params, tokens)
    np.testing.assert_allclose(found[:, :9], expected[:, :9], atol=1e-6)
    assert not np.allclose(found[:, 9:], expected[:, 9:], atol=1e-2)


def test_a_soft_prompt_of_a_tokens_embeddings_is_these_tokens():
    params, (tokens, _) = cases.weights(GEMMA), cases.batch(GEMMA)
    expected = cases.logits(GEMMA, params, tokens)
    begun = np.repeat(tokens[:1, :3], 3, axis=0)
    whole = np.concatenate([begun, tokens[:, 3:]], axis=1)
    prompted = params | {"prompt": params["embed_tokens"]["embedding"][begun[0]]}
    found = cases.logits(GEMMA, prompted, whole[:, 3:])
    np.testing.assert_allclose(found, cases.logits(GEMMA, params, whole)[:, 3:], atol=1e-5)
    assert not np.allclose(found[1], expected[1, 3:], atol=1e-2)
    decode = [
        decoder.decode(decoder.Decoder(GEMMA), p, x, np.full(3, x.shape[1]), 6, (99,))
        for p, x in ((params, whole), (prompted, whole[:, 3:]))
    ]
    np.testing.assert_array_equal(*decode)


def test_scan_and_remat_change_no_gradient():
    tokens, _ = cases.batch(GEMMA)

    def gradient(config):
        def loss(params):
            return (decoder.Decoder(config).apply({"params": params}, tokens) ** 2).mean()

        return flatten(jax.jit(jax.grad(loss))(cases.weights(config)))

    expected = gradient(GEMMA)
    for layout in (dict(remat=True), dict(scan_layers=True, remat=True)):
        config = dataclasses.replace(GEMMA, **layout)
        wanted = cases.stacked(expected, GEMMA.num_layers) if config.scan_layers else expected
        found = gradient(config)
        assert set(found) == set(wanted)
        for path, x in found.items():
            np.testing.assert_allclose(x, wanted[path], rtol=1e-3, atol=1e-4, err_msg=path)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    params, (tokens, _) = cases.weights(GEMMA), cases.batch(GEMMA)
    found = cases.logits(dataclasses.replace(GEMMA, dtype="bfloat16"), params, tokens)
    exact = cases.logits(GEMMA, params, tokens)
    assert found.dtype == np.float32
    error = np.abs(found - exact).mean() / exact.std()
    assert 1e-4 < error < 0.05


def test_a_new_model_starts_near_the_uniform_distribution():
    for config in (QWEN3, GEMMA):
        init = jax.jit(decoder.Decoder(config).init)
        params = init(jax.random.key(0), jnp.ones((1, 1), int))["params"]
        scales = {float(x[0]) for path, x in flatten(params).items() if path.endswith("scale")}
        assert scales == {0.0 if config is GEMMA else 1.0}
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        assert np.abs(cases.logits(config, params, cases.batch(config)[0])).max() < 1


@pytest.mark.parametrize("length", [0, 1, 39, 8191, 100_000])
def test_llama3_frequencies_by_their_definition(length):
    rope = decoder.Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    for pair, found in enumerate(network.frequencies(rope, 64).tolist()):
        plain = 500_000.0 ** (-2 * pair / 64)
        wavelength = 2 * np.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192 / 1:
            expected = plain / 8
        else:
            share = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - share) * plain / 8 + share * plain
        assert found * length == pytest.approx(expected * length, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_layers=0),
        dict(num_kv_heads=3),
        dict(head_dim=5),
        dict(family="mistral"),
        dict(sliding_layers=(True,)),
        dict(sliding_layers=(True, True)),
    ],
)
def test_config_refuses_what_is_no_model(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(QWEN3, **wrong)


def test_shardings_follow_the_rules():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    for scan in (False, True):
        config = dataclasses.replace(cases.CONFIGS["qwen2"], scan_layers=scan)
        placed = flatten(decoder.shardings(config, mesh))
        for path, shape in decoder.shapes(config).items():
            split = [a // b for a, b in zip(shape, placed[path].shard_shape(shape), strict=True)]
            halved = [axis for axis, parts in enumerate(split) if parts == 2]
            if path.endswith("scale") or shape[-1] == 47 or shape[0] == 47:  # 47 is odd: it stays whole
                assert halved == [], path
            elif "o_proj" in path or "down_proj" in path or path.endswith("bias"):
                assert halved == [0], path
            else:
                assert halved == [len(shape) - 1], path


MESH = """
import dataclasses, json, sys
import jax, numpy as np
from flax import linen as nn
sys.path.insert(0, {here!r})
import decoder_cases as cases
from dst_optax.finetuning.models import decoder
config = dataclasses.replace(cases.CONFIGS["smollm2"], scan_layers=True)
tokens, lengths = cases.batch(config)
tokens, lengths = np.tile(tokens, (4, 1))[:8], np.tile(lengths, 4)[:8]
params, model = cases.weights(config), decoder.Decoder(config)
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = jax.device_put(params, decoder.shardings(config, mesh))
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
with jax.set_mesh(mesh), nn.logical_axis_rules(decoder.AXIS_RULES):
    logits = jax.jit(lambda p, t: model.apply({{"params": p}}, t))(placed, jax.device_put(tokens, rows))
    decoded = decoder.decode(model, placed, tokens, lengths, 6, (99,))
print(json.dumps(dict(
    error=float(np.abs(logits - cases.logits(config, params, tokens)).max()),
    batch=logits.addressable_shards[0].data.shape[0],
    tokens=bool((decoded == decoder.decode(model, params, tokens, lengths, 6, (99,))).all()),
)))
"""


@pytest.mark.slow
def test_mesh_of_eight_devices_gives_the_same_logits_and_tokens():
    here = pathlib.Path(__file__).parent
    (found,) = processes.finish(processes.start("-c", 8, MESH.format(here=str(here))))
    assert found["error"] < 1e-4
    assert found["tokens"]
    assert found["batch"] == 2
