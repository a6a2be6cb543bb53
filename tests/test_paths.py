"""Paths that know object stores, and what is written and read by them."""

import pathlib

import numpy as np
import pytest
from object_store import bucket  # noqa: F401

from dst_optax import paths, subset
from dst_optax.subset import SubsetError, files, models

SEED = {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
TUNED = SEED | {"a": SEED["a"] + np.eye(6, dtype=np.float32)[2]}


@pytest.mark.parametrize("name", ["runs/cb", "/runs/cb", "gs:/bucket/cb"])
def test_local_paths_are_pathlibs(name):
    assert paths.as_path(name) == paths.as_path(pathlib.Path(name)) == pathlib.Path(name)
    assert paths.is_local(paths.as_path(name))


def test_an_object_is_written_and_found(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    path = paths.as_path(bucket) / "runs" / "x.json"
    assert str(path) == f"{bucket}/runs/x.json"
    assert paths.as_path(path) == path
    assert not paths.is_local(path)
    assert not path.exists()
    paths.write_files(path.parent, {path.name: b"1"})
    paths.write_files(path.parent, {path.name: b"22"})
    assert path.read_bytes() == b"22"
    assert [str(p) for p in path.parent.glob("*")] == [str(path)]
    assert not list(tmp_path.iterdir())


def test_an_unknown_store_is_refused():
    with pytest.raises(ValueError, match=r"nowhere://x.*gs://"):
        paths.as_path("nowhere://x")


def test_a_subset_lives_in_a_store(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    subset.from_models(SEED, TUNED).save(f"{bucket}/subset")
    found = subset.Subset.load(f"{bucket}/subset")
    assert found.count == 1
    np.testing.assert_array_equal(found.apply(SEED)["a"], TUNED["a"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SubsetError, match=f"{bucket}/other/{files.CONFIG} cannot be read"):
        subset.Subset.load(f"{bucket}/other")
    monkeypatch.setattr(files, "MAX_CONFIG", 10)
    with pytest.raises(SubsetError, match="at most 10"):
        subset.Subset.load(f"{bucket}/subset")


def test_models_in_a_store_that_cannot_be_mapped_are_refused(bucket, tmp_path):  # noqa: F811
    paths.write_files(paths.as_path(bucket), {"model.safetensors": b""})
    with pytest.raises(SubsetError, match=f"{bucket}/model.safetensors lies in an object store"):
        models.open_model(f"{bucket}/model.safetensors")
    with pytest.raises(SubsetError, match="write a local directory"):
        models.apply_to_files(subset.from_models(SEED, TUNED), tmp_path, f"{bucket}/out")


def test_the_command_line_takes_paths_of_a_store(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    runner = pytest.importorskip("typer.testing").CliRunner()
    from dst_optax.cli import app

    subset.from_models(SEED, TUNED).save(f"{bucket}/subset")
    assert runner.invoke(app, ["subset", "verify", f"{bucket}/subset"]).exit_code == 0
    out = runner.invoke(app, ["subset", "compose", f"{bucket}/subset", "--out", f"{bucket}/composed"])
    assert out.exit_code == 0, out.output
    assert subset.Subset.load(f"{bucket}/composed").count == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["superglue", "jsonl", "gsm8k"])
def test_data_lie_in_a_store(bucket, kind):  # noqa: F811
    for needed in ("seqio", "tensorflow"):
        pytest.importorskip(needed)
    from dst_optax.finetuning.tasks.gsm8k import Gsm8k
    from dst_optax.finetuning.tasks.jsonl import Jsonl
    from dst_optax.finetuning.tasks.superglue.sources import JsonlSource

    rows = {
        "superglue": ("CB/train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "neutral", "idx": 0}'),
        "jsonl": ("train.jsonl", '{"prompt": "1+1=", "completion": "2"}'),
        "gsm8k": ("test.jsonl", '{"question": "1+1?", "answer": "#### 2"}'),
    }
    read = {
        "superglue": lambda: JsonlSource(bucket).rows("cb", "train"),
        "jsonl": lambda: Jsonl(bucket, None).pairs("train"),
        "gsm8k": lambda: Gsm8k(bucket, None).pairs("test"),
    }
    name, row = rows[kind]
    with pytest.raises(ValueError, match=f"{bucket}/.*does not exist"):
        read[kind]()
    paths.write_files(paths.as_path(bucket), {name: row.encode()})
    assert len(read[kind]()) == 1
