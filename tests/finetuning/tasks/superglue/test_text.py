"""T5's text formats: fixed wordings, and what holds for any row."""

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import REAL_DATA, needs_data

from dst_optax.finetuning.tasks.superglue.benchmark import MAIN, TASKS, flatten, spec
from dst_optax.finetuning.tasks.superglue.text import UNKNOWN, label_of, names_referent, to_text

WORDINGS = {
    "boolq": (
        {"passage": "P p.", "question": "is q", "label": True, "idx": 0},
        ("boolq passage: P p. question: is q", "True"),
    ),
    "cb": (
        {"premise": "P", "hypothesis": "H", "label": "neutral", "idx": 0},
        ("cb hypothesis: H premise: P", "neutral"),
    ),
    "copa": (
        {"premise": "P", "choice1": "A", "choice2": "B", "question": "cause", "label": 1, "idx": 0},
        ("copa choice1: A choice2: B premise: P question: cause", "choice2"),
    ),
    "multirc": (
        {
            "idx": 0,
            "passage": {
                "text": "<b>Sent 1: </b>A<br>B",
                "questions": [{"idx": 0, "question": "Q", "answers": [{"text": "R", "idx": 0, "label": 1}]}],
            },
        },
        ("multirc question: Q answer: R paragraph: Sent 1: A B", "True"),
    ),
    "record": (
        {
            "idx": 0,
            "passage": {
                "text": "Ann met Bob.\n@highlight\nThey ate\n@highlight\nend",
                "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}, {"start": 0, "end": 2}],
            },
            "qas": [{"idx": 0, "query": "@placeholder ate", "answers": [{"text": "Bob"}]}],
        },
        ("record query: @placeholder ate entities: Ann, Bob passage: Ann met Bob. They ate. end", "Bob"),
    ),
    "rte": (
        {"premise": "P", "hypothesis": "H", "label": "not_entailment", "idx": 0},
        ("rte hypothesis: H premise: P", "not_entailment"),
    ),
    "wic": (
        {"word": "w", "sentence1": "S", "sentence2": "T", "label": False, "idx": 0},
        ("wic sentence1: S sentence2: T word: w", "False"),
    ),
    "wsc": (
        {
            "text": 'Bob hit Tom. "Why him?" he said.',
            "target": {"span1_text": "Tom", "span1_index": 2, "span2_text": "him", "span2_index": 3},
            "label": True,
            "idx": 0,
        },
        ('wsc: Bob hit Tom. "Why *him* ?" he said.', "Tom"),
    ),
    "axb": (
        {"sentence1": "S", "sentence2": "T", "label": "entailment", "idx": "7", "logic": ""},
        ("rte hypothesis: T premise: S", "entailment"),
    ),
    "axg": (
        {"premise": "P", "hypothesis": "H", "label": "entailment", "idx": 0},
        ("rte hypothesis: H premise: P", "entailment"),
    ),
}
WORD = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
SENTENCE = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize("task", TASKS)
def test_words_as_t5_does(task):
    row, want = WORDINGS[task]
    assert to_text(task, flatten(task, row, labelled=True)[0]) == want


@pytest.mark.parametrize("task", ["boolq", "cb", "copa", "rte", "wic", "axb", "axg"])
@given(data=st.data())
def test_every_field_stands_once_in_order_and_the_label_comes_back(task, data):
    known = spec(task)
    fields = {name: data.draw(SENTENCE) for name in known.fields}
    label = data.draw(st.integers(0, len(known.labels) - 1))
    row = {**fields, "label": known.official[label], "idx": data.draw(st.integers(0, 10**6))}
    (flat,) = flatten(task, row, labelled=True)
    inputs, targets = to_text(task, flat)
    rest = inputs.removeprefix(known.prompt)
    for spoken, name in zip(known.spoken or known.fields, known.fields, strict=True):
        head = f" {spoken}: {fields[name]}"
        assert rest.startswith(head)
        rest = rest.removeprefix(head)
    assert rest == ""
    assert label_of(task, targets) == label == flat["label"]
    del row["label"]
    (unlabelled,) = flatten(task, row, labelled=False)
    assert to_text(task, unlabelled) == (inputs, UNKNOWN)


@given(st.lists(st.text(string.ascii_letters, min_size=1, max_size=6), min_size=3, max_size=12), st.data())
def test_wsc_marks_the_pronoun_and_nothing_else(words, data):
    at = data.draw(st.integers(0, len(words) - 1))
    target = {"span1_text": words[0], "span1_index": 0, "span2_text": words[at], "span2_index": at}
    row = {"text": " ".join(words), "target": target, "label": False, "idx": 0}
    inputs, _ = to_text("wsc", flatten("wsc", row, labelled=True)[0])
    marked = inputs.split(" ")[1:]
    assert marked[at] == f"*{words[at]}*"
    assert [w.strip("*") for w in marked] == words


@pytest.mark.parametrize(
    ("text", "pronoun", "index", "want"),
    [
        ('Tom left. "he said', "he", 2, 'Tom left. " *he* said'),
        ("Tom (and he.) left", "he", 2, "Tom (and *he* .) left"),
        ("Tom knew he's late", "he", 2, "Tom knew *he* 's late"),
        ("Tom knew he\u2019d left", "he", 2, "Tom knew *he* \u2019d left"),
        ("Tom left. He hid", "he.)", 2, "Tom left. *He* hid"),
        ("Tom left,\nand\the  hid", "he", 3, "Tom left,\nand\t*he*  hid"),
        ("he left and (he hid", "he", 3, "he left and ( *he* hid"),
        ("the other he saw", "he", 0, "the other *he* saw"),  # not within a word
        ("Tom gave it, and it, too", "it,", 2, "Tom gave *it,* and it, too"),  # as T5 marks it
    ],
)
def test_wsc_finds_the_pronoun_beside_punctuation_and_any_white_space(text, pronoun, index, want):
    target = {"span1_text": "Tom", "span1_index": 0, "span2_text": pronoun, "span2_index": index}
    row = {"text": text, "target": target, "label": True, "idx": 0}
    assert to_text("wsc", flatten("wsc", row, labelled=True)[0])[0] == f"wsc: {want}"


@pytest.mark.parametrize(
    ("said", "referent", "want"),
    [
        ("the fuzzy bunny", "bunny", 1),
        ("Bunny", "a fuzzy bunny", 1),
        ("Bob", "Bob's hat", 0),
        ("Bob's", "Bob's hat", 1),
        ("Tom", "Bob", 0),
        ("the", "Bob", -1),
        ("", "Bob", -1),
    ],
)
def test_referents(said, referent, want):
    assert names_referent(said, referent) == want


@pytest.mark.parametrize(
    ("task", "change", "says"),
    [
        ("rte", {"label": "maybe"}, "'label' must be one of 'entailment', 'not_entailment'"),
        ("rte", {"label": None}, "'label' must be one of"),
        ("rte", {"premise": 3}, "'premise' must be of type str"),
        ("rte", {"idx": True}, "'idx' must be of type int"),
        ("rte", {"idx": 2**63}, "'idx' must be of type int and in [0, 2**63)"),
        ("rte", {"idx": -1}, "'idx' must be of type int and in [0, 2**63)"),
        ("boolq", {"label": 1}, "'label' must be one of False, True"),
        ("copa", {"label": True}, "'label' must be one of 0, 1"),
        ("wsc", {"target": {"span1_text": "x", "span1_index": 99}}, "'span1_index' is 99, but"),
        ("multirc", {"passage": []}, "'passage' must be of type dict"),
        ("record", {"qas": [{"idx": 0, "query": "q", "answers": []}]}, "has no answers"),
    ],
)
def test_refuses_what_does_not_fit(task, change, says):
    row = {**WORDINGS[task][0], **change}
    with pytest.raises(ValueError, match=re.escape(says)):
        flatten(task, row, labelled=True)


@pytest.mark.parametrize("task", MAIN)
@given(
    junk=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda s: (
            st.lists(s)
            | st.dictionaries(
                st.sampled_from(
                    ["idx", "label", "premise", "passage", "qas", "text", "target", "questions", "answers"]
                ),
                s,
            )
        ),
        max_leaves=12,
    )
)
def test_junk_is_refused_with_a_value_error(task, junk):
    try:
        made = flatten(task, junk, labelled=True)
    except ValueError:
        made = []
    assert made == []


@needs_data
@pytest.mark.parametrize(
    ("task", "count"), [("cb", 250), ("copa", 400), ("rte", 2490), ("wic", 5428), ("wsc", 554)]
)
def test_words_all_real_rows(task, count):
    lines = (REAL_DATA / "superglue" / spec(task).directory / "train.jsonl").read_text().splitlines()
    flat = [f for line in lines for f in flatten(task, json.loads(line), labelled=True)]
    assert len(flat) == count
    texts = [to_text(task, f) for f in flat]
    assert all(label_of(task, targets) >= 0 or task == "wsc" for _, targets in texts)
    if task == "wsc":
        assert all(inputs.count("*") == 2 for inputs, _ in texts)
