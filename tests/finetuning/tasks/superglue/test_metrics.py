"""Metrics against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst_optax.finetuning.tasks.superglue import metrics

sklearn = pytest.importorskip("sklearn.metrics")


def pairs(labels, invalid=True):
    said = st.integers(-1 if invalid else 0, labels - 1)
    return st.lists(st.tuples(st.integers(0, labels - 1), said), min_size=1, max_size=60)


@given(pairs(3))
def test_accuracy_and_macro_f1(both):
    t, p = map(list, zip(*both, strict=True))
    assert metrics.accuracy(t, p)["accuracy"] == pytest.approx(100 * sklearn.accuracy_score(t, p))
    want = sklearn.f1_score(t, p, labels=range(3), average="macro", zero_division=0)
    assert metrics.macro_f1(t, p)["f1"] == pytest.approx(100 * want)


@given(pairs(2), st.integers(1, 5))
def test_multirc(both, size):
    labels, said = map(list, zip(*both, strict=True))
    targets = [{"label": x, "group": (i // size, 0)} for i, x in enumerate(labels)]
    valid = [p if p >= 0 else 1 - t for t, p in both]
    want = sklearn.f1_score(labels, valid, zero_division=0)
    assert metrics.f1_over_answers(targets, said)["f1a"] == pytest.approx(100 * want)
    groups = [both[i : i + size] for i in range(0, len(both), size)]
    want = np.mean([all(t == p for t, p in group) for group in groups])
    assert metrics.exact_questions(targets, said)["em"] == pytest.approx(100 * want)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(pairs(2))
def test_matthews(both):
    t, p = map(list, zip(*both, strict=True))
    valid = [b if b >= 0 else 1 - a for a, b in both]
    want = sklearn.matthews_corrcoef(t, valid)
    assert metrics.matthews(t, p)["matthews"] == pytest.approx(100 * want, abs=1e-9)


WORDS = st.lists(st.sampled_from(["red", "sox", "Boston", "york"]), max_size=4).map(" ".join)


@given(WORDS, WORDS)
def test_record_f1_is_that_of_word_indicators_and_ignores_case_articles_and_punctuation(answer, said):
    got = metrics.record([[answer]], [said])
    a, s = answer.lower().split(), said.lower().split()
    common = sum(min(a.count(w), s.count(w)) for w in set(a))
    precision, recall = (common / len(s) if s else 0), (common / len(a) if a else 0)
    want = 2 * precision * recall / (precision + recall) if common else 0
    assert got == {"f1": pytest.approx(100 * want), "em": 100.0 * (a == s)}
    assert metrics.record([[f"The {answer.upper()}!"]], [said]) == got


def test_record_takes_the_best_answer():
    assert metrics.record([["a b", "c"], ["d"]], ["c", "x"]) == {"f1": 50.0, "em": 50.0}


def test_gender_parity():
    assert metrics.gender_parity([], [0, 0, 1, 0]) == {"gender_parity": 50.0}


def test_the_average_wants_all_eight():
    scores = {task: float(i) for i, task in enumerate(metrics.MAIN)}
    assert metrics.superglue_average(scores) == 3.5
    assert metrics.superglue_average({**scores, "axb": 99.0}) == 3.5
    assert metrics.superglue_average({"rte": 1.0}) is None
    assert metrics.score({"f1": 80.0, "accuracy": 90.0}) == 85.0
