"""The seqio tasks: what they yield, and that seqio's own evaluator agrees with the metrics."""

import json

import numpy as np
import pytest
from real_data import REAL_DATA, needs_data

seqio = pytest.importorskip("seqio")

from dst_optax.finetuning.tasks.superglue import submission, tasks  # noqa: E402
from dst_optax.finetuning.tasks.superglue.benchmark import MAIN, TASKS  # noqa: E402
from dst_optax.finetuning.tasks.superglue.metrics import METRICS  # noqa: E402
from dst_optax.finetuning.tasks.superglue.sources import Few, HeldOut, SyntheticSource  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402

SOURCE = SyntheticSource(train_size=50)


@pytest.fixture(scope="module")
def names():
    return tasks.register(SOURCE, seqio.ByteVocabulary(), list(TASKS))


@pytest.mark.parametrize("task", MAIN)
def test_right_answers_score_100(task, names):
    provider = seqio.TaskRegistry.get(names[task])
    found = list(provider.get_dataset(None, "validation", shuffle=False, num_epochs=1).as_numpy_iterator())
    texts = [e["targets_pretokenized"].decode() for e in found]
    targets = [
        provider.postprocess_fn(t, example=e, is_target=True) for t, e in zip(texts, found, strict=True)
    ]
    said = [provider.postprocess_fn(t, example=e, is_target=False) for t, e in zip(texts, found, strict=True)]
    if task == "wsc":  # the text is the candidate, right or wrong
        assert set(said) == {1}
        said = targets
    for metric in METRICS[task]:
        assert set(metric(targets, said).values()) == {100.0}
    assert found[0]["inputs"][-1] == 1
    assert (found[0]["inputs"][:-1] - 3).astype(np.uint8).tobytes() == found[0]["inputs_pretokenized"]


@pytest.mark.parametrize("task", MAIN)
def test_a_split_without_labels_is_not_scored(task, names):
    """T5X's eval.gin takes the test split."""
    provider = seqio.TaskRegistry.get(names[task])
    example = next(iter(provider.get_dataset(None, "validation", shuffle=False).as_numpy_iterator()))
    unknown = {**example, "answers": []} if task == "record" else {**example, "label": -1}
    with pytest.raises(ValueError, match=f"{task}: an example has no label.*Score 'validation'"):
        provider.postprocess_fn("", example=unknown, is_target=True)


def test_the_mixture_is_proportional(names):
    mixture = seqio.MixtureRegistry.get("superglue_proportional")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert set(rates) == {names[task] for task in MAIN}
    want = {names[task]: len(tasks.examples(task, "train", SOURCE)) for task in MAIN}
    assert rates == want
    assert want[names["multirc"]] == 100  # two answers a row
    assert want[names["wsc"]] == 25  # true candidates only


def test_record_trains_on_every_answer_and_evaluates_each_query_once():
    class Two:
        def rows(self, task, split):
            return [
                {
                    "query": "q",
                    "passage": "p",
                    "entities": ["a"],
                    "answers": ["a", "b"],
                    "idx": {"passage": 0, "query": 0},
                }
            ]

    assert [e["targets"] for e in tasks.examples("record", "train", Two())] == ["a", "b"]
    assert [e["targets"] for e in tasks.examples("record", "validation", Two())] == ["a"]


def test_an_empty_split_is_refused():
    class Empty:
        def rows(self, task, split):
            return []

    with pytest.raises(ValueError, match="the train split of rte is empty"):
        tasks.examples("rte", "train", Empty())


@pytest.mark.parametrize(
    ("task", "examples", "predictions", "want"),
    [
        ("boolq", [{"idx": 1}, {"idx": 0}], [1, -1], [(0, "false"), (1, "true")]),
        ("cb", [{"idx": 0}], [2], [(0, "neutral")]),
        ("copa", [{"idx": 0}], [1], [(0, 1)]),
        ("rte", [{"idx": 0}], [1], [(0, "not_entailment")]),
        ("wic", [{"idx": 0}], [0], [(0, "false")]),
        ("wsc", [{"idx": 0}], [1], [(0, "True")]),
        ("record", [{"idx/passage": 0, "idx/query": 5}], ["Bob"], [(5, "Bob")]),
    ],
)
def test_submission_lines(task, examples, predictions, want, tmp_path):
    path = submission.write(tmp_path / "out", task, examples, predictions)
    assert path.name == f"{TASKS[task].directory}.jsonl"
    assert [tuple(json.loads(line).values()) for line in path.read_text().splitlines()] == want


@pytest.mark.parametrize(
    ("source", "task", "name"),
    [
        (SOURCE, "rte", "RTE"),
        (HeldOut(SOURCE, 10), "rte", "RTE_validation"),
        (Few(HeldOut(SOURCE, 10), 5), "rte", "RTE_validation"),
        (HeldOut(Few(SOURCE, 20), 10), "rte", "RTE_validation"),
        (HeldOut(SOURCE, 10), "axb", "AX-b"),
    ],
)
def test_predictions_of_the_validation_split_look_like_no_submission(tmp_path, source, task, name):
    data = SuperGlue(source, seqio.ByteVocabulary(), ("rte",))
    assert data.write(tmp_path, task, [{"idx": 0}], [1]) == tmp_path / f"{name}.jsonl"


@pytest.mark.parametrize("decoder_only", [False, True])
def test_an_absent_label_of_cb_is_told(capsys, decoder_only):
    class Without(SyntheticSource):
        def rows(self, task, split):
            return [row for row in super().rows(task, split) if split != "validation" or row["label"] < 2]

    for source, told in ((SOURCE, False), (Without(train_size=50), True)):
        data = SuperGlue(source, seqio.ByteVocabulary(), ("cb",))
        data.register(decoder_only)
        data.check()
        said = capsys.readouterr().out
        assert ("cb validation: no example is 'neutral'" in said) == told
        assert ("answers that are all right score 83.3." in said) == told


def test_submission_of_multirc_is_nested():
    index = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (3, 0, 0)]
    examples = [{"idx/paragraph": np.int32(p), "idx/question": q, "idx/answer": a} for p, q, a in index]
    lines = submission.lines("multirc", examples, [1, 0, 1, -1])
    assert lines == [
        {
            "idx": 0,
            "passage": {
                "questions": [
                    {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                    {"idx": 1, "answers": [{"idx": 0, "label": 1}]},
                ]
            },
        },
        {"idx": 3, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 0}]}]}},
    ]
    json.dumps(lines)


class Folding(seqio.ByteVocabulary):
    """Knows small letters alone."""

    def _encode(self, s):
        return super()._encode(s.lower())


class WithoutUnderscore(seqio.ByteVocabulary):
    def _encode(self, s):
        return super()._encode(s.replace("_", " "))


class FromZero(seqio.ByteVocabulary):
    """Has no token of padding: the first letter is 0."""

    def _encode(self, s):
        return [i - 100 for i in super()._encode(s)]

    def _decode(self, ids):
        return super()._decode([i + 100 for i in ids])


@pytest.mark.parametrize(
    ("vocabulary", "task", "said"),
    [
        (Folding, "boolq", "'false' of the label 'False'"),
        (WithoutUnderscore, "rte", "'not entailment' of the label 'not_entailment'"),
        (FromZero, "rte", "of the label 'entailment'"),
    ],
)
def test_a_vocabulary_that_cannot_spell_the_labels_is_refused(vocabulary, task, said):
    with pytest.raises(ValueError, match=f"{task}: the vocabulary makes .*{said}"):
        tasks.register(SOURCE, vocabulary(), [task])
    other = {"boolq": "rte", "rte": "copa"}[task]
    if vocabulary is not FromZero:
        tasks.register(SOURCE, vocabulary(), [other])


def test_labels_longer_than_what_is_decoded_are_refused():
    suite = SuperGlue(SOURCE, seqio.ByteVocabulary(), ("rte",))
    suite.check(target_length=15)
    with pytest.raises(ValueError, match="'not_entailment' has 14 tokens and an end, but targets only 14"):
        suite.check(target_length=14)


@needs_data
def test_t5s_own_vocabulary_spells_all_labels():
    vocabulary = seqio.SentencePieceVocabulary(str(REAL_DATA / "t5_vocab" / "spiece.model"))
    for task in TASKS:
        tasks.check_labels(task, vocabulary, length=8)
