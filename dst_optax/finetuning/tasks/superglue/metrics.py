"""SuperGLUE's official metrics, in percent.

A prediction that is none of the task's labels (-1) is wrong. The names are the leaderboard's; the
score of a task is the mean of its metrics and the SuperGLUE average the mean of the eight scores.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dst_optax.finetuning.tasks.superglue.benchmark import MAIN

Scores = dict[str, float]


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> Scores:
    """Share of right predictions.

    Example:
      >>> accuracy([0, 1, 1, 0], [0, 1, 0, -1])
      {'accuracy': 50.0}
    """
    return {"accuracy": 100.0 * float(np.mean(np.asarray(targets) == np.asarray(predictions)))}


def macro_f1(targets: Sequence[int], predictions: Sequence[int], classes: int = 3) -> Scores:
    """Mean over classes of F1; a class that is neither there nor predicted has 0.

    Example:
      >>> round(macro_f1([0, 1, 2], [0, 1, 1])["f1"], 1)
      55.6
    """
    return {"f1": float(np.mean([_f1(targets, predictions, label) for label in range(classes)]))}


def f1_over_answers(targets: Sequence[Any], predictions: Sequence[int]) -> Scores:
    """MultiRC's F1a: F1 of the label 1 over all answers.

    Args:
      targets: ``{"label": int, "group": question}`` of each answer.
      predictions: labels; -1 counts as the wrong one.
    """
    labels = [t["label"] for t in targets]
    predicted = [p if p in (0, 1) else 1 - t for t, p in zip(labels, predictions, strict=True)]
    return {"f1a": _f1(labels, predicted, 1)}


def exact_questions(targets: Sequence[Any], predictions: Sequence[int]) -> Scores:
    """MultiRC's EM: share of questions all of whose answers are labelled rightly.

    Args:
      targets: ``{"label": int, "group": question}`` of each answer.
      predictions: labels.
    """
    right: dict[Any, bool] = defaultdict(lambda: True)
    for target, prediction in zip(targets, predictions, strict=True):
        right[target["group"]] &= target["label"] == prediction
    return {"em": 100.0 * float(np.mean(list(right.values())))}


def record(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> Scores:
    """ReCoRD's F1 over words and EM, each the best over the answers of a query.

    Example:
      >>> record([["the Red Sox", "Sox"]], ["Red Sox."])
      {'f1': 100.0, 'em': 100.0}
    """
    pairs = [
        ([normalize(answer) for answer in answers], normalize(prediction))
        for answers, prediction in zip(targets, predictions, strict=True)
    ]
    return {
        "f1": 100.0
        * float(np.mean([max(_word_f1(answer, said) for answer in answers) for answers, said in pairs])),
        "em": 100.0 * float(np.mean([said in answers for answers, said in pairs])),
    }


def matthews(targets: Sequence[int], predictions: Sequence[int]) -> Scores:
    """AX-b's Matthews correlation of two labels; -1 counts as the wrong one.

    Example:
      >>> matthews([0, 1, 1, 0], [0, 1, 1, 0])
      {'matthews': 100.0}
    """
    t = np.asarray(targets)
    p = np.asarray(predictions)
    p = np.where(p < 0, 1 - t, p)
    covariance = np.mean(t * p) - np.mean(t) * np.mean(p)
    spread = np.std(t) * np.std(p)
    return {"matthews": 100.0 * float(covariance / spread) if spread else 0.0}


def gender_parity(targets: Sequence[int], predictions: Sequence[int]) -> Scores:
    """AX-g's gender parity: share of consecutive pairs, which differ in a pronoun, answered alike."""
    del targets
    pairs = np.asarray(predictions[: len(predictions) // 2 * 2]).reshape(-1, 2)
    return {"gender_parity": 100.0 * float(np.mean(pairs[:, 0] == pairs[:, 1]))}


def score(metrics: Mapping[str, float]) -> float:
    """The score of a task: the mean of its metrics.

    Example:
      >>> score({"accuracy": 90.0, "f1": 80.0})
      85.0
    """
    return float(np.mean(list(metrics.values())))


def superglue_average(scores: Mapping[str, float]) -> float | None:
    """The mean score of the eight tasks; None unless all are there.

    Example:
      >>> superglue_average({task: 50.0 for task in MAIN})
      50.0
    """
    return float(np.mean([scores[task] for task in MAIN])) if set(MAIN) <= set(scores) else None


def normalize(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single blanks.

    Example:
      >>> normalize("The  Red-Sox.")
      'redsox'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(targets: Sequence[int], predictions: Sequence[int], label: int) -> float:
    t, p = np.asarray(targets) == label, np.asarray(predictions) == label
    both = 2 * np.sum(t & p)
    return 100.0 * float(both / (np.sum(t) + np.sum(p))) if both else 0.0


def _word_f1(answer: str, said: str) -> float:
    a, s = answer.split(), said.split()
    common = sum((Counter(a) & Counter(s)).values())
    return 2 * common / (len(a) + len(s)) if common else 0.0


METRICS: Mapping[str, tuple[Any, ...]] = {
    "boolq": (accuracy,),
    "cb": (accuracy, macro_f1),
    "copa": (accuracy,),
    "multirc": (f1_over_answers, exact_questions),
    "record": (record,),
    "rte": (accuracy,),
    "wic": (accuracy,),
    "wsc": (accuracy,),
    "axb": (matthews,),
    "axg": (accuracy, gender_parity),
}
