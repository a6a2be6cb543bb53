"""Predictions in the form that the SuperGLUE leaderboard takes: ``RTE.jsonl`` and so on."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dst_optax.atomic import atomic_file
from dst_optax.finetuning.tasks.superglue.benchmark import spec


def lines(
    task: str, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]
) -> list[dict[str, Any]]:
    """The lines of the file, in the order of the index.

    Args:
      task: name of the task.
      examples: with ``idx``, ``idx/paragraph`` and so on, as the seqio task yields them.
      predictions: of the seqio task's ``postprocess_fn``; -1, no label, becomes the first label.

    Returns:
      One object a line.

    Example:
      >>> lines("wsc", [{"idx": 1}, {"idx": 0}], [1, 0])
      [{'idx': 0, 'label': 'False'}, {'idx': 1, 'label': 'True'}]
    """
    task_spec = spec(task)
    if task == "record":
        entries = [
            {"idx": int(e["idx/query"]), "label": p} for e, p in zip(examples, predictions, strict=True)
        ]
        return sorted(entries, key=lambda line: line["idx"])
    labels = [task_spec.submitted[max(int(p), 0)] for p in predictions]
    if task == "multirc":
        return _multirc(examples, labels)
    entries = [{"idx": int(e["idx"]), "label": label} for e, label in zip(examples, labels, strict=True)]
    return sorted(entries, key=lambda line: line["idx"])


def write(
    directory: str | Path,
    task: str,
    examples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Any],
    split: str = "test",
) -> Path:
    """Writes ``<directory>/<TASK>.jsonl``, or ``<TASK>_<split>.jsonl``, which is no submission.

    Args:
      directory: is made if need be.
      task: name of the task.
      examples: see :func:`lines`.
      predictions: see :func:`lines`.
      split: the official one that was predicted.

    Returns:
      The path of the file.
    """
    name = spec(task).directory if split == "test" else f"{spec(task).directory}_{split}"
    path = Path(directory) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines(task, examples, predictions))
    with atomic_file(path) as temporary:
        temporary.write_text(text)
    return path


def _multirc(examples: Sequence[Mapping[str, Any]], labels: Sequence[Any]) -> list[dict[str, Any]]:
    tree: dict[int, dict[int, dict[int, Any]]] = {}
    for e, label in zip(examples, labels, strict=True):
        questions = tree.setdefault(int(e["idx/paragraph"]), {})
        questions.setdefault(int(e["idx/question"]), {})[int(e["idx/answer"])] = label
    return [
        {
            "idx": paragraph,
            "passage": {
                "questions": [
                    {
                        "idx": question,
                        "answers": [{"idx": i, "label": x} for i, x in sorted(answers.items())],
                    }
                    for question, answers in sorted(questions.items())
                ]
            },
        }
        for paragraph, questions in sorted(tree.items())
    ]
