"""Checkpoints: what comes in is what was written, by whom ever; what does not fit is refused."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import t5_cases as cases
import tensorstore as ts
from flax import serialization

from dst_optax.finetuning.models import t5
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.models.t5 import huggingface

CONFIG = cases.CONFIGS["v1_1"]
TIED = cases.CONFIGS["v1_0"]
PARAMS = cases.weights(CONFIG)
FLAT = t5.parameters.flatten(PARAMS)


def assert_same(found, expected=PARAMS):
    def check(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(check, found, expected)


def hf_tensors(config):
    """A Hugging Face checkpoint in memory, by their names."""
    flat = t5.parameters.flatten(cases.weights(config))
    turned = ("/kernel", "/rel_embedding")
    return {
        huggingface.name_of(p): np.ascontiguousarray(x.T if p.endswith(turned) else x)
        for p, x in flat.items()
    }


def write_hf(path, tensors, config=CONFIG):
    """A directory as the hub has them; without a config its file can be loaded alone."""
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(huggingface._config_json(config, "float32")))
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path if config is not None else path / "model.safetensors"


def write_sharded(path, tensors, shards=3):
    names = sorted(tensors)
    (path / "config.json").write_text(json.dumps(huggingface._config_json(CONFIG, "float32")))
    files = {f"model-{i:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, path / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in files.items() for n in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_t5x(path, params, in_msgpack=(), version=3):
    """T5X's legacy format: msgpack of small arrays and of the specifications of zarr directories."""
    path.mkdir(parents=True)

    def leaf(name, x):
        if name in in_msgpack:
            return x
        where = f"target.{name.replace('/', '.')}/"
        spec = {
            "driver": "zarr",
            "dtype": x.dtype.name,
            "kvstore": {"driver": "file", "path": str(path / where)},
            "metadata": {
                "shape": x.shape,
                "chunks": [max(1, d // 2) for d in x.shape],
                "compressor": {"id": "gzip"},
            },
        }
        ts.open(spec, create=True).result().write(x).result()
        return spec | {"kvstore": {"driver": "gfile", "path": where}}

    flat = {name: leaf(name, x) for name, x in t5.parameters.flatten(params).items()}
    optimizer = {"target": t5.parameters.unflatten(flat), "state": {"step": np.int32(7), "param_states": {}}}
    (path / "checkpoint").write_bytes(serialization.to_bytes({"version": version, "optimizer": optimizer}))
    return path


def write_orbax(path, params, ocdbt=True):
    tree = {
        "target": params,
        "state": {"step": np.int32(7), "param_states": {"x": {"v": np.ones(3)}, "y": None}},
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    ocp.Checkpointer(handler).save(path / "state", args=ocp.args.PyTreeSave(tree))
    return path


def scalable(params):
    """Parameters as T5X's scalable T5 has them: stacked, heads apart, a bias in each layer."""
    flat = {}
    for path, x in t5.parameters.flatten(t5.stack_layers(params)).items():
        stack, *rest = path.split("/")
        if rest[0] == "relpos_bias":
            path = f"{stack}/{stack}/relpos_bias/rel_embedding"
            x = np.stack([x] * 2, axis=1)
        elif path.endswith(("query/kernel", "key/kernel", "value/kernel")):
            x = x.reshape(*x.shape[:2], CONFIG.num_heads, CONFIG.head_dim)
        elif path.endswith("out/kernel"):
            x = np.moveaxis(x, 1, 0).reshape(2, CONFIG.num_heads, CONFIG.head_dim, -1)
            x = np.moveaxis(x, 0, 1)
        flat[path] = np.ascontiguousarray(x)
    return t5.parameters.unflatten(flat)


@pytest.mark.parametrize("name", cases.CONFIGS)
@pytest.mark.parametrize("scan", [False, True])
def test_hugging_face_round_trip(tmp_path, name, scan):
    config = dataclasses.replace(cases.CONFIGS[name], scan_layers=scan)
    params = cases.weights(config)
    t5.save_hf(params, config, tmp_path / "new" / "model")
    assert_same(t5.load(tmp_path / "new" / "model", config), params)
    assert_same(t5.load(tmp_path / "new" / "model" / "model.safetensors", config), params)
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("scan", [False, True])
def test_large_models_are_saved_in_shards(tmp_path, scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    t5.save_hf(PARAMS, CONFIG, tmp_path, shard_bytes=5000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(t5.load(tmp_path, config), t5.stack_layers(PARAMS) if scan else PARAMS)


def test_hugging_face_shards(tmp_path):
    assert_same(t5.load(write_sharded(tmp_path, hf_tensors(CONFIG)), CONFIG))
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00001-of-00003\.safetensors is missing"):
        t5.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "index",
    ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 1}}'],
)
def test_a_broken_index_is_named(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json"):
        t5.load(tmp_path, CONFIG)


def test_repeated_embeddings_must_be_the_embedding(tmp_path):
    tensors = hf_tensors(TIED)
    repeats = {name: tensors["shared.weight"].copy() for name in huggingface.COPIES}
    unused = {huggingface.UNUSED: np.ones((32, 2), np.float32)}
    write_hf(tmp_path, tensors | repeats | unused, TIED)
    assert_same(t5.load(tmp_path, TIED), cases.weights(TIED))
    repeats["lm_head.weight"][3, 3] += 1
    write_hf(tmp_path, tensors | repeats, TIED)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from shared\.weight"):
        t5.load(tmp_path, TIED)


def test_bfloat16_is_kept_or_widened(tmp_path):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    t5.save_hf(halves, CONFIG, tmp_path)
    assert_same(t5.load(tmp_path, CONFIG, dtype=None), halves)
    assert_same(t5.load(tmp_path, CONFIG), jax.tree.map(lambda x: x.astype(np.float32), halves))
    t5.save_hf(PARAMS, CONFIG, tmp_path)
    assert_same(t5.load(tmp_path, CONFIG, dtype=jnp.bfloat16), halves)


@pytest.mark.parametrize("scan", [False, True])
def test_t5x_legacy(tmp_path, scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    in_msgpack = ("encoder/encoder_norm/scale", "decoder/decoder_norm/scale")
    path = write_t5x(tmp_path / "checkpoint_7", PARAMS, in_msgpack)
    moved = shutil.move(path, tmp_path / "elsewhere")  # paths inside are relative
    assert_same(t5.load(moved, config), t5.stack_layers(PARAMS) if scan else PARAMS)


def test_t5x_legacy_of_one_file(tmp_path):
    path = write_t5x(tmp_path / "checkpoint_7", PARAMS, in_msgpack=tuple(FLAT))
    assert_same(t5.load(shutil.move(path / "checkpoint", tmp_path / "model.checkpoint_7"), CONFIG))


@pytest.mark.parametrize("as_uint16", [False, True])
def test_t5x_legacy_bfloat16(tmp_path, as_uint16):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    stored = jax.tree.map(lambda x: x.view(np.uint16), halves) if as_uint16 else halves
    path = write_t5x(tmp_path / "c", stored, version=2 if as_uint16 else 3)
    assert_same(t5.load(path, CONFIG, dtype=None), halves)


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_t5x_orbax(tmp_path, ocdbt):
    path = write_orbax(tmp_path / "checkpoint_7", PARAMS, ocdbt)
    assert_same(t5.load(path, CONFIG))
    assert_same(t5.load(path / "state", CONFIG))


def test_t5x_scalable(tmp_path):
    params = scalable(PARAMS)
    assert_same(t5.load(write_t5x(tmp_path / "same", params), CONFIG))
    bias = params["encoder"]["encoder"]["relpos_bias"]["rel_embedding"]
    bias[0, 1, 0] += 1
    with pytest.raises(ValueError, match="encoder/encoder/relpos_bias/rel_embedding differs between layers"):
        t5.load(write_t5x(tmp_path / "other", params), CONFIG)


@pytest.mark.parametrize("write", [write_t5x, write_orbax])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(emb_dim=32), r"decoder/decoder_norm/scale has shape \(16,\), the model's is \(32,\)"),
        (dict(num_encoder_layers=3), "encoder/layers_2/.* is missing"),
        (dict(num_decoder_layers=1), "decoder/layers_1/.* has no place in the model"),
        (dict(logits_via_embedding=True), "decoder/logits_dense/kernel has no place"),
    ],
)
def test_t5x_of_another_model_is_refused(tmp_path, write, wrong, message):
    path = write(tmp_path / "c", PARAMS)
    with pytest.raises(ValueError, match=message) as e:
        t5.load(path, dataclasses.replace(CONFIG, **wrong))
    assert str(path) in str(e.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(vocab_size=64), r"shared\.weight has shape \(48, 16\), the model's is \(64, 16\)"),
        (
            dict(mlp_activations=("relu",)),
            r"encoder\.block\.0\.layer\.1\..*\.wi\.weight is missing",
        ),
        (dict(num_decoder_layers=1), r"decoder\.block\.1\..* has no place in the model"),
        (dict(logits_via_embedding=True), "by the model's configuration they are one tensor"),
    ],
)
def test_hugging_face_of_another_model_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        t5.load(write_hf(tmp_path, hf_tensors(CONFIG), None), dataclasses.replace(CONFIG, **wrong))


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        t5.load(tmp_path / "nowhere", CONFIG)
    with pytest.raises(ValueError, match="no T5X or Orbax checkpoint"):
        t5.load(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="save_pretrained"):
        t5.load(tmp_path, CONFIG)
    whole_numbers = hf_tensors(CONFIG) | {"shared.weight": np.ones((48, 16), np.int32)}
    with pytest.raises(ValueError, match=r"shared\.weight has dtype int32"):
        t5.load(write_hf(tmp_path, whole_numbers), CONFIG)


def test_a_missing_or_damaged_tensorstore_is_named(tmp_path):
    path = write_t5x(tmp_path / "c", PARAMS)
    where = path / "target.encoder.relpos_bias.rel_embedding"
    (where / "0.0").write_bytes(b"junk")
    with pytest.raises(ValueError, match="encoder/relpos_bias/rel_embedding cannot be read"):
        t5.load(path, CONFIG)
    shutil.rmtree(where)
    with pytest.raises(ValueError, match="encoder/relpos_bias/rel_embedding cannot be read"):
        t5.load(path, CONFIG)


def test_a_damaged_orbax_checkpoint_is_named(tmp_path):
    path = write_orbax(tmp_path / "c", PARAMS)
    for file in (path / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"/state.* cannot be read"):
        t5.load(path, CONFIG)
    (path / "state" / "_METADATA").write_text("{")
    with pytest.raises(
        ValueError, match="/state cannot be read as a checkpoint: ValueError: its _METADATA is damaged"
    ):
        t5.load(path, CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    write_hf(root / "hf", hf_tensors(CONFIG))
    write_t5x(root / "t5x", PARAMS, in_msgpack=tuple(FLAT))
    return [root / "hf" / "model.safetensors", root / "t5x" / "checkpoint"]


FLIPS = st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 255)), max_size=3)


@hypothesis.settings(max_examples=60)
@hypothesis.given(kind=st.integers(0, 1), cut=st.floats(0, 0.999), flips=FLIPS)
def test_damaged_files_are_refused_or_read(files, kind, cut, flips):
    content = bytearray(files[kind].read_bytes())
    for at, mask in flips:
        content[at] ^= mask
    if not flips:
        content = content[: int(cut * len(content))]
    damaged = files[kind].with_name("damaged.safetensors" if kind == 0 else "damaged")
    damaged.write_bytes(content)
    if flips:  # a changed value cannot be told
        with contextlib.suppress(ValueError):
            found = t5.load(damaged, CONFIG)
            assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, PARAMS)
    else:
        with pytest.raises(ValueError, match=re.escape(str(damaged))):
            t5.load(damaged, CONFIG)


def test_saving_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    t5.save_hf(PARAMS, CONFIG, tmp_path)

    def fail(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        t5.save_hf(jax.tree.map(np.zeros_like, PARAMS), CONFIG, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(t5.load(tmp_path, CONFIG))


def test_saving_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="does not fit the config"):
        t5.save_hf(PARAMS, dataclasses.replace(CONFIG, num_encoder_layers=3), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("config", [*cases.CONFIGS.values(), *cases.VARIANTS.values()])
def test_the_shape_comes_from_config_json(tmp_path, config):
    params = cases.weights(config)
    t5.save_hf(params, config, tmp_path)
    assert t5.config_of(tmp_path) == language_model(str(tmp_path)).config == config
    assert_same(t5.load(tmp_path, dataclasses.replace(config, dropout_rate=0.5)), params)
    described = json.loads((tmp_path / "config.json").read_text())
    described |= {"scale_decoder_outputs": described.pop("tie_word_embeddings"), "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(described))  # as transformers 5 does
    assert t5.config_of(tmp_path) == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"feed_forward_proj": "gated-silu"},
            r"mlp_activations is \('silu', 'linear'\) there and \('gelu', 'l",
        ),
        ({"relative_attention_max_distance": 64}, "relpos_max_distance is 64 there and 128 here"),
        ({"layer_norm_epsilon": 1e-2}, r"norm_epsilon is 0\.01 there and 1e-06 here"),
        ({"tie_word_embeddings": True}, "logits_via_embedding is True there and False here"),
        ({"d_kv": 4, "num_heads": 4}, "num_heads is 4 there and 2 here; head_dim is 4 there and 8 here"),
        ({"pad_token_id": 3}, "pad_token_id is 3"),
        ({"decoder_start_token_id": 2}, "decoder_start_token_id is 2"),
        ({"model_type": "umt5"}, "model_type is 'umt5'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu'"),  # the exact one, which flax's is not
        ({"tie_word_embeddings": None}, "tie_word_embeddings is null"),
    ],
)
def test_a_config_json_of_another_t5_is_refused(tmp_path, change, says):
    t5.save_hf(PARAMS, CONFIG, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(described))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=says):
            t5.load(path, CONFIG)


def test_a_damaged_config_json_is_named(tmp_path):
    t5.save_hf(PARAMS, CONFIG, tmp_path)
    for text in ("", "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json cannot be read"):
            t5.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "wrong", [{"mlp_activations": ("tanh",)}, {"relpos_buckets": 2}, {"relpos_max_distance": 16}]
)
def test_what_could_not_be_exported_is_no_config(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(CONFIG, **wrong)


def test_safetensors_may_have_our_names(tmp_path):
    file = tmp_path / "params.safetensors"  # as a subset that is applied to a run's seed makes it
    safetensors.numpy.save_file({p: np.ascontiguousarray(x) for p, x in FLAT.items()}, file)
    for path in (tmp_path, file):
        assert_same(t5.load(path, CONFIG))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cases.CONFIGS)
def test_transformers_reads_what_is_saved_and_agrees(tmp_path, name):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    config = cases.CONFIGS[name]
    params = cases.weights(config)
    t5.save_hf(params, config, tmp_path / "ours")
    model = cases.hugging_face(tmp_path / "ours")
    x, y_in, y = cases.batch(config)
    theirs = cases.hugging_face_logits(model, x, y_in)
    np.testing.assert_allclose(cases.logits(config, params, x, y_in, y), theirs, atol=1e-4, rtol=0)
    greedy = t5.decode(t5.Transformer(config), params, x, cases.LENGTH, eos_id=cases.EOS[name])
    np.testing.assert_array_equal(greedy, cases.hugging_face_greedy(model, x, cases.EOS[name]))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert_same(t5.load(tmp_path / "theirs", t5.config_of(tmp_path / "theirs")), params)


def test_a_run_starts_from_a_t5x_checkpoint(tmp_path):
    seqio = pytest.importorskip("seqio")
    from few import Few

    from dst_optax import subset
    from dst_optax.finetuning import trainer
    from dst_optax.finetuning.context import RunContext
    from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

    model = dataclasses.replace(CONFIG, vocab_size=384)
    seed = jax.tree.map(np.asarray, cases.weights(model))
    data = SuperGlue(Few(train_size=8), seqio.ByteVocabulary(), ("rte",))
    recipe = trainer.Recipe(steps=2, batch_size=4, lengths={"inputs": 48, "targets": 16}, eval_batch_size=36)
    checkpoint = str(write_t5x(tmp_path / "pretrained", seed))
    context = RunContext(str(tmp_path / "run"), data, model, recipe, checkpoint=checkpoint)
    assert_same(context.seed, seed)
    placed, start = context.place_seed_and_start()
    assert placed is start
    assert_same(jax.tree.map(np.asarray, placed), seed)
    tuned = jax.tree.map(lambda x: x + np.float32(1), seed)
    assert_same(subset.from_models(context.seed, tuned).apply(seed), tuned)  # the fingerprints are equal


def test_another_vocabulary_than_the_checkpoints_own_is_refused(tmp_path):
    seqio, sentencepiece = pytest.importorskip("seqio"), pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2 as pb2

    def train(name, text):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20), model_prefix=str(tmp_path / name), vocab_size=12,
            model_type="char", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        return tmp_path / f"{name}.model"

    one, other = train("one", "abcdefgh"), train("other", "ijklmnop")
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "spiece.model").write_bytes(one.read_bytes())
    model = t5.T5(dataclasses.replace(CONFIG, vocab_size=128))
    model.check(seqio.SentencePieceVocabulary(str(one), extra_ids=100), str(tmp_path / "seed"))
    proto = pb2.ModelProto.FromString(one.read_bytes())
    for i in reversed(range(100)):  # as in T5X's cc_all.32000.100extra
        proto.pieces.add(
            piece=f"\u2581<extra_id_{i}>", score=0.0, type=pb2.ModelProto.SentencePiece.USER_DEFINED
        )
    (tmp_path / "extra.model").write_bytes(proto.SerializeToString())
    model.check(
        seqio.SentencePieceVocabulary(str(tmp_path / "extra.model"), extra_ids=0), str(tmp_path / "seed")
    )
    with pytest.raises(ValueError, match=r"other\.model is not the checkpoint's own, .*: token \d+ is 'i"):
        model.check(seqio.SentencePieceVocabulary(str(other), extra_ids=100), str(tmp_path / "seed"))
