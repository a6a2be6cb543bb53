"""The command line, on sharded safetensors, and the documented reader."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from dst_optax import subset
from dst_optax.subset import Subset, SubsetError, files, models
from dst_optax.subset_cli import app

SHAPES = {"model.embed.weight": (40, 8), "model.layer.0.weight": (8, 8), "model.norm": (8,), "scale": ()}


def save_sharded(directory, tensors):
    """As transformers does: two files, an index, a configuration."""
    directory.mkdir()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, chosen in shards.items():
        part = {n: tensors[n] for n in chosen}
        (directory / file).write_bytes(safetensors.numpy.save(part, {"format": "pt"}))
    weight_map = {n: file for file, chosen in shards.items() for n in chosen}
    (directory / models.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "toy"}')


@pytest.fixture
def disk(tmp_path):
    rng = np.random.default_rng(0)
    types = [np.float32, ml_dtypes.bfloat16, np.float16, np.float32]
    pairs = zip(SHAPES.items(), types, strict=True)
    seed = {p: np.asarray(rng.normal(size=s).astype(t)) for (p, s), t in pairs}
    for name in "ab":
        tuned = {
            p: np.asarray(np.where(rng.random(x.shape) < 0.2, x * 2, x).astype(x.dtype))
            for p, x in seed.items()
        }
        save_sharded(tmp_path / name, tuned)
    save_sharded(tmp_path / "seed", seed)
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.output)


def test_names_are_shown_as_they_are(tmp_path):
    """Rich would take brackets for its markup."""
    seed = {"[/foo]": np.zeros(3), "l[x=1].weight": np.zeros(3)}
    subset.from_models(seed, {p: x + 1 for p, x in seed.items()}).save(tmp_path / "sub[lr=1e-3]")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "sub[lr=1e-3]")], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    shown = "".join(result.output.split())  # long titles are wrapped
    assert all(name in shown for name in [*seed, "sub[lr=1e-3]"])


def test_the_whole_way(disk):
    for name in "ab":
        made = call("extract", "--seed", disk / "seed", "--tuned", disk / name, "--out", disk / f"s{name}")
    made = call(
        *("extract", "--seed", disk / "seed", "--tuned", disk / "a", "--out", disk / "small"),
        *("--fraction", 0.05, "--with-seed-values"),
    )
    assert 0 < made["entries"] <= 0.05 * 393 + 4
    assert call("inspect", disk / "small")["seed_values"]
    call("apply", "--seed", disk / "seed", "--subset", disk / "sa", "--out", disk / "out")
    for file in (disk / "a").iterdir():
        assert (disk / "out" / file.name).read_bytes() == file.read_bytes()
    shown = call("inspect", disk / "sa")
    assert (
        shown["entries"] == sum(r["entries"] for r in shown["leaves"]) == sum(shown["magnitudes"]["counts"])
    )
    found = call("diff", disk / "sa", disk / "sb")
    assert 0 < found["jaccard"] < 1
    assert not found["identical"]
    assert call("diff", disk / "sa", disk / "sa")["identical"]
    both = call("compose", disk / "sa", disk / "sb", "--out", disk / "both", "--on-conflict", "mean")
    assert both["entries"] == Subset.load(disk / "sa").union(Subset.load(disk / "sb")).count
    assert call("verify", disk / "sa", "--seed", disk / "seed")["tensors_compared"] == 4
    for arguments in (["inspect", disk / "sa"], ["diff", disk / "sa", disk / "sb"], ["verify", disk / "sa"]):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        assert len(result.output) > 20


@pytest.mark.parametrize("encoding", ["gaps", "raw"])
@pytest.mark.parametrize("with_seed_values", [False, True])
def test_inspect_counts_the_bytes_that_are_stored(tmp_path, encoding, with_seed_values):
    seed = {"w": np.zeros((4, 10), np.float32), "b": np.zeros(3, np.float32)}
    tuned = seed | {"w": np.eye(4, 10, dtype=np.float32)}
    subset.from_models(seed, tuned, with_seed_values=with_seed_values).save(tmp_path, encoding)
    stored = safetensors.numpy.load_file(tmp_path / files.TENSORS)
    rows = {row["tensor"]: row for row in call("inspect", tmp_path)["leaves"]}
    assert rows["w"]["bytes"] == sum(x.nbytes for x in stored.values())
    assert rows["w"]["bits_per_position"] == 8 * stored["w.positions"].nbytes / 4
    assert rows["b"]["bytes"] == rows["b"]["bits_per_position"] == 0


def test_inspect_hides_no_entry(tmp_path):
    seed = {"w": np.array([1, 1, 1, np.inf, -0.0, 0], np.float32)}
    tuned = {"w": np.array([3, np.nan, np.inf, -np.inf, 0.0, 0], np.float32)}
    for stored, zero in ((True, 1), (False, 1)):
        subset.from_models(seed, tuned, with_seed_values=stored).save(tmp_path)
        shown = call("inspect", tmp_path)["magnitudes"]
        assert shown == {"decades": [0], "counts": [1], "zero": zero, "nonfinite": 3}
        result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
        assert "inf or NaN" in result.output


def test_a_seed_of_which_nothing_could_be_compared_is_not_verified(disk):
    call("extract", "--seed", disk / "seed", "--tuned", disk / "a", "--out", disk / "sa")
    known = Subset.load(disk / "sa")
    forgotten = {p: dataclasses.replace(e, seed_fingerprint=None) for p, e in known.items()}
    Subset({**known, "scale": forgotten["scale"]}).save(disk / "some")
    Subset(forgotten).save(disk / "none")
    found = call("verify", disk / "some", "--seed", disk / "seed")
    assert (found["tensors_compared"], found["tensors"]) == (3, 4)
    shown = CliRunner().invoke(app, ["verify", str(disk / "some"), "--seed", str(disk / "seed")]).output
    assert "3 tensors of the seed agree, 1 without a fingerprint were not compared" in shown
    assert "nothing of" in call("verify", disk / "none", "--seed", disk / "seed", code=1)["error"]
    assert call("verify", disk / "none")["tensors_compared"] == 0


def test_errors_say_which_directory_is_meant(disk):
    zeros = {"w": np.zeros(3, np.float32)}
    for name, seed in (("one", zeros), ("two", zeros), ("three", {"w": zeros["w"] + 1})):
        subset.from_models(seed, {"w": seed["w"] + 2}).save(disk / name)
    names = [disk / name for name in ("one", "two", "three")]
    error = call("compose", *names, "--out", disk / "both", code=1)["error"]
    assert "subsets 1 and 3 are of different seeds" in error
    assert f"subset 3: {disk / 'three'}" in error
    assert f"subset 2: {disk / 'three'}" in call("diff", disk / "one", disk / "three", code=1)["error"]
    (disk / "two" / files.CONFIG).write_text("{")
    assert str(disk / "two" / files.CONFIG) in call("compose", *names, "--out", disk / "b", code=1)["error"]


def test_errors_have_exit_codes(disk):
    call("extract", "--seed", disk / "seed", "--tuned", disk / "a", "--out", disk / "sa")
    assert "not the seed's" in call("verify", disk / "sa", "--seed", disk / "a", code=1)["error"]
    wrong = ["apply", "--seed", disk / "a", "--subset", disk / "sa", "--out", disk / "out"]
    assert "not the seed's" in call(*wrong, code=1)["error"]
    assert not (disk / "out").exists()
    taken = ["apply", "--seed", disk / "seed", "--subset", disk / "sa", "--out", disk / "b"]
    assert "exists" in call(*taken, code=1)["error"]
    content = (disk / "sa" / files.TENSORS).read_bytes()
    (disk / "sa" / files.TENSORS).write_bytes(content[:-1] + b"x")
    assert "damaged" in call("verify", disk / "sa", code=1)["error"]
    two = [str(disk / "sa"), str(disk / "sa"), "--out", str(disk / "both")]
    for wrong in (["inspect"], ["compose", *two, "--on-conflict", "sum"]):
        assert CliRunner().invoke(app, wrong).exit_code == 2


def test_models_are_mapped_not_read(disk):
    found = models.open_model(disk / "seed")
    assert sorted(found) == sorted(SHAPES)
    assert all(not x.flags.owndata for x in found.values())
    assert all(not x.flags.writeable for x in found.values())
    (disk / "seed" / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(SubsetError, match="model-00001"):
        models.open_model(disk / "seed")
    with pytest.raises(SubsetError, match="no safetensors"):
        models.open_model(disk)


@pytest.mark.parametrize("name", ["../b/model-00001-of-00002.safetensors", "/etc/passwd", 3])
def test_an_index_names_no_files_elsewhere(disk, name):
    index = disk / "seed" / models.INDEX
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weights, "scale": name}}))
    with pytest.raises(SubsetError, match=models.INDEX):
        models.open_model(disk / "seed")


def test_documented_reader(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    text = (root / "docs" / "subset_files.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    (code,) = [block for block in blocks if "def read_subset" in block]
    lines = [x for x in code.splitlines() if x.strip() and not x.startswith(("import", "from"))]
    assert len(lines) <= 20
    scope = {}
    exec(code, scope)
    rng = np.random.default_rng(0)
    sizes = {"a": 400_000, "b": 3, "c": 129, "d": 40}
    shares = {"a": 0.5, "b": 1.0, "c": 0.4, "d": 0.0}
    seed = {p: rng.normal(size=n).astype(np.float32) for p, n in sizes.items()}
    tuned = {p: np.where(rng.random(x.shape) < shares[p], -x, x) for p, x in seed.items()}
    tuned["a"][1000:390_000] = seed["a"][1000:390_000]
    tuned["a"][391_000:] = -seed["a"][391_000:]
    found = subset.from_models(seed, tuned)
    found.save(tmp_path)
    read = dict(scope["read_subset"](tmp_path))
    assert sorted(read) == ["a", "b", "c"]
    for path, (shape, positions, values) in read.items():
        assert tuple(shape) == found[path].shape
        assert positions.tolist() == found[path].positions.tolist()
        assert values.tolist() == found[path].values.tolist()
    long = np.flatnonzero(rng.random(3_000_000) < 0.1)
    assert (scope["decode"](np.frombuffer(subset.gaps.encode(long), np.uint8)) == long).all()
