"""Files, their faults, and the synthetic source."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dst_optax.finetuning.tasks.superglue import synthetic
from dst_optax.finetuning.tasks.superglue.benchmark import MAIN, TASKS, spec
from dst_optax.finetuning.tasks.superglue.sources import (
    Few,
    HeldOut,
    JsonlSource,
    SyntheticSource,
    TfdsSource,
)
from dst_optax.finetuning.tasks.superglue.text import to_text

GOOD = {"premise": "P", "hypothesis": "H", "label": "entailment", "idx": 0}


def write(root: Path, name: str, *lines: str) -> JsonlSource:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return JsonlSource(str(root))


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    bad = [json.dumps({**GOOD, "label": "x"}), '{"premise": ', "[1]", json.dumps({"premise": "P"})]
    source = write(tmp_path, "RTE/train.jsonl", json.dumps(GOOD), *bad)
    with pytest.raises(ValueError, match="4 bad rows") as error:
        source.rows("rte", "train")
    for number in (2, 3, 4, 5):
        assert f"{tmp_path}/RTE/train.jsonl:{number}: " in str(error.value)


def test_rows_that_have_changed_are_read_again(tmp_path):
    source = write(tmp_path, "RTE/train.jsonl", json.dumps(GOOD))
    (row,) = source.rows("rte", "train")
    write(tmp_path, "RTE/train.jsonl", json.dumps({**GOOD, "premise": "changed"}))
    assert source.rows("rte", "train") == [{**row, "premise": "changed"}]


def test_long_lists_of_bad_rows_are_cut_but_counted(tmp_path):
    source = write(tmp_path, "RTE/val.jsonl", *["{}"] * 30)
    with pytest.raises(ValueError, match=r"30 bad rows[^$]*\.\.\. and 20 more"):
        source.rows("rte", "validation")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE/train.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"train.jsonl:2: .*utf-8"):
        JsonlSource(str(tmp_path)).rows("rte", "train")


def record(**change):
    passage = {"text": "Bob ran", "entities": [{"start": 0, "end": 2}]}
    qas = [{"idx": 0, "query": "@placeholder ran", "answers": [{"text": "Bob"}]} | change]
    return {"idx": 0, "passage": passage, "qas": qas}


@pytest.mark.parametrize(
    ("task", "file", "split", "row"),
    [
        ("rte", "RTE/test.jsonl", "test", {**GOOD, "premise": "half \ud83d of a pair"}),
        ("record", "ReCoRD/val.jsonl", "validation", record(answers=[{"text": "A"}, {"text": "Z\udc00"}])),
    ],
)
def test_a_row_that_cannot_be_encoded_is_named_when_it_is_read(tmp_path, task, file, split, row):
    good = record() if task == "record" else GOOD
    source = write(tmp_path, file, json.dumps(good | {"idx": 7}), json.dumps(row))
    with pytest.raises(ValueError, match=rf"{file}:2: .*surrogates not allowed"):
        source.rows(task, split)


def test_rows_of_one_index_are_told(tmp_path):
    rows = [json.dumps(GOOD | {"idx": i}) for i in (3, 4, 3)]
    with pytest.raises(ValueError, match=r"RTE/val\.jsonl:3: the index 3 is already that of line 1"):
        write(tmp_path, "RTE/val.jsonl", *rows).rows("rte", "validation")
    assert len(write(tmp_path, "RTE/train.jsonl", *rows).rows("rte", "train")) == 3  # no one asks there
    answers = [{"idx": i, "text": "a", "label": 0} for i in (0, 1, 0)]
    passage = {"text": "t", "questions": [{"idx": 0, "question": "q", "answers": answers}]}
    source = write(tmp_path, "MultiRC/test.jsonl", json.dumps({"idx": 5, "passage": passage}))
    with pytest.raises(ValueError, match=r"test\.jsonl:1: the index .*'paragraph': 5.* of line 1"):
        source.rows("multirc", "test")


def test_a_pronoun_that_is_not_in_the_text(tmp_path):
    target = {"span1_text": "Bob", "span1_index": 0, "span2_text": "she", "span2_index": 1}
    row = {"text": "Bob ran off", "target": target, "label": True, "idx": 0}
    with pytest.raises(ValueError, match=r"train.jsonl:1: the pronoun 'she' is not a word"):
        write(tmp_path, "WSC/train.jsonl", json.dumps(row)).rows("wsc", "train")


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"RTE/train.jsonl does not exist; download"):
        JsonlSource(str(tmp_path)).rows("rte", "train")
    with pytest.raises(ValueError, match=r"RTE/train.jsonl has no rows"):
        write(tmp_path, "RTE/train.jsonl", "").rows("rte", "train")
    with pytest.raises(ValueError, match="unknown SuperGLUE task 'rtx'"):
        JsonlSource(str(tmp_path)).rows("rtx", "train")
    with pytest.raises(ValueError, match="axb has no split 'train'"):
        JsonlSource(str(tmp_path)).rows("axb", "train")


@pytest.mark.parametrize("task", TASKS)
def test_synthetic_rows_are_official_rows(task, tmp_path):
    split = spec(task).splits[-1]
    rows = synthetic.rows(task, split)
    name = f"{spec(task).directory}/{'test' if split == 'test' else split}.jsonl"
    source = write(tmp_path, name, *map(json.dumps, rows))
    assert source.rows(task, split) == SyntheticSource().rows(task, split)


@pytest.mark.filterwarnings("default")  # TFDS and what it imports speak to other authors
@pytest.mark.parametrize("task", TASKS)
def test_tfds_makes_the_same_examples_of_the_same_files(task, tmp_path, monkeypatch):
    """TFDS's own reader of the official files; only its download and its storage are left out."""
    tfds = pytest.importorskip("tensorflow_datasets")
    glue = pytest.importorskip("tensorflow_datasets.text.super_glue").SuperGlue
    tasks = pytest.importorskip("dst_optax.finetuning.tasks.superglue.tasks")
    split = "train" if task in MAIN else "test"
    path = tmp_path / spec(task).directory / f"{split}.jsonl"
    files = write(tmp_path, f"{path.parent.name}/{path.name}", *map(json.dumps, synthetic.rows(task, split)))

    def stored(value):  # as TFDS gives it back
        if isinstance(value, dict):
            return {name: stored(x) for name, x in value.items()}
        if isinstance(value, list):
            return np.array([x.encode() for x in value], object)
        return value.encode() if isinstance(value, str) else np.int32(value)

    def read(name, **where):
        assert where["split"] == split
        builder = glue.__new__(glue)
        config = {c.name: c for c in glue.BUILDER_CONFIGS}[name.partition("/")[2]]
        builder.__dict__["_builder_config"] = config
        for _, row in builder._generate_examples(str(path), split):
            if row.get("label") in config.label_classes:
                row["label"] = config.label_classes.index(row["label"])
            yield stored(row)

    monkeypatch.setattr(tfds, "data_source", read)
    found = tasks.examples(task, split, TfdsSource())
    assert found == tasks.examples(task, split, files)


@pytest.mark.parametrize("task", MAIN)
def test_synthetic_splits_are_distinct_repeatable_and_independent_of_the_training_size(task):
    texts = {
        split: [to_text(task, row)[0] for row in SyntheticSource(train_size=300).rows(task, split)]
        for split in spec(task).splits
    }
    again = [to_text(task, row)[0] for row in SyntheticSource(train_size=7).rows(task, "validation")]
    assert texts["validation"] == again
    assert not set(texts["train"]) & set(texts["validation"] + texts["test"])
    assert not set(texts["validation"]) & set(texts["test"])
    assert SyntheticSource(seed=1).rows(task, "validation") != SyntheticSource().rows(task, "validation")


@pytest.mark.parametrize("task", ["cb", "multirc"])
def test_held_out_rows_are_neither_trained_on_nor_reported(task):
    source = SyntheticSource(train_size=30)
    train, validation, test = (HeldOut(source, 10).rows(task, s) for s in ("train", "validation", "test"))
    assert train + validation == source.rows(task, "train")
    assert len(validation) == 10
    assert test == source.rows(task, "validation")


def test_held_out_rows_can_be_drawn():
    source = SyntheticSource(train_size=200)
    every = source.rows("cb", "train")
    parts = {seed: HeldOut(source, 50, seed).rows("cb", "validation") for seed in (0, 1)}
    train = HeldOut(source, 50, 0).rows("cb", "train")
    assert sorted([*train, *parts[0]], key=lambda r: r["idx"]) == sorted(every, key=lambda r: r["idx"])
    assert parts[0] == HeldOut(source, 50, 0).rows("cb", "validation")
    assert len(parts[0]) == 50
    assert parts[0] != parts[1]
    assert 5 < sum(row in every[-50:] for row in parts[0]) < 25  # a quarter is expected
    assert HeldOut(source, 50, 0).rows("cb", "test") == source.rows("cb", "validation")


@pytest.mark.parametrize(("task", "text"), [("multirc", "paragraph"), ("record", "passage")])
@pytest.mark.parametrize("rng_seed", [None, 0])
def test_rows_about_one_text_are_held_out_together(task, text, rng_seed):
    class Sorted:
        """Indices with their names in the order of TensorFlow Datasets."""

        def rows(self, task, split):
            rows = SyntheticSource(train_size=40).rows(task, split)
            return [{**row, "idx": dict(sorted(row["idx"].items()))} for row in rows]

    source = Sorted()
    rows = {split: HeldOut(source, 11, rng_seed).rows(task, split) for split in ("train", "validation")}
    texts = {split: {row["idx"][text] for row in part} for split, part in rows.items()}
    assert not texts["train"] & texts["validation"]
    assert sum(map(len, rows.values())) == len(source.rows(task, "train"))
    assert 11 <= len(rows["validation"]) < 20


def test_diagnostics_have_nothing_to_hold_out():
    assert HeldOut(SyntheticSource(), 10).rows("axg", "test") == SyntheticSource().rows("axg", "test")


@pytest.mark.parametrize("size", [0, -1, 30])
def test_a_part_that_cannot_be_held_out_is_told(size):
    with pytest.raises(ValueError, match=f"cb: {size} of 30 training rows cannot be held out"):
        HeldOut(SyntheticSource(train_size=30), size).rows("cb", "train")


@pytest.mark.parametrize("task", [task for task in MAIN if task != "record"])
def test_counted_bytes_tell_nothing_of_a_synthetic_label(task):
    linear = pytest.importorskip("sklearn.linear_model")

    def features(split):
        rows = SyntheticSource(train_size=2000).rows(task, split)
        texts = [f"{to_text(task, row)[0]} {row.get('span1_text', '')}" for row in rows]
        counts = [np.bincount(np.frombuffer(t.encode(), np.uint8), minlength=256) for t in texts]
        return np.stack(counts), [row["label"] for row in rows]

    inputs, labels = features("validation")
    majority = max(Counter(labels).values()) / len(labels)
    assert majority <= 0.6
    model = linear.LogisticRegression(max_iter=3000).fit(*features("train"))
    assert model.score(inputs, labels) <= majority + 0.1


@pytest.mark.parametrize("task", ["cb", "rte"])
def test_few_rows_are_the_beginning_of_more(task):
    source = SyntheticSource(train_size=40)
    few, more = (Few(source, size).rows(task, "train") for size in (8, 20))
    assert few == more[:8]
    every = source.rows(task, "train")
    assert all(row in every for row in more)
    assert len({str(row["idx"]) for row in more}) == 20
    assert Few(source, 8, rng_seed=1).rows(task, "train") != few
    assert Few(source, 8, 0.5).rows(task, "validation") == source.rows(task, "validation")


@pytest.mark.parametrize(("noise", "wrong"), [(0.0, 0), (0.2, 4), (1.0, 20)])
@pytest.mark.parametrize("task", ["cb", "rte"])
def test_so_many_labels_are_wrong_and_nothing_else(task, noise, wrong):
    source = SyntheticSource(train_size=40)
    rows, right = (Few(source, 20, n).rows(task, "train") for n in (noise, 0.0))
    assert sum(a["label"] != b["label"] for a, b in zip(rows, right, strict=True)) == wrong
    assert {row["label"] for row in rows} <= set(range(len(spec(task).labels)))
    assert [row | {"label": 0} for row in rows] == [row | {"label": 0} for row in right]
    assert source.rows(task, "train") == SyntheticSource(train_size=40).rows(task, "train")


@pytest.mark.parametrize(
    ("task", "few", "says"),
    [
        ("cb", {"size": 41}, "cb: 41 training rows were asked for; ask for 1 to 40"),
        ("cb", {"size": 0}, "cb: 0 training rows"),
        ("cb", {"size": 8, "label_noise": 1.5}, "cb: label_noise is 1.5"),
        ("record", {"size": 8, "label_noise": 0.5}, "record has no labels"),
    ],
)
def test_too_few_rows_and_noise_that_is_none(task, few, says):
    with pytest.raises(ValueError, match=says):
        Few(SyntheticSource(train_size=40), **few).rows(task, "train")
