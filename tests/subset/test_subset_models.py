"""Models on disk: which files are the model, what is copied beside a tuned one, tied copies, odd dtypes."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from typer.testing import CliRunner

from dst_optax import subset
from dst_optax.subset import SubsetError, models
from dst_optax.subset_cli import app

SEED = {
    "shared.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "layer.weight": np.ones((3, 3), np.float32),
    "layer.bias": np.zeros(3, np.float32),
}
TUNED = SEED | {"shared.weight": SEED["shared.weight"] + np.eye(4, 3, dtype=np.float32)}
SUBSET = subset.from_models(SEED, TUNED)


def write(file, tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, file)


def write_all(directory, names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"{}")


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
    return json.loads(result.output)


def same(found, expected):
    return sorted(found) == sorted(expected) and all(
        (np.asarray(found[p]) == x).all() and found[p].dtype == x.dtype for p, x in expected.items()
    )


STALE = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"),
    *("flax_model.msgpack", "model.safetensors.index.json", "adapter_model.bin", "adapter_config.json"),
    *("onnx/model.onnx", "onnx/model.onnx_data", "original/consolidated.00.pth", "model-Q8_0.gguf"),
]
KEPT = ["config.json", "tokenizer.model", "merges.txt", "1_Pooling/config.json", "a/b/c.txt"]


def test_only_what_is_no_weight_of_the_seed_is_copied(tmp_path):
    seed, out = tmp_path / "seed", tmp_path / "out"
    write(seed / "model.safetensors", SEED)
    write(seed / "model.fp16.safetensors", {p: x.astype(np.float16) for p, x in SEED.items()})
    write(seed / "adapter_model.safetensors", {"lora_A": np.ones((2, 2), np.float32)})
    write(seed / "fp16" / "model.safetensors", SEED)
    write(seed / "2_Dense" / "model.safetensors", {"linear.weight": np.ones((2, 2), np.float32)})
    write_all(seed, [*STALE, *KEPT, ".git/objects/pack"])
    SUBSET.save(tmp_path / "subset")
    shown = call("apply", "--seed", seed, "--subset", tmp_path / "subset", "--out", out)
    assert same(models.open_model(out), TUNED)
    copied = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert copied == {*KEPT, "model.safetensors", "2_Dense/model.safetensors"}
    others = {"model.fp16.safetensors", "adapter_model.safetensors", "fp16/model.safetensors"}
    assert set(shown["left_out"]) == {*STALE} | others


def test_the_files_of_a_subset_are_no_part_of_the_model_beside_them(tmp_path):
    seed, out = tmp_path / "seed", tmp_path / "out"
    write(seed / "pytorch.safetensors", SEED)
    SUBSET.save(seed)
    shown = call("apply", "--seed", seed, "--subset", seed, "--out", out)
    assert same(models.open_model(out), TUNED)
    assert [f.name for f in out.iterdir()] == ["pytorch.safetensors"]
    assert set(shown["left_out"]) == {"README.md", "subset.safetensors", "subset_config.json"}


def write_shards(directory, count=2, index=True):
    names = sorted(SEED)
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        write(directory / file, {n: SEED[n] for n in names[i::count]})
        if index:
            weights = {
                n: f"model-{i + 1:05}-of-{count:05}.safetensors"
                for i in range(count)
                for n in names[i::count]
            }
            (directory / models.INDEX).write_text(json.dumps({"weight_map": weights}))


def test_the_files_of_a_model_are_those_that_transformers_reads(tmp_path):
    write(tmp_path / "both" / "model.safetensors", SEED)
    write(tmp_path / "both" / "model-00001-of-00001.safetensors", {"old": np.ones(3, np.float32)})
    (tmp_path / "both" / models.INDEX).write_text(
        '{"weight_map": {"old": "model-00001-of-00001.safetensors"}}'
    )
    write(tmp_path / "variant" / "weights.fp16.safetensors", SEED)
    write_shards(tmp_path / "indexed")
    write(tmp_path / "indexed" / "consolidated.safetensors", {"old": np.ones(3, np.float32)})
    write_shards(tmp_path / "shards", index=False)
    for name in ("both", "variant", "indexed", "shards"):
        assert same(models.open_model(tmp_path / name), SEED)
    models.apply_to_files(SUBSET, tmp_path / "indexed", tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", models.INDEX)
    }
    assert same(models.open_model(tmp_path / "out"), TUNED)


def test_a_tensor_that_no_shard_holds_is_missed(tmp_path):
    write_shards(tmp_path)
    index = json.loads((tmp_path / models.INDEX).read_text())
    index["weight_map"]["lost.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / models.INDEX).write_text(json.dumps(index))
    with pytest.raises(SubsetError, match=r"no shard holds 'lost\.weight'"):
        models.open_model(tmp_path)


def test_parts_of_models_and_several_are_refused(tmp_path):
    write(tmp_path / "adapter" / "adapter_model.safetensors", SEED)
    write(tmp_path / "two" / "a.safetensors", SEED)
    write(tmp_path / "two" / "b.safetensors", SEED)
    for name, index, says in (
        ("indexed", True, "00002.safetensors is missing"),
        ("shards", False, "a part of one"),
    ):
        write_shards(tmp_path / name, index=index)
        (tmp_path / name / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(SubsetError, match=says):
            models.open_model(tmp_path / name)
    for name, says in (("adapter", "merge it"), ("two", "a.safetensors, b.safetensors")):
        with pytest.raises(SubsetError, match=says):
            models.open_model(tmp_path / name)
    with pytest.raises(SubsetError, match=r"missing\.safetensors cannot be read"):
        models.open_model(tmp_path / "missing.safetensors")


JAX_SEED = {"decoder": {"norm": {"scale": SEED["layer.bias"]}, "w": SEED["shared.weight"]}}


def test_a_subset_in_other_coordinates_is_refused_by_name(tmp_path):
    ours = subset.from_models(JAX_SEED, jax.tree.map(lambda x: x + 1, JAX_SEED))
    ours.save(tmp_path / "ours")
    write(tmp_path / "hf" / "model.safetensors", SEED)
    for command in (
        ["verify", tmp_path / "ours", "--seed", tmp_path / "hf"],
        ["apply", "--subset", tmp_path / "ours", "--seed", tmp_path / "hf", "--out", tmp_path / "out"],
    ):
        error = call(*command, code=1)["error"]
        assert "JAX ('decoder/norm/scale')" in error
        assert "Hugging Face ('layer.bias')" in error
    assert not (tmp_path / "out").exists()


def test_transformers_finds_no_model_of_its_own_where_jax_names_the_tensors(tmp_path):
    ours = subset.from_models(JAX_SEED, jax.tree.map(lambda x: x + 1, JAX_SEED))
    write(tmp_path / "seed" / "model.safetensors", subset.trees.named_leaves(JAX_SEED))
    models.apply_to_files(ours, tmp_path / "seed", tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["params.safetensors"]
    found = models.open_model(tmp_path / "out")
    assert (found["decoder/w"] == SEED["shared.weight"] + 1).all()


COPY = "decoder.embed_tokens.weight"
WITH = SEED | {COPY: SEED["shared.weight"].copy()}
TUNED_WITH = TUNED | {COPY: TUNED["shared.weight"].copy()}


@pytest.mark.parametrize(
    ("seed", "tuned"), [(SEED, TUNED), (WITH, TUNED_WITH), (SEED, TUNED_WITH), (WITH, TUNED)]
)
@pytest.mark.parametrize("again", [SEED, WITH])
def test_tied_copies_come_and_go(tmp_path, seed, tuned, again):
    for name, tensors in (("seed", seed), ("tuned", tuned), ("again", again)):
        write(tmp_path / name / "model.safetensors", tensors)
    call("extract", "--seed", tmp_path / "seed", "--tuned", tmp_path / "tuned", "--out", tmp_path / "subset")
    assert call("verify", tmp_path / "subset", "--seed", tmp_path / "again")["tensors_compared"] == len(again)
    call("apply", "--seed", tmp_path / "again", "--subset", tmp_path / "subset", "--out", tmp_path / "out")
    assert same(models.open_model(tmp_path / "out"), TUNED if again is SEED else TUNED_WITH)


def test_a_tensor_that_is_no_copy_is_missed(tmp_path):
    untied = TUNED_WITH | {COPY: TUNED["shared.weight"] + 1}
    subset.from_models(WITH, untied).save(tmp_path / "subset")
    write(tmp_path / "model.safetensors", SEED)
    assert COPY in call("verify", tmp_path / "subset", "--seed", tmp_path, code=1)["error"]
    fewer = {p: x for p, x in SEED.items() if p != "layer.bias"}  # all its entries are equal
    subset.from_models(SEED, TUNED).save(tmp_path / "whole")
    write(tmp_path / "model.safetensors", fewer)
    assert "layer.bias" in call("verify", tmp_path / "whole", "--seed", tmp_path, code=1)["error"]


EXPERTS = {f"experts.{i}.weight": SEED["shared.weight"] for i in range(4)}  # an upcycled model's are equal
EXPERTS_TUNED = {name: x + i for i, (name, x) in enumerate(EXPERTS.items())}


def test_siblings_that_begin_equal_are_no_copies(tmp_path):
    last = "experts.3.weight"
    fewer = {name: x for name, x in EXPERTS_TUNED.items() if name != last}
    pruned = dict(list(EXPERTS.items())[:2])
    for name, tensors in (("seed", EXPERTS), ("fewer", fewer), ("pruned", pruned)):
        write(tmp_path / name / "model.safetensors", tensors)
    pair = ("--seed", tmp_path / "seed", "--tuned", tmp_path / "fewer")
    assert last in call("extract", *pair, "--out", tmp_path / "subset", code=1)["error"]
    without = {name: x for name, x in EXPERTS.items() if name != last}
    subset.from_models(without, fewer).save(tmp_path / "subset")
    verify = ("verify", tmp_path / "subset", "--seed")
    assert f"the subset lacks '{last}'" in call(*verify, tmp_path / "seed", code=1)["error"]
    subset.from_models(EXPERTS, EXPERTS).save(tmp_path / "subset")
    assert "the model lacks 'experts.2.weight'" in call(*verify, tmp_path / "pruned", code=1)["error"]


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "C64", "X9"])
def test_a_file_of_an_odd_dtype_is_refused_by_tensor(tmp_path, kind):
    header = json.dumps({"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcd")
    with pytest.raises(SubsetError, match=f"'w' has the dtype '{kind}'"):
        models.open_model(tmp_path)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_floats_of_a_byte_go_the_whole_way(tmp_path, dtype):
    seed = {"w": np.arange(1, 9).astype(dtype).reshape(2, 4)}
    tuned = {"w": (2 * np.arange(1, 9)).astype(dtype).reshape(2, 4)}
    found = subset.from_models(seed, tuned)
    found.save(tmp_path / "subset")
    write(tmp_path / "seed" / "model.safetensors", seed)
    models.apply_to_files(subset.Subset.load(tmp_path / "subset"), tmp_path / "seed", tmp_path / "out")
    assert same(models.open_model(tmp_path / "out"), tuned)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.float4_e2m1fn, np.complex64])
def test_other_dtypes_are_refused_by_path(tmp_path, dtype):
    x = np.ones(4, dtype)
    with pytest.raises(SubsetError, match=f"'w' has the dtype {np.dtype(dtype).name}"):
        SUBSET.check({"w": x})
    entries = subset.Entries((4,), np.array([1]), x[:1])
    with pytest.raises(SubsetError, match="'w' has the dtype"):
        subset.Subset({"w": entries}).save(tmp_path / "s")


def test_random_keys_are_no_parameters():
    model = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        SubsetError, match=r"'rngs/.*key.*' has the dtype key<fry>, which numpy does not have"
    ):
        SUBSET.check(model)


def test_a_tensor_may_be_called_value(tmp_path):
    seed = {"x/value": np.zeros(3, np.float32), "y": np.zeros(2, np.float32)}
    tuned = {"x/value": np.array([0, 1, 0], np.float32), "y": np.ones(2, np.float32)}
    write(tmp_path / "seed.safetensors", seed)
    write(tmp_path / "tuned.safetensors", tuned)
    pair = ("--seed", tmp_path / "seed.safetensors", "--tuned", tmp_path / "tuned.safetensors")
    call("extract", *pair, "--out", tmp_path / "subset")
    call("apply", *pair[:2], "--subset", tmp_path / "subset", "--out", tmp_path / "out")
    assert same(models.open_model(tmp_path / "out" / "seed.safetensors"), tuned)


def test_tensors_that_are_no_floats_are_taken_exactly(tmp_path):
    rng = np.random.default_rng(0)
    seed = {"ids": np.arange(10), "mask": np.zeros((2, 3), bool), "w": rng.normal(size=(10, 10)).astype("f")}
    tuned = {
        "ids": np.arange(10)[::-1].copy(),
        "mask": np.ones((2, 3), bool),
        "w": seed["w"] + rng.normal(size=(10, 10)).astype("f"),
    }
    write(tmp_path / "seed.safetensors", seed)
    write(tmp_path / "tuned.safetensors", tuned)
    pair = ("--seed", tmp_path / "seed.safetensors", "--tuned", tmp_path / "tuned.safetensors")
    call("extract", *pair, "--out", tmp_path / "subset", "--fraction", 0.1)
    found = subset.Subset.load(tmp_path / "subset")
    assert (len(found["ids"]), len(found["mask"]), len(found["w"])) == (10, 6, 10)
    largest = np.sort(np.argsort(-np.abs(tuned["w"] - seed["w"]).ravel())[:10])
    assert found["w"].positions.tolist() == largest.tolist()
