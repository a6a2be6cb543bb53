"""A small, deterministic stand-in for SuperGLUE, for machines without its data.

Rows have the official form, but tell one kind of story: "cf b hit k z" says that b hit k; the letters
around it mean nothing. The one who is hit falls, the other runs. Every answer depends on the order of
the two names or on a relation between two parts of the row; bytes, counted, tell little or nothing of
it. Labels are balanced.

    boolq    passage "cf b hit k z", question "b hit k": True, "k hit b": False
    cb       hypothesis "b hit k": entailment, "k hit b": contradiction, "b hit m": neutral
    copa     choices "b" and "k": who ran (question "cause"), or who fell (question "effect")
    multirc  question "fell" or "ran", answer "b" or "k"
    record   query "@placeholder hit k": b, "b hit @placeholder": k
    rte      hypothesis "b hit k": entailment, "k hit b": not_entailment
    wic      whether the word has the same part in both sentences
    wsc      "cf b hit k z and it fell": it is k, "and it ran": it is b
    axb      like rte; axg likewise
"""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any

from dst_optax.finetuning.tasks.superglue.benchmark import flatten, spec
from dst_optax.finetuning.tasks.superglue.text import to_text

NAMES = "bdkm"
LETTERS = "cfghjlnpqrstvwxz"
DEEDS = ("ran", "fell")
LIMIT = 200_000  # rows to try
SIZES = {"validation": 256, "test": 256, "train": 20_000}


def rows(task: str, split: str, seed: int = 0, train_size: int = SIZES["train"]) -> list[dict[str, Any]]:
    """Official rows of one split; no row is in two splits.

    Args:
      task: name of the task.
      split: "train", "validation" or "test".
      seed: another seed makes other rows.
      train_size: rows of the training split; the other splits do not depend on it.

    Returns:
      The rows; those of the test split have labels too.

    Example:
      >>> rows("rte", "train")[0]
      {'premise': 'gg b hit d g', 'hypothesis': 'b hit d', 'label': 'entailment', 'idx': 0}
    """
    if split not in spec(task).splits:
        raise ValueError(f"the synthetic {task} has no split {split!r}, only {', '.join(spec(task).splits)}.")
    stream = _distinct(task, Random(f"{task} {seed}"))
    for name, size in {**SIZES, "train": train_size}.items():
        if name == split:
            return [_numbered(row, i) for i, row in enumerate(islice(stream, size))]
        if name != "train":  # leave out what belongs to the other splits
            list(islice(stream, size))
    raise AssertionError(split)


def _distinct(task: str, random: Random) -> Iterator[dict[str, Any]]:
    """Rows that have no inputs in common."""
    seen: set[str] = set()
    for count in range(LIMIT):
        row = _MAKERS[task](random, len(seen))
        texts = {to_text(task, flat)[0] for flat in flatten(task, _numbered(row, count), labelled=True)}
        if not texts & seen:
            seen |= texts
            yield row
    raise ValueError(f"there are not so many distinct synthetic rows of {task}; lower train_size.")


def _numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    if "qas" in row:
        row = {**row, "qas": [{**row["qas"][0], "idx": index}]}
    return {**row, "idx": index}


def _story(random: Random) -> tuple[str, str, str]:
    """Who hit whom, and the text."""
    a, b = random.sample(NAMES, 2)
    x, y, z = random.choices(LETTERS, k=3)
    return a, b, f"{x}{y} {a} hit {b} {z}"


def _claim(a: str, b: str, true: bool) -> str:
    return f"{a} hit {b}" if true else f"{b} hit {a}"


def _boolq(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    label = count % 2 == 0
    return {"passage": text, "question": _claim(a, b, label), "label": label}


def _cb(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    other = random.choice([x for x in NAMES if x not in (a, b)])
    neutral = random.choice((_claim(a, other, True), _claim(other, b, True)))
    claims = (_claim(a, b, True), _claim(a, b, False), neutral)
    return {"premise": text, "hypothesis": claims[count % 3], "label": spec("cb").labels[count % 3]}


def _copa(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    effect, label = count % 2, count // 2 % 2
    choices = (a, b) if effect == label else (b, a)
    return {
        "premise": text,
        "choice1": choices[0],
        "choice2": choices[1],
        "question": ("cause", "effect")[effect],
        "label": label,
    }


def _multirc(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    deed = count // 2 % 2
    answers = random.sample([(a, 1 - deed), (b, deed)], 2)
    question = {
        "question": DEEDS[deed],
        "answers": [{"text": x, "idx": i, "label": y} for i, (x, y) in enumerate(answers)],
        "idx": 0,
    }
    return {"passage": {"text": text, "questions": [question]}}


def _record(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    entities = [{"start": text.index(x), "end": text.index(x)} for x in (a, b)]
    query, answer = ((f"@placeholder hit {b}", a), (f"{a} hit @placeholder", b))[count % 2]
    return {
        "passage": {"text": text, "entities": entities},
        "qas": [{"query": query, "answers": [{"text": answer}]}],
    }


def _rte(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    label = spec("rte").labels[count % 2]
    return {"premise": text, "hypothesis": _claim(a, b, count % 2 == 0), "label": label}


def _wic(random: Random, count: int) -> dict[str, Any]:
    a, b, first = _story(random)
    same, word = count % 2 == 0, random.choice((a, b))
    x, y, z = random.choices(LETTERS, k=3)
    second = f"{x}{y} {_claim(a, b, same)} {z}"
    places = {f"start{i}": s.index(word) for i, s in ((1, first), (2, second))}
    places |= {f"end{i}": s.index(word) + 1 for i, s in ((1, first), (2, second))}
    return {"word": word, "sentence1": first, "sentence2": second, **places, "label": same}


def _wsc(random: Random, count: int) -> dict[str, Any]:
    a, b, text = _story(random)
    deed, label = random.randrange(2), count % 2 == 0
    candidate = b if label == bool(deed) else a
    text = f"{text} and it {DEEDS[deed]}"
    target = {
        "span1_text": candidate,
        "span1_index": text.split().index(candidate),
        "span2_text": "it",
        "span2_index": text.split().index("it"),
    }
    return {"text": text, "target": target, "label": label}


def _axb(random: Random, count: int) -> dict[str, Any]:
    row = _rte(random, count)
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]}


_MAKERS: dict[str, Callable[[Random, int], dict[str, Any]]] = {
    "boolq": _boolq,
    "cb": _cb,
    "copa": _copa,
    "multirc": _multirc,
    "record": _record,
    "rte": _rte,
    "wic": _wic,
    "wsc": _wsc,
    "axb": _axb,
    "axg": _rte,
}
