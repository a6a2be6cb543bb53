"""Span corruption: nothing of a chunk is lost but what the targets have, and faults of texts and settings."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

seqio = pytest.importorskip("seqio")
pytest.importorskip("tensorflow")

from dst_optax.finetuning import inputs, placement  # noqa: E402
from dst_optax.finetuning.evaluator import Evaluator  # noqa: E402
from dst_optax.finetuning.models import t5  # noqa: E402
from dst_optax.finetuning.recipe import Recipe  # noqa: E402
from dst_optax.finetuning.tasks.span_corruption import SpanCorruption  # noqa: E402

BYTES = seqio.ByteVocabulary(extra_ids=100)
TEXT = "".join(f"Line {i} of a text with some words.\n" for i in range(60))


def restored(inputs, targets):
    """What was corrupted, by an independent reading: each sentinel of the inputs gives way to its span."""
    is_mark = lambda token: token >= BYTES.vocab_size - BYTES.extra_ids  # noqa: E731
    spans, whole = {}, []
    for token in targets.tolist():
        if is_mark(token):
            spans[mark := token] = []
        else:
            spans[mark].append(token)
    for token in inputs.tolist():
        whole += spans.pop(token) if is_mark(token) else [token]
    assert not spans
    return whole


@given(
    st.integers(2, 300),
    st.floats(0.01, 0.9),
    st.floats(1.0, 10.0),
    st.integers(0, 2**31 - 1),
)
@settings(deadline=None, max_examples=200)
def test_inputs_and_targets_hold_every_token_once(tokens, density, mean, number):
    data = SpanCorruption("", BYTES, tokens, density, mean)
    try:
        lost, spans = data.noise
    except ValueError:
        return
    chunk = np.arange(tokens, dtype=np.int32) % 150 + 3
    inputs, targets = data.example(chunk, number)
    assert restored(inputs, targets) == chunk.tolist()
    assert (len(inputs), len(targets)) == (tokens - lost + spans, lost + spans)
    assert inputs.dtype == targets.dtype == np.int32
    marks = BYTES.vocab_size - 1 - np.arange(spans)
    assert [t for t in targets if t in marks] == [t for t in inputs if t in marks] == marks.tolist()


def written(directory, **texts):
    for name, text in texts.items():
        (directory / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(directory)


def test_chunks_are_the_text_in_order_and_each_is_corrupted_anew(tmp_path):
    data = SpanCorruption(written(tmp_path, b=TEXT[900:], a=TEXT[:900]), BYTES, 64, validation_size=5)
    train, validation = data.chunks("train"), data.chunks("validation")
    every = np.concatenate([train, validation]).ravel().tolist()
    assert BYTES.decode(every) == TEXT[: len(every)]
    assert len(validation) == 5
    assert data.register() == "span_corruption"
    task = seqio.TaskRegistry.get("span_corruption")
    lengths = {"inputs": 64, "targets": 32}
    examples = {
        split: list(task.get_dataset(lengths, split=split, shuffle=False).as_numpy_iterator())
        for split in ("train", "validation")
    }
    assert len(examples["train"]) == 10 * len(train)
    assert len(examples["validation"]) == 5
    first, again = (examples["train"][i * len(train)] for i in (0, 1))
    for one in (first, again):
        assert one["inputs"][-1] == one["targets"][-1] == BYTES.eos_id
        assert restored(one["inputs"][:-1], one["targets"][:-1]) == train[0].tolist()
    assert first["inputs"].tolist() != again["inputs"].tolist()
    assert first["inputs"].tolist()[:-1] == data.example(train[0], 0)[0].tolist()
    path = data.write(tmp_path, "span_corruption", examples["validation"], ["x"] * 5)
    assert json.loads(path.read_text().splitlines()[0])["prediction"] == "x"


def test_scores_of_what_was_trained_on(tmp_path):
    data = SpanCorruption(written(tmp_path, a=TEXT), BYTES, 64, validation_size=5, corruptions=1)
    data.register()
    model, recipe = (
        t5.T5(replace(t5.CONFIGS["tiny"], vocab_size=384)),
        Recipe(1, lengths={"inputs": 58, "targets": 14}),
    )
    params = model.init(jax.random.key(0))
    for split, kind in (("train", "train"), ("validation", "eval")):
        metrics, score = Evaluator(model, data, recipe, placement.make_mesh()).score(params, split)
        assert set(metrics) == {f"{kind}/span_corruption/{name}" for name in ("token_accuracy", "perplexity")}
        assert score == metrics[f"{kind}/span_corruption/token_accuracy"]


def test_examples_are_shuffled_before_they_are_made(tmp_path):
    made = []

    class Watched(SpanCorruption):
        def example(self, chunk, number):
            made.append(number)
            return super().example(chunk, number)

    data = Watched(written(tmp_path, a=TEXT), BYTES, 64, validation_size=5)
    task = seqio.TaskRegistry.get(data.register())

    def drawn(**order):
        dataset = task.get_dataset({"inputs": 64, "targets": 32}, split="train", **order)
        return (tuple(example["inputs"].tolist()) for example in dataset.as_numpy_iterator())

    next(drawn(shuffle=True, seed=0))
    total = 10 * len(data.chunks("train"))
    assert 0 < len(made) < total / 2
    unshuffled, one, again, other = (
        list(drawn(**order))
        for order in ({"shuffle": False}, *[{"shuffle": True, "seed": seed} for seed in (0, 0, 1)])
    )
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(unshuffled)
    assert one != unshuffled


def test_the_lengths_of_the_first_examples_are_counted(tmp_path):
    data = SpanCorruption(written(tmp_path, a=TEXT), BYTES, 64, validation_size=5)
    name, total = data.register(), 10 * len(data.chunks("train"))
    for most, seen in ((7, 7), (total, total), (total + 1, total)):
        found = inputs.count_cut(
            t5.T5(t5.CONFIGS["tiny"]), name, "train", {"inputs": 57, "targets": 14}, most
        )
        assert found == (seen, {"inputs": (seen, 58), "targets": (0, 14)})


@pytest.mark.parametrize(
    ("texts", "settings", "says"),
    [
        ({}, {}, r"has no \*\.txt"),
        ({"a": b"\xff\xfe"}, {}, r"a\.txt: .*utf-8"),
        ({"a": TEXT}, {"tokens": 1000}, "validation_size is 64, but .* has 2 chunks of 1000 tokens"),
        ({"a": TEXT}, {"noise_density": 0.0}, "0 of 568 tokens would be lost"),
        ({"a": TEXT}, {"noise_density": 1.0}, "568 of 568 tokens would be lost"),
        ({"a": TEXT}, {"tokens": 4000}, "loses 200 spans, but ByteVocabulary has only 100 extra_ids"),
    ],
)
def test_bad_texts_and_settings(tmp_path, texts, settings, says):
    with pytest.raises(ValueError, match=says):
        SpanCorruption(written(tmp_path, **texts), BYTES, **settings).register()


def test_a_decoder_and_targets_that_would_be_cut(tmp_path):
    data = SpanCorruption(written(tmp_path, a=TEXT), BYTES, 64, validation_size=5)
    with pytest.raises(ValueError, match="the model is decoder-only"):
        data.register(decoder_only=True)
    data.check(14)
    with pytest.raises(ValueError, match="make 58 inputs and 14 targets, but targets have a length of 13"):
        data.check(13)
