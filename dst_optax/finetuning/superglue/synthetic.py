"""A small, deterministic stand-in for SuperGLUE, for machines without its data.

Rows have the official form, but speak of letters in a row: "k f a q" says that k came first, then f,
and so on. Every answer depends on the order of the letters or on a relation between two parts of the
row; the letters themselves, counted, tell nothing. Labels are balanced.

    boolq    passage "k f a q", question "k before a": true
    cb       premise "k f a q", hypothesis "a f": contradiction ("k a" entailment, "k x" neutral)
    copa     which of two letters came first (question "cause") or last ("effect")
    multirc  which letters came after the one in the question
    record   which letter follows the one in the query at once
    rte      premise "k f a q", hypothesis "k a q": entailment, as its letters are in the same order
    wic      whether the word is followed by the same letter in both sentences
    wsc      "k hit f and it fell" means f, "k hit f and it ran" means k
    axb      rte with the hypothesis turned round or not; axg like rte
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from dst_optax.finetuning.superglue.benchmark import spec

LETTERS = "bcdfghjklmnpqrstvwxz"
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
      {'premise': 'p m v q s', 'hypothesis': 'p q s', 'label': 'entailment', 'idx': 0}
    """
    if split not in spec(task).splits:
        raise ValueError(f"the synthetic {task} has no split {split!r}, only {', '.join(spec(task).splits)}.")
    stream = _distinct(_MAKERS[task], Random(f"{task} {seed}"))
    for name, size in {**SIZES, "train": train_size}.items():
        made = [
            {**next(stream), "idx": i} for i in range(size if name in (split, "validation", "test") else 0)
        ]
        if name == split:
            return [_numbered(task, row) for row in made]
    raise AssertionError(split)


def _distinct(make: Callable[[Random, int], dict[str, Any]], random: Random) -> Iterator[dict[str, Any]]:
    seen, count = set(), 0
    while True:
        row = make(random, count)
        key = repr(row)
        if key not in seen:
            seen.add(key)
            count += 1
            yield row


def _numbered(task: str, row: dict[str, Any]) -> dict[str, Any]:
    if task == "record":
        row["qas"][0]["idx"] = row["idx"]
    return row


def _some(random: Random, low: int = 4, high: int = 5) -> list[str]:
    return random.sample(LETTERS, random.randint(low, high))


def _ordered_pair(random: Random, letters: list[str]) -> tuple[str, str]:
    first, second = sorted(random.sample(range(len(letters)), 2))
    return letters[first], letters[second]


def _boolq(random: Random, count: int) -> dict[str, Any]:
    letters, label = _some(random), count % 2 == 0
    pair = _ordered_pair(random, letters)
    first, second = pair if label else pair[::-1]
    return {"passage": " ".join(letters), "question": f"{first} before {second}", "label": label}


def _cb(random: Random, count: int) -> dict[str, Any]:
    letters, label = _some(random), spec("cb").labels[count % 3]
    pair = list(_ordered_pair(random, letters))
    if label == "contradiction":
        pair.reverse()
    if label == "neutral":
        pair[random.randrange(2)] = random.choice([x for x in LETTERS if x not in letters])
    return {"premise": " ".join(letters), "hypothesis": " ".join(pair), "label": label}


def _copa(random: Random, count: int) -> dict[str, Any]:
    letters, question, label = _some(random), ("cause", "effect")[count % 2], count // 2 % 2
    first, last = _ordered_pair(random, letters)
    answer, other = (first, last) if question == "cause" else (last, first)
    choices = (answer, other) if label == 0 else (other, answer)
    return {
        "premise": " ".join(letters),
        "choice1": choices[0],
        "choice2": choices[1],
        "question": question,
        "label": label,
    }


def _multirc(random: Random, count: int) -> dict[str, Any]:
    del count
    letters = _some(random, 5, 6)
    at = random.randrange(1, len(letters) - 1)
    before, after = random.choice(letters[:at]), random.choice(letters[at + 1 :])
    answers = random.sample([(before, 0), (after, 1)], 2)
    return {
        "passage": {
            "text": " ".join(letters),
            "questions": [
                {
                    "question": f"after {letters[at]}",
                    "answers": [{"text": x, "idx": i, "label": y} for i, (x, y) in enumerate(answers)],
                    "idx": 0,
                }
            ],
        }
    }


def _record(random: Random, count: int) -> dict[str, Any]:
    del count
    letters = _some(random)
    at = random.randrange(len(letters) - 1)
    return {
        "passage": {
            "text": " ".join(letters),
            "entities": [{"start": 2 * i, "end": 2 * i} for i in range(len(letters))],
        },
        "qas": [{"query": f"{letters[at]} @placeholder", "answers": [{"text": letters[at + 1]}]}],
    }


def _rte(random: Random, count: int) -> dict[str, Any]:
    letters, entailed = _some(random), count % 2 == 0
    kept = [letters[i] for i in sorted(random.sample(range(len(letters)), 3))]
    if not entailed:
        i = random.randrange(2)
        kept[i], kept[i + 1] = kept[i + 1], kept[i]
    label = spec("rte").labels[not entailed]
    return {"premise": " ".join(letters), "hypothesis": " ".join(kept), "label": label}


def _wic(random: Random, count: int) -> dict[str, Any]:
    letters, same = _some(random), count % 2 == 0
    at = random.randrange(len(letters) - 1)
    word, follower = letters[at], letters[at + 1]
    others = [x for x in letters if x not in (word, follower)]
    random.shuffle(others)
    if same:
        place = random.randint(0, len(others))
        second = [*others[:place], word, follower, *others[place:]]
    else:
        place = random.randrange(len(others))
        second = [*others[:place], word, *others[place:]]
        second.insert(random.choice([i for i in range(len(second) + 1) if i != place + 1]), follower)
    first, second = " ".join(letters), " ".join(second)
    starts = {"start1": first.index(word), "start2": second.index(word)}
    ends = {"end1": first.index(word) + 1, "end2": second.index(word) + 1}
    return {"word": word, "sentence1": first, "sentence2": second, **starts, **ends, "label": same}


def _wsc(random: Random, count: int) -> dict[str, Any]:
    subject, obj = random.sample(LETTERS, 2)
    verb = random.choice(("ran", "fell"))
    extra = random.sample([x for x in LETTERS if x not in (subject, obj)], 2)
    meant, other = (subject, obj) if verb == "ran" else (obj, subject)
    label = count % 2 == 0
    candidate = meant if label else other
    text = f"{extra[0]} {subject} hit {obj} {extra[1]} and it {verb}"
    target = {
        "span1_text": candidate,
        "span1_index": text.split().index(candidate),
        "span2_text": "it",
        "span2_index": 6,
    }
    return {"text": text, "target": target, "label": label}


def _axb(random: Random, count: int) -> dict[str, Any]:
    row = _rte(random, count)
    if row["label"] == "not_entailment":
        row["hypothesis"] = " ".join(sorted(row["hypothesis"].split(), key=row["premise"].index)[::-1])
    return {"sentence1": row["premise"], "sentence2": row["hypothesis"], "label": row["label"]}


def _axg(random: Random, count: int) -> dict[str, Any]:
    return _rte(random, count)


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
    "axg": _axg,
}
