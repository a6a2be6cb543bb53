"""T5's text formats of the SuperGLUE tasks.

Every example becomes ``inputs`` and ``targets``, worded as T5 was trained on them, so that its
checkpoints recognise the tasks.

References:
  Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*,
  arXiv 1910.10683, appendix D.
"""

import re
from collections.abc import Mapping
from typing import Any

from dst_optax.finetuning.tasks.superglue.benchmark import spec

UNKNOWN = "<unk>"  # target of an unlabelled example
_DETERMINERS = frozenset(
    [
        *("a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some", "that"),
        *("the", "their", "these", "this", "those", "which", "whose", "your"),
    ]
)


def to_text(task: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """Words an example as T5 does.

    Args:
      task: name of the task.
      row: a flat row, see :mod:`dst_optax.finetuning.tasks.superglue.benchmark`.

    Returns:
      Inputs and targets; the targets of an unlabelled example are ``<unk>``.

    Example:
      >>> to_text("rte", {"premise": "It rained.", "hypothesis": "It was wet.", "label": 0})
      ('rte hypothesis: It was wet. premise: It rained.', 'entailment')
    """
    if task == "wsc":
        return _wsc_inputs(row), row["span1_text"]
    if task == "record":
        return _record_inputs(row), row["answers"][0] if row["answers"] else UNKNOWN
    task_spec = spec(task)
    names = zip(task_spec.spoken or task_spec.fields, task_spec.fields, strict=True)
    inputs = " ".join([task_spec.prompt, *(f"{spoken}: {row[name]}" for spoken, name in names)])
    if task == "multirc":
        inputs = re.sub("</?b>", "", inputs.replace("<br>", " "))
    return inputs, UNKNOWN if row["label"] < 0 else task_spec.labels[row["label"]]


def label_of(task: str, prediction: str) -> int:
    """The label that a decoded text names.

    Args:
      task: a task with labels.
      prediction: decoded text.

    Returns:
      Index of the label, -1 if the text is none of the task's labels.

    Example:
      >>> label_of("rte", "not_entailment"), label_of("rte", "perhaps")
      (1, -1)
    """
    labels = spec(task).labels
    return labels.index(prediction) if prediction in labels else -1


def names_referent(prediction: str, referent: str) -> int:
    """Whether a WSC prediction means the candidate: the words of one contain those of the other.

    Args:
      prediction: decoded text.
      referent: the candidate of the row.

    Returns:
      1 if it does, 0 if not, -1 for an empty prediction.

    Example:
      >>> names_referent("the fuzzy bunny", "bunny"), names_referent("Bob", "Bob's hat")
      (1, 0)
    """
    said, meant = _content_words(prediction), _content_words(referent)
    if not said:
        return -1
    if any("'" in word for word in said) != any("'" in word for word in meant):
        return 0
    return int(said <= meant or meant <= said)


def _content_words(text: str) -> set[str]:
    return {word for word in text.strip().lower().split() if word not in _DETERMINERS}


def _record_inputs(row: Mapping[str, Any]) -> str:
    passage = re.sub("([.?!\"'])\n@highlight\n", r"\1 ", row["passage"])
    passage = passage.replace("\n@highlight\n", ". ")
    return f"record query: {row['query']} entities: {', '.join(row['entities'])} passage: {passage}"


def _wsc_inputs(row: Mapping[str, Any]) -> str:
    """Marks the pronoun with stars, apart from what sticks to it."""
    text = row["text"]
    word = _nearest(text, row["span2_text"], row["span2_index"])
    before, pronoun, after = word.groups()
    marked = " ".join(part for part in (before, f"*{pronoun}*", after) if part)
    return f"wsc: {text[: word.start()]}{marked}{text[word.end() :]}"


def _nearest(text: str, pronoun: str, index: int) -> re.Match[str]:
    """The word that is the pronoun, but for punctuation and endings such as ``'s``: the nearest to the index.

    Its groups are what stands before the pronoun, the pronoun, and what stands behind it.
    """
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    matches: list[re.Match[str]] = []
    for spelled in (pronoun, re.sub(r"^\W+|\W+$", "", pronoun)):
        if spelled and not matches:
            before, after = r"(?<!\S)((?:\S*[^\w\s])?)", r"((?:[^\w\s]\S*)?)(?!\S)"
            matches = list(re.finditer(f"{before}({re.escape(spelled)}){after}", text))
    if not matches:
        raise ValueError(f"the pronoun {pronoun!r} is not a word of the text {text!r:.200}")
    return min(matches, key=lambda word: abs(starts.index(word.start()) - index))
