"""Hugging Face directories: read and written without a bit changed; what is not ours is refused by name."""

import dataclasses
import json

import decoder_cases as cases
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dst_optax.finetuning.models import decoder
from dst_optax.finetuning.models.base import flatten, unflatten

RECORD = np.load(cases.RECORD)
QWEN2, TIED = cases.CONFIGS["qwen2"], cases.CONFIGS["qwen2_tied"]


def same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert set(found) == set(expected)
    for path, x in found.items():
        np.testing.assert_array_equal(x, expected[path], err_msg=path)
        assert x.dtype == expected[path].dtype


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_what_is_written_is_read(tmp_path, name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    params = cases.weights(config)
    decoder.save_hf(params, config, tmp_path)
    assert decoder.read_config(tmp_path, scan_layers=scan) == config
    same(decoder.load(tmp_path, config), params)


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_config_json_of_transformers_5_says_the_same(tmp_path, name):
    (tmp_path / "config.json").write_text(str(RECORD[f"{name}/config"]))
    assert decoder.read_config(tmp_path) == cases.CONFIGS[name]


PUBLISHED = {
    "llama3_2_1b": dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        bos_token_id=128000,
        eos_token_id=128001,
        head_dim=64,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        model_type="llama",
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_scaling=dict(
            factor=32.0,
            high_freq_factor=4.0,
            low_freq_factor=1.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        vocab_size=128256,
    ),
    "qwen2_5_0_5b": dict(
        hidden_act="silu",
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        model_type="qwen2",
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "gemma3_270m": dict(  # tied, and the pattern of its layers, by default
        _sliding_window_pattern=6,
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=640,
        intermediate_size=2048,
        model_type="gemma3_text",
        num_attention_heads=4,
        num_hidden_layers=18,
        num_key_value_heads=1,
        query_pre_attn_scalar=256,
        rms_norm_eps=1e-6,
        rope_local_base_freq=10000.0,
        rope_scaling=None,
        rope_theta=1000000.0,
        sliding_window=512,
        vocab_size=262144,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_json_as_published(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    assert decoder.read_config(tmp_path) == decoder.CONFIGS[name]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama3_2_1b", dict(model_type="mistral"), "mistral"),
        ("llama3_2_1b", dict(model_type="t5"), "t5"),
        ("llama3_2_1b", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
        ("llama3_2_1b", dict(rope_scaling=dict(type="dynamic", factor=4.0)), "dynamic"),
        ("llama3_2_1b", dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "longrope"),
        ("llama3_2_1b", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("llama3_2_1b", dict(hidden_act="gelu"), "activation 'gelu'"),
        ("gemma3_270m", dict(hidden_activation="gelu"), "activation 'gelu'"),
        ("llama3_2_1b", dict(attention_bias=True), "attention_bias"),
        ("llama3_2_1b", dict(mlp_bias=True), "mlp_bias"),
        ("llama3_2_1b", dict(quantization_config=dict(bits=4)), "quantization_config"),
        ("qwen2_5_0_5b", dict(use_sliding_window=True), "use_sliding_window"),
        ("qwen2_5_0_5b", dict(layer_types=["sliding_attention"] * 24), "layer_types"),
        ("gemma3_270m", dict(layer_types=["chunked_attention"] * 18), "chunked_attention"),
        ("gemma3_270m", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
        ("gemma3_270m", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("llama3_2_1b", dict(hidden_size=None), "hidden_size"),
        ("gemma3_270m", dict(sliding_window=None), "sliding_window is null"),
        ("gemma3_270m", dict(tie_word_embeddings=None), "tie_word_embeddings is null"),
        ("llama3_2_1b", dict(num_key_value_heads=5), "num_kv_heads"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_name(tmp_path, name, change, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED[name] | change))
    with pytest.raises(ValueError, match=words) as error:
        decoder.read_config(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("scaling", "length"),
    [({}, 2048), ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192)],
)
def test_how_long_texts_may_be(tmp_path, scaling, length):
    settings = json.loads(decoder.config_text(decoder.CONFIGS["smollm2_135m"]))
    settings |= {"max_position_embeddings": 2048, **scaling}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert decoder.read_config(tmp_path).max_length == length


def test_absent_and_damaged_configurations_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        decoder.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        decoder.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json"):
        decoder.read_config(tmp_path)


@pytest.mark.parametrize("scan", [False, True])
def test_the_table_maps_every_entry_once(scan):
    config = dataclasses.replace(cases.CONFIGS["gemma3"], scan_layers=scan)
    rows = decoder.tensors(config)
    size = decoder.num_params(config)
    params = {path: np.zeros(shape, np.int64) for path, shape in decoder.shapes(config).items()}
    at = 0
    for row in rows:
        values = at + np.arange(np.prod(row.shape)).reshape(row.shape)
        row.place(params[row.path], values)
        np.testing.assert_array_equal(row.take(params[row.path]), values)
        at += values.size
    assert at == size
    np.testing.assert_array_equal(
        np.sort(np.concatenate([x.ravel() for x in params.values()])), np.arange(size)
    )
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_the_table_names_and_turns_tensors_as_transformers_does(name):
    config = cases.CONFIGS[name]
    params = flatten(cases.weights(config))
    found = {row.name: cases.signature(row.take(params[row.path])) for row in decoder.tensors(config)}
    expected = dict(zip(RECORD[f"{name}/names"].tolist(), RECORD[f"{name}/signatures"].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_bfloat16_shards_are_read_into_any_dtype(tmp_path):
    params = {path: x.astype(ml_dtypes.bfloat16) for path, x in flatten(cases.weights(TIED)).items()}
    params = unflatten(params)
    decoder.save_hf(params, TIED, tmp_path, shard_bytes=4000)
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {
        name: file.name
        for file in tmp_path.glob("*.safetensors")
        for name in safetensors.numpy.load_file(file)
    }
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 2 * decoder.num_params(TIED)
    same(decoder.load(tmp_path, TIED, dtype=None), params)
    wide = {path: x.astype(np.float32) for path, x in flatten(params).items()}
    same(decoder.load(tmp_path, TIED), unflatten(wide))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(ValueError, match=shards[1]):
        decoder.load(tmp_path, TIED)


@pytest.mark.parametrize(("first", "then"), [(4000, 10**9), (10**9, 4000), (4000, 4000)])
def test_a_model_that_could_not_be_replaced_at_once_is_kept(tmp_path, first, then):
    params = cases.weights(TIED)
    decoder.save_hf(params, TIED, tmp_path, shard_bytes=first)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a model with a model\.safetensors.* another directory"):
        decoder.save_hf(params, TIED, tmp_path, shard_bytes=then)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_layers_of_several_dtypes_are_stacked_in_the_widest(tmp_path):
    stacked = dataclasses.replace(TIED, scan_layers=True)
    decoder.save_hf(cases.weights(TIED), TIED, tmp_path)
    exact = decoder.load(tmp_path, stacked, dtype=None)
    names = [row.name for row in decoder.tensors(stacked) if row.layer == 0]
    rewrite(tmp_path, lambda held: held.update({n: held[n].astype(ml_dtypes.bfloat16) for n in names}))
    for path, x in flatten(decoder.load(tmp_path, stacked, dtype=None)).items():
        assert x.dtype == np.float32
        if path.startswith("layers/"):
            np.testing.assert_array_equal(x[:, 1:], flatten(exact)[path][:, 1:])


def rewrite(path, change):
    held = safetensors.numpy.load_file(path / "model.safetensors")
    change(held)
    safetensors.numpy.save_file(held, path / "model.safetensors")


def test_copies_of_what_is_tied_must_agree(tmp_path):
    params = cases.weights(TIED)
    decoder.save_hf(params, TIED, tmp_path)
    rewrite(tmp_path, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].copy()}))
    same(decoder.load(tmp_path, TIED), params)
    rewrite(tmp_path, lambda held: held.update({"lm_head.weight": held["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        decoder.load(tmp_path, TIED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda held: held.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda held: held.update(extra=np.ones(2, np.float32)), "extra has no place"),
        (
            lambda held: held.update({"model.norm.weight": np.ones(3, np.float32)}),
            r"model\.norm\.weight has shape \(3,\)",
        ),
        (
            lambda held: held.update({"model.norm.weight": np.ones(24, np.int8)}),
            r"model\.norm\.weight has dtype int8",
        ),
    ],
)
def test_checkpoints_of_other_models_are_refused(tmp_path, change, words):
    decoder.save_hf(cases.weights(QWEN2), QWEN2, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        decoder.load(tmp_path, QWEN2)


def test_frequencies_that_old_checkpoints_hold_are_left_alone(tmp_path):
    params = cases.weights(QWEN2)
    decoder.save_hf(params, QWEN2, tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path, lambda held: held.update({name: np.ones(2, np.float32)}))
    same(decoder.load(tmp_path, QWEN2), params)


def test_a_tuned_model_keeps_its_seeds_settings(tmp_path):
    seed, tuned = tmp_path / "seed", tmp_path / "tuned"
    decoder.save_hf(cases.weights(QWEN2), QWEN2, seed)
    known = json.loads((seed / "config.json").read_text()) | {"torch_dtype": "bfloat16", "eos_token_id": 7}
    (seed / "config.json").write_text(json.dumps(known))
    (seed / "tokenizer.json").write_text("{}")
    (seed / "model-00001-of-00001.safetensors").write_text("not to be copied")
    decoder.save_hf(cases.weights(QWEN2), QWEN2, tuned, source=seed)
    assert sorted(p.name for p in tuned.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    found = json.loads((tuned / "config.json").read_text())
    assert found == known | {"torch_dtype": "float32", "dtype": "float32"}


def test_parameters_of_another_config_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"lm_head/kernel has no place"):
        decoder.save_hf(cases.weights(QWEN2), dataclasses.replace(QWEN2, tie_embeddings=True), tmp_path / "x")
    assert not (tmp_path / "x").exists()
