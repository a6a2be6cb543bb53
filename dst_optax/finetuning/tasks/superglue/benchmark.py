"""What SuperGLUE is: its tasks, their labels and the shape of their rows.

The official files nest some examples (a MultiRC paragraph holds many answers). A *flat row* is one
example of a task: text fields by name, ``idx`` (an int or a dict of ints) and ``label`` (an index into
the task's labels, -1 where the test split has none). ReCoRD has ``answers`` instead of a label.

References:
  Wang et al., *SuperGLUE: A Stickier Benchmark for General-Purpose Language Understanding Systems*,
  arXiv 1905.00537.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Spec:
    """One task of the benchmark.

    Attributes:
      directory: its name in the official data and in the submission, e.g. "BoolQ".
      fields: text fields of a flat row, in the order of T5's prompt.
      spoken: their names in T5's prompt, where these are others.
      labels: T5's label words, in the order of label indices.
      official: the labels as the official files spell them, in the same order.
      submitted: the labels as the leaderboard wants them, in the same order.
      prompt: first word of T5's prompt.
      splits: the splits that exist.
    """

    directory: str
    fields: tuple[str, ...]
    labels: tuple[str, ...] = ("False", "True")
    official: tuple[Any, ...] = (False, True)
    submitted: tuple[Any, ...] = ("false", "true")
    prompt: str = ""
    splits: tuple[str, ...] = SPLITS
    spoken: tuple[str, ...] = ()


_ENTAILMENT = ("entailment", "not_entailment")
_CB = ("entailment", "contradiction", "neutral")
_PAIR = ("hypothesis", "premise")

TASKS: Mapping[str, Spec] = {
    "boolq": Spec("BoolQ", ("passage", "question"), prompt="boolq"),
    "cb": Spec("CB", _PAIR, _CB, _CB, _CB, prompt="cb"),
    "copa": Spec(
        "COPA",
        ("choice1", "choice2", "premise", "question"),
        labels=("choice1", "choice2"),
        official=(0, 1),
        submitted=(0, 1),
        prompt="copa",
    ),
    "multirc": Spec(
        "MultiRC", ("question", "answer", "paragraph"), official=(0, 1), submitted=(0, 1), prompt="multirc"
    ),
    "record": Spec("ReCoRD", ("query", "passage"), labels=(), official=(), submitted=(), prompt="record"),
    "rte": Spec("RTE", _PAIR, _ENTAILMENT, _ENTAILMENT, _ENTAILMENT, prompt="rte"),
    "wic": Spec("WiC", ("sentence1", "sentence2", "word"), prompt="wic"),
    "wsc": Spec("WSC", ("text", "span1_text", "span2_text"), submitted=("False", "True"), prompt="wsc"),
    "axb": Spec(
        "AX-b",
        ("sentence2", "sentence1"),
        _ENTAILMENT,
        _ENTAILMENT,
        _ENTAILMENT,
        prompt="rte",
        splits=("test",),
        spoken=_PAIR,
    ),
    "axg": Spec("AX-g", _PAIR, _ENTAILMENT, _ENTAILMENT, _ENTAILMENT, "rte", splits=("test",)),
}
MAIN = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")  # what the average is taken over


def spec(task: str) -> Spec:
    """The task of that name.

    Args:
      task: e.g. "rte".

    Returns:
      Its description.

    Raises:
      ValueError: there is no such task.

    Example:
      >>> spec("rte").directory
      'RTE'
    """
    if task not in TASKS:
        raise ValueError(f"unknown SuperGLUE task {task!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[task]


def flatten(task: str, row: Any, labelled: bool) -> list[dict[str, Any]]:
    """Turns one official row into flat rows, and refuses what does not fit.

    Args:
      task: name of the task.
      row: a line of the official file, decoded.
      labelled: whether labels must be there (train and validation) or may be missing (test).

    Returns:
      One flat row; for MultiRC one per answer, for ReCoRD one per query.

    Raises:
      ValueError: a field is missing or has a wrong type, or a label is not in the task's set.

    Example:
      >>> row = {"premise": "It rained.", "hypothesis": "It was wet.", "label": "entailment", "idx": 3}
      >>> flatten("rte", row, labelled=True)
      [{'hypothesis': 'It was wet.', 'premise': 'It rained.', 'idx': 3, 'label': 0}]
    """
    task_spec = spec(task)
    if task == "multirc":
        return _multirc(row, labelled)
    if task == "record":
        return _record(row, labelled)
    flat = {name: _get(row, name, str) for name in task_spec.fields if task != "wsc"}
    if task == "wsc":
        flat = _wsc(row)
    flat["idx"] = _index(row)
    flat["label"] = _label(task, row, labelled)
    return [flat]


def _get(row: Any, name: str, kind: type) -> Any:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    value = row.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name!r} must be of type {kind.__name__}, got {value!r:.80}")
    return value


def _index(row: Any) -> int:
    value = _get(row, "idx", object)
    if isinstance(value, str) and value.isascii() and value.isdigit():  # AX-b writes "0"
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"'idx' must be of type int and in [0, 2**63), got {value!r:.80}")
    return value


def _label(task: str, row: dict[str, Any], labelled: bool) -> int:
    value = row.get("label")
    if value is None and not labelled:
        return -1
    labels = spec(task).official
    for i, label in enumerate(labels):
        if type(value) is type(label) and value == label:
            return i
    raise ValueError(f"'label' must be one of {', '.join(map(repr, labels))}, got {value!r:.80}")


def _multirc(row: Any, labelled: bool) -> list[dict[str, Any]]:
    passage = _get(row, "passage", dict)
    return [
        {
            "question": _get(question, "question", str),
            "answer": _get(answer, "text", str),
            "paragraph": _get(passage, "text", str),
            "idx": {"paragraph": _index(row), "question": _index(question), "answer": _index(answer)},
            "label": _label("multirc", answer, labelled),
        }
        for question in _get(passage, "questions", list)
        for answer in _get(question, "answers", list)
    ]


def _record(row: Any, labelled: bool) -> list[dict[str, Any]]:
    passage = _get(row, "passage", dict)
    text = _get(passage, "text", str)
    spans = [(_get(e, "start", int), _get(e, "end", int)) for e in _get(passage, "entities", list)]
    if any(not 0 <= start <= end < len(text) for start, end in spans):
        raise ValueError("an entity lies outside the passage")
    flat = []
    for query in _get(row, "qas", list):
        answers = _get(query, "answers", list) if labelled or "answers" in query else []
        if labelled and not answers:
            raise ValueError(f"query {query.get('idx')!r} has no answers")
        flat.append(
            {
                "query": _get(query, "query", str),
                "passage": text,
                "entities": sorted({text[start : end + 1] for start, end in spans}),
                "answers": sorted({_get(answer, "text", str) for answer in answers}),
                "idx": {"passage": _index(row), "query": _index(query)},
            }
        )
    return flat


def _wsc(row: Any) -> dict[str, Any]:
    text, target = _get(row, "text", str), _get(row, "target", dict)
    flat: dict[str, Any] = {"text": text}
    for span in ("span1", "span2"):
        index = _get(target, f"{span}_index", int)
        if not 0 <= index < len(text.split()):
            raise ValueError(f"'{span}_index' is {index}, but the text has {len(text.split())} words")
        flat[f"{span}_text"] = _as_in_text(_get(target, f"{span}_text", str), text, index)
        flat[f"{span}_index"] = index
    return flat


def _as_in_text(span: str, text: str, index: int) -> str:
    """Spells a span as the text does: some official spans differ in case, full stops or line breaks."""
    if span in text or not span:
        return span
    letter = re.search(r"\w", text.split()[index])
    first = span[0].lower() if letter and letter[0].islower() else span[0].upper()
    return (first + span[1:]).rstrip(".").replace("\n", " ")
