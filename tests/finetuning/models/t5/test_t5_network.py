"""The network: logits of transformers and T5X, T5X's names; what packing, padding, layout must not change."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import t5_cases as cases

from dst_optax.finetuning.models import t5
from dst_optax.finetuning.models.t5.network import relative_position_bucket

RECORD = np.load(cases.RECORD)
T5X_RECORD = np.load(cases.T5X_RECORD)
V1_1 = cases.CONFIGS["v1_1"]
SHALLOW = dataclasses.replace(V1_1, num_encoder_layers=1, num_decoder_layers=1)
CONFIGS_DIR = pathlib.Path(__file__).parents[4] / "configs" / "models"


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_logits_are_those_of_transformers(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    found = cases.logits(config, cases.weights(config), *cases.batch(config))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, RECORD[f"{name}/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_logits_of_other_t5s_are_those_of_transformers(name):
    config = dataclasses.replace(cases.VARIANTS[name], scan_layers=True)
    found = cases.logits(config, cases.weights(config), *cases.batch(config))
    np.testing.assert_allclose(found, RECORD[f"{name}/logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_logits_names_and_shapes_are_those_of_t5x(name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    params = cases.weights(config)
    for kind, tokens in (("logits", cases.batch(config)), ("packed", cases.packed(config))):
        found = cases.logits(config, params, *tokens)
        np.testing.assert_allclose(found, T5X_RECORD[f"{name}/{kind}"], atol=1e-5, rtol=0, err_msg=kind)
    if not scan:
        names = {f"{path} {shape}" for path, shape in t5.shapes(config).items()}
        assert names == set(T5X_RECORD[f"{name}/names"].tolist())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_by_exact_arithmetic(bidirectional):
    buckets = 16 if bidirectional else 32
    near = buckets // 2

    def bucket(distance):
        behind = abs(distance) if bidirectional else max(-distance, 0)
        first = buckets if bidirectional and distance > 0 else 0
        if behind < near:
            return first + behind
        # the largest k with (behind / near) ** near >= (128 / near) ** k, in integers
        k = max(k for k in range(near) if behind**near * near**k >= 128**k * near**near)
        return first + near + k

    distances = np.arange(-300, 301)
    expected = [bucket(int(d)) for d in distances]
    assert relative_position_bucket(distances, bidirectional).tolist() == expected
    traced = jax.jit(lambda d: relative_position_bucket(d, bidirectional))(distances)
    assert traced.tolist() == expected


def test_names_and_shapes_are_those_of_t5x():
    config = dataclasses.replace(SHALLOW, num_heads=3)
    attention = {"query": (16, 24), "key": (16, 24), "value": (16, 24), "out": (24, 16)}
    expected = {
        "token_embedder/embedding": (48, 16),
        "encoder/relpos_bias/rel_embedding": (3, 32),
        "encoder/encoder_norm/scale": (16,),
        "encoder/layers_0/pre_attention_layer_norm/scale": (16,),
        "encoder/layers_0/pre_mlp_layer_norm/scale": (16,),
        "decoder/relpos_bias/rel_embedding": (3, 32),
        "decoder/decoder_norm/scale": (16,),
        "decoder/layers_0/pre_self_attention_layer_norm/scale": (16,),
        "decoder/layers_0/pre_cross_attention_layer_norm/scale": (16,),
        "decoder/layers_0/pre_mlp_layer_norm/scale": (16,),
        "decoder/logits_dense/kernel": (16, 48),
    }
    for module in ("encoder/layers_0/attention", "decoder/layers_0/self_attention"):
        expected |= {f"{module}/{name}/kernel": shape for name, shape in attention.items()}
    cross = "decoder/layers_0/encoder_decoder_attention"
    expected |= {f"{cross}/{name}/kernel": shape for name, shape in attention.items()}
    for stack in ("encoder", "decoder"):
        mlp = f"{stack}/layers_0/mlp"
        expected |= {
            f"{mlp}/wi_0/kernel": (16, 24),
            f"{mlp}/wi_1/kernel": (16, 24),
            f"{mlp}/wo/kernel": (24, 16),
        }
    assert t5.shapes(config) == expected

    v1_0 = t5.shapes(dataclasses.replace(config, mlp_activations=("relu",), logits_via_embedding=True))
    assert "decoder/logits_dense/kernel" not in v1_0
    assert v1_0["encoder/layers_0/mlp/wi/kernel"] == (16, 24)

    stacked = t5.shapes(dataclasses.replace(config, num_decoder_layers=5, scan_layers=True))
    assert stacked["decoder/decoder/self_attention/query/kernel"] == (16, 5, 24)
    assert stacked["encoder/encoder/pre_mlp_layer_norm/scale"] == (16, 1)
    assert stacked["encoder/relpos_bias/rel_embedding"] == (3, 32)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("t5_small", 60.5),
        ("t5_base", 222.9),
        ("t5_11b", 11307.3),
        ("t5_1_1_xxl", 11135.3),
        ("byt5_small", 299.6),
    ],
)
def test_published_number_of_parameters(name, millions):
    assert round(t5.num_params(t5.CONFIGS[name]) / 1e6, 1) == millions


def test_the_tiny_gin_file_is_the_table():
    gin = pytest.importorskip("gin", reason="needs gin-config")
    gin.clear_config()
    gin.parse_config_file(str(CONFIGS_DIR / "tiny.gin"))
    config = gin.query_parameter("%MODEL").scoped_configurable_fn()
    gin.clear_config()
    assert config == t5.CONFIGS["tiny"]


def test_initial_scale_is_that_of_t5():
    config = dataclasses.replace(SHALLOW, vocab_size=512, emb_dim=64, num_heads=8, head_dim=16, mlp_dim=256)
    tokens = jnp.ones((1, 1), int)
    params = jax.jit(t5.Transformer(config).init)(jax.random.key(0), tokens, tokens, tokens)["params"]
    flat = t5.parameters.flatten(params)
    layer = "encoder/layers_0"
    expected = {
        "token_embedder/embedding": 1,
        f"{layer}/attention/query/kernel": (64 * 16) ** -0.5,
        f"{layer}/attention/key/kernel": 64**-0.5,
        f"{layer}/attention/out/kernel": 128**-0.5,
        f"{layer}/mlp/wi_0/kernel": 64**-0.5,
        f"{layer}/mlp/wo/kernel": 256**-0.5,
        "decoder/logits_dense/kernel": 64**-0.5,
    }
    assert {p: float(flat[p].std() / s) for p, s in expected.items()} == pytest.approx(
        dict.fromkeys(expected, 1.0), rel=0.05
    )
    assert (flat[f"{layer}/pre_mlp_layer_norm/scale"] == 1).all()
    assert {x.dtype for x in flat.values()} == {jnp.dtype("float32")}


@functools.partial(jax.jit, static_argnums=0)
def loss(config, params, key=None):
    rngs = None if key is None else {"dropout": key}
    out = t5.Transformer(config).apply(
        {"params": params}, *cases.batch(config), enable_dropout=key is not None, rngs=rngs
    )
    return (out**2).mean()


def test_scan_and_remat_change_no_gradient():
    expected = jax.jit(jax.grad(lambda p: loss(V1_1, p)))(cases.weights(V1_1))
    for layout in (dict(remat=True), dict(scan_layers=True, remat=True)):
        config = dataclasses.replace(V1_1, **layout)
        found = jax.jit(jax.grad(lambda p, config=config: loss(config, p)))(cases.weights(config))
        if config.scan_layers:
            found = t5.unstack_layers(found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


def test_stacking_is_undone_by_unstacking():
    params = cases.weights(cases.CONFIGS["byt5"])
    again = t5.unstack_layers(t5.stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_packed_examples_do_not_see_each_other():
    params = cases.weights(SHALLOW)
    rng = np.random.default_rng(0)
    xs = [rng.integers(2, 48, (1, n)) for n in (5, 9)]
    ys = [rng.integers(2, 48, (1, n)) for n in (4, 3)]
    ins = [np.pad(y, ((0, 0), (1, 0)))[:, :-1] for y in ys]

    def packed(parts, length):
        return np.pad(np.concatenate(parts, axis=1), ((0, 0), (0, length - sum(p.shape[1] for p in parts))))

    def ids(parts, length):
        return packed([np.full_like(p, i + 1) for i, p in enumerate(parts)], length)

    def positions(parts, length):
        return packed([np.arange(p.shape[1])[None] for p in parts], length)

    found = cases.logits(
        SHALLOW,
        params,
        packed(xs, 16),
        packed(ins, 9),
        packed(ys, 9),
        ids(xs, 16),
        ids(ys, 9),
        positions(xs, 16),
        positions(ys, 9),
    )
    apart = [cases.logits(SHALLOW, params, *each) for each in zip(xs, ins, ys, strict=True)]
    np.testing.assert_allclose(found[:, :7], np.concatenate(apart, axis=1), atol=1e-5)


def test_padding_and_later_targets_change_nothing():
    params, (x, y_in, y) = cases.weights(SHALLOW), cases.batch(SHALLOW)
    expected = cases.logits(SHALLOW, params, x, y_in, y)
    wider = [np.pad(a, ((0, 0), (0, 5))) for a in (x, y_in, y)]
    np.testing.assert_allclose(cases.logits(SHALLOW, params, *wider)[:, :7], expected, atol=1e-5)
    y_in[:, 4:] = 2
    changed = cases.logits(SHALLOW, params, x, y_in, y)
    np.testing.assert_allclose(changed[:, :4], expected[:, :4], atol=1e-6)
    assert not np.allclose(changed[:, 4:], expected[:, 4:], atol=1e-2)


def test_dropout_follows_its_key_and_can_be_disabled():
    one, two = jax.random.key(1), jax.random.key(2)
    params = cases.weights(SHALLOW)
    assert loss(SHALLOW, params, one) == loss(SHALLOW, params, one)
    assert loss(SHALLOW, params, one) != loss(SHALLOW, params, two)
    none = dataclasses.replace(SHALLOW, dropout_rate=0.0)
    np.testing.assert_allclose(loss(none, params, one), loss(SHALLOW, params), rtol=1e-5)


def test_dropout_is_the_same_at_all_positions():
    from dst_optax.finetuning.models.t5.network import _dropout

    config = dataclasses.replace(V1_1, dropout_rate=0.5)
    dropped = _dropout(config, False).apply({}, jnp.ones((4, 6, 64)), rngs={"dropout": jax.random.key(0)})
    assert (dropped == dropped[:, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    params, tokens = cases.weights(SHALLOW), cases.batch(SHALLOW)
    found = cases.logits(dataclasses.replace(SHALLOW, dtype="bfloat16"), params, *tokens)
    exact = cases.logits(SHALLOW, params, *tokens)
    assert found.dtype == np.float32
    error = np.abs(found - exact).mean() / exact.std()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("wrong", [dict(num_heads=0), dict(dropout_rate=1.0), dict(vocab_size=-1)])
def test_config_refuses_what_is_no_model(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(V1_1, **wrong)


def test_shardings_follow_the_rules():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    for scan in (False, True):
        config = dataclasses.replace(V1_1, scan_layers=scan)
        placed = t5.parameters.flatten(t5.shardings(cases.weights(config), mesh))
        for path, shape in t5.shapes(config).items():
            split = [a // b for a, b in zip(shape, placed[path].shard_shape(shape), strict=True)]
            halved = [axis for axis, parts in enumerate(split) if parts == 2]
            if path.endswith("scale"):
                assert halved == []
            elif any(name in path for name in ("embedding", "/out/", "/wo/")):
                assert halved == [0], path
            else:
                assert halved == [len(shape) - 1], path


def test_axes_that_the_mesh_does_not_divide_stay_whole():
    config = dataclasses.replace(V1_1, num_heads=6)
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
    placed = t5.parameters.flatten(t5.shardings(cases.weights(config), mesh))
    even = t5.parameters.flatten(t5.shardings(cases.weights(dataclasses.replace(V1_1, num_heads=4)), mesh))
    for path, sharding in placed.items():
        if "rel_embedding" in path:
            assert not any(sharding.spec)
            assert any(even[path].spec)
        else:
            assert sharding.spec == even[path].spec, path


MESH = """
import dataclasses, json, sys
import jax, numpy as np
from flax import linen as nn
sys.path.insert(0, {here!r})
import t5_cases as cases
from dst_optax.finetuning.models import t5
config = dataclasses.replace(cases.CONFIGS["v1_1"], scan_layers=True)
params, tokens = cases.weights(config), [np.tile(a, (4, 1))[:4] for a in cases.batch(config)]
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
placed = jax.device_put(params, t5.shardings(params, mesh))
model = t5.Transformer(config)
with jax.set_mesh(mesh), nn.logical_axis_rules(t5.AXIS_RULES):
    logits = jax.jit(lambda p, *a: model.apply({{"params": p}}, *a, enable_dropout=False))(placed, *tokens)
    decoded = t5.decode(model, placed, tokens[0], 6)
print(json.dumps(dict(
    error=float(np.abs(logits - cases.logits(config, params, *tokens)).max()),
    shard=logits.addressable_shards[0].data.shape,
    tokens=bool((decoded == t5.decode(model, params, tokens[0], 6)).all()),
)))
"""


@pytest.mark.slow
def test_mesh_of_eight_devices_gives_the_same_logits_and_tokens():
    here = pathlib.Path(__file__).parent
    (found,) = processes.finish(processes.start("-c", 8, MESH.format(here=str(here))))
    assert found["error"] < 1e-4
    assert found["tokens"]
    assert found["shard"] == [1, 7, 24]
