"""SuperGLUE in plain words, for decoder-only models: a prompt, and options that may continue it.

Options begin with a space, where most tokenizers divide words.

References:
  Gao et al., *A framework for few-shot language model evaluation*, whose wording this mostly is.
"""

import re
from collections.abc import Mapping
from typing import Any

_YES = (" no", " yes")
_ENTAILMENT = (" True", " False")


def to_prompt(task: str, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    r"""Words an example as a prompt.

    Args:
      task: name of the task.
      row: a flat row, see :mod:`dst_optax.finetuning.tasks.superglue.benchmark`.

    Returns:
      The prompt, and the options in the order of label indices; ReCoRD's are its entities.

    Example:
      >>> to_prompt("rte", {"premise": "It rained.", "hypothesis": "It was wet."})
      ('It rained.\nQuestion: It was wet. True or False?\nAnswer:', (' True', ' False'))
      >>> row = {"premise": "I ran.", "question": "cause", "choice1": "I was late.", "choice2": "It rained."}
      >>> to_prompt("copa", row)
      ('I ran because', (' I was late.', ' it rained.'))
    """
    match task:
        case "boolq":
            return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", _YES
        case "cb":
            question = f"{_sentence(row['hypothesis'])} True, False or Neither?"
            return f"{row['premise']}\nQuestion: {question}\nAnswer:", (" True", " False", " Neither")
        case "rte" | "axg":
            return _entailment(row["premise"], row["hypothesis"])
        case "axb":
            return _entailment(row["sentence1"], row["sentence2"])
        case "copa":
            link = {"cause": "because", "effect": "so"}[row["question"]]
            choices = tuple(" " + _continued(row[name]) for name in ("choice1", "choice2"))
            return f"{row['premise'].strip().rstrip('.')} {link}", choices
        case "wic":
            question = f"Is the word '{row['word']}' used in the same way in the two sentences above?"
            sentences = f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}"
            return f"{sentences}\nQuestion: {question}\nAnswer:", _YES
        case "wsc":
            question = f'In the passage above, does "{row["span2_text"]}" refer to "{row["span1_text"]}"?'
            return f"{row['text']}\nQuestion: {question}\nAnswer:", _YES
        case "multirc":
            paragraph = re.sub("</?b>", "", row["paragraph"].replace("<br>", " "))
            asked = f"Question: {row['question']}\nAnswer: {row['answer']}"
            return f"{paragraph}\n{asked}\nIs the answer correct?", _YES
        case "record":
            passage = row["passage"].replace("\n@highlight\n", "\n- ")
            asked = f"Who or what is @placeholder in: {row['query']}"
            return f"{passage}\nQuestion: {asked}\nAnswer:", tuple(f" {name}" for name in row["entities"])
    raise ValueError(f"unknown SuperGLUE task {task!r}.")


def _entailment(premise: str, hypothesis: str) -> tuple[str, tuple[str, ...]]:
    return f"{premise}\nQuestion: {_sentence(hypothesis)} True or False?\nAnswer:", _ENTAILMENT


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _continued(text: str) -> str:
    """A sentence as it goes on after a conjunction; "I" stays as it is."""
    first, *rest = text.strip().split(" ")
    return " ".join([first if re.match(r"I\b", first) else first[:1].lower() + first[1:], *rest])
