"""Your own JSONL and GSM8K: fields, conversations, splits, right answers, and bad rows by file and line."""

import codecs
import json

import pytest

seqio = pytest.importorskip("seqio")
pytest.importorskip("tensorflow")

from dst_optax.finetuning.tasks.gsm8k import Gsm8k  # noqa: E402
from dst_optax.finetuning.tasks.jsonl import Jsonl  # noqa: E402

BYTES = seqio.ByteVocabulary()


def written(directory, **files):
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return str(directory)


class Chatting(seqio.ByteVocabulary):
    def chat(self, messages):
        return " ".join(m["content"] for m in messages[:-1]), messages[-1]["content"]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_fields_are_renamed_and_conversations_are_worded(tmp_path):
    rows = [{"q": "a", "a": "b", "more": 1}, {"talk": CHAT}]
    data = Jsonl(written(tmp_path, train=rows), Chatting(), prompt="q", completion="a", messages="talk")
    assert data.pairs("train") == (("a", "b"), ("Hi", "Ho"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "Expecting"),
        ([1], "expected an object, got list"),
        ({"prompt": "a"}, r"'completion' must be a text, got None; the fields are 'prompt'"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be a text, got 3"),
        ({"prompt": "a", "completion": " "}, "the completion is empty"),
        ({"prompt": "\ud800", "completion": "b"}, "surrogates"),
        ('{"prompt": "A", "completion": "x", "prompt": "B"}', "the field 'prompt' is there twice"),
        ({"messages": "Hi"}, "list of two objects"),
        ({"messages": CHAT[:1]}, "list of two objects"),
        ({"messages": CHAT, "tools": [{}]}, "'tools' are not given to the chat template"),
        ({"messages": CHAT[::-1]}, "not of 'assistant'"),
        ({"messages": [{"role": "user"}, CHAT[1]]}, "'content' must be a text"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, words):
    directory = written(tmp_path, train=[{"prompt": "a", "completion": "b"}, "", row])
    with pytest.raises(ValueError, match=words) as error:
        Jsonl(directory, Chatting()).pairs("train")
    assert f"{tmp_path}/train.jsonl:3: " in str(error.value)


def test_conversations_need_a_vocabulary_with_a_template(tmp_path):
    with pytest.raises(ValueError, match="ByteVocabulary has no chat template"):
        Jsonl(written(tmp_path, train=[{"messages": CHAT}]), BYTES).pairs("train")


class WithoutBraces(seqio.ByteVocabulary):
    unk_id = ord("?") + 3

    def _encode(self, s):
        return super()._encode(s.replace("{", "?"))


def test_completions_that_the_vocabulary_cannot_write_are_told(tmp_path, capsys):
    good, bad = {"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": "{"}
    data = Jsonl(written(tmp_path, train=[good, bad], validation=[good]), WithoutBraces())
    data.check()
    told = capsys.readouterr().out
    assert "train: 1 of 2 completions" in told
    assert "'{' becomes '?'" in told
    assert "prompts" not in told
    assert "validation" not in told


def test_prompts_that_the_vocabulary_lacks_characters_of_are_told(tmp_path, capsys):
    good, bad = {"prompt": "a", "completion": "b"}, {"prompt": "a{}", "completion": "b"}
    data = Jsonl(written(tmp_path, train=[good, bad], validation=[good]), WithoutBraces())
    data.check()
    told = capsys.readouterr().out
    assert "train: 1 of 2 prompts have characters that the vocabulary lacks: 'a{}' becomes 'a?}'." in told
    assert "validation" not in told


def test_fields_that_are_never_read_are_told(tmp_path, capsys):
    row = {"prompt": "Translate", "completion": "fromage"}
    data = Jsonl(written(tmp_path, train=[{**row, "input": "cheese"}, row], validation=[row]), BYTES)
    data.check()
    told = capsys.readouterr().out
    assert "jsonl train: fields that are never read: 'input' (in 1 rows)." in told
    assert "validation" not in told
    data = Jsonl(written(tmp_path, train=[{"messages": CHAT, "prompt": "Hi"}]), Chatting())
    assert data.pairs("train") == (("Hi", "Ho"),)  # as UltraChat has it
    assert data.unread("train") == {"prompt": 1}


def test_a_completion_that_is_cut_has_no_end(tmp_path):
    """The model would learn to stop in the middle."""
    rows = [{"prompt": "a", "completion": "abcdefgh"}, {"prompt": "a", "completion": "abc"}]
    data = Jsonl(written(tmp_path, train=rows, validation=rows), BYTES)
    task = seqio.TaskRegistry.get(data.register(decoder_only=True))
    lengths = {"inputs": 4, "targets": 4}
    examples = task.get_dataset(lengths, "validation", shuffle=False).as_numpy_iterator()
    assert [e["targets"].tolist() for e in examples] == [BYTES.encode("abcd"), [*BYTES.encode("abc"), 1]]


def test_a_mark_at_the_beginning_of_a_file_is_passed_over(tmp_path):
    data = Jsonl(written(tmp_path, train=[{"prompt": "a", "completion": "b"}] * 2), BYTES)
    file = tmp_path / "train.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert data.pairs("train") == (("a", "b"),) * 2


def test_rows_that_have_changed_are_read_again(tmp_path):
    data = Jsonl(written(tmp_path, train=[{"prompt": "a", "completion": "b"}]), BYTES)
    assert data.pairs("train") == (("a", "b"),)
    assert data.pairs("train") is data.pairs("train")
    written(tmp_path, train=[{"prompt": "a", "completion": "changed"}])
    assert data.pairs("train") == (("a", "changed"),)


def test_missing_and_empty_files_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl does not exist"):
        Jsonl(str(tmp_path), BYTES).register()
    good = [{"prompt": "a", "completion": "b"}]
    data = Jsonl(written(tmp_path, train=good, validation=[""]), BYTES)
    data.register()
    with pytest.raises(ValueError, match=r"validation\.jsonl has no rows"):
        data.check()


def test_a_test_file_is_predicted_if_there_is_one(tmp_path):
    good = [{"prompt": "a", "completion": "b"}]
    data = Jsonl(written(tmp_path, train=good, validation=good), BYTES)
    assert data.predicted_split("jsonl") == "validation"
    written(tmp_path, test=good)
    assert data.predicted_split("jsonl") == "test"


def test_examples_of_the_task_and_its_metric(tmp_path):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": " d"}]
    data = Jsonl(written(tmp_path, train=rows, validation=rows), BYTES)
    task = seqio.TaskRegistry.get(data.register(decoder_only=True))
    examples = list(task.get_dataset(split="validation", shuffle=False).as_numpy_iterator())
    assert [e["inputs"].tolist() for e in examples] == [BYTES.encode("a"), BYTES.encode("c")]
    assert [e["targets"].tolist() for e in examples] == [[*BYTES.encode(" b"), 1], [*BYTES.encode(" d"), 1]]
    targets = [task.postprocess_fn(x, is_target=True) for x in (" b", " d")]
    assert task.metric_fns[0](targets, ["b", "x"]) == {"exact_match": 50.0}
    ended = seqio.TaskRegistry.get(data.register())
    first = next(iter(ended.get_dataset(split="validation", shuffle=False).as_numpy_iterator()))
    assert first["inputs"].tolist() == [*BYTES.encode("a"), 1]


def test_predictions_are_written_beside_what_was_asked(tmp_path):
    data = Jsonl(str(tmp_path), BYTES)
    made = [{"inputs_pretokenized": b"a", "targets_pretokenized": b" b"}]
    path = data.write(tmp_path / "predictions", "jsonl", made, ["b"])
    assert json.loads(path.read_text()) == {"prompt": "a", "completion": " b", "prediction": "b"}


def gsm8k(directory, **settings):
    rows = [{"question": f"What is {i}+1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(5)]
    return Gsm8k(written(directory, train=rows, test=rows[:2]), BYTES, **settings)


def test_gsm8k_splits_its_training_file(tmp_path):
    data = gsm8k(tmp_path, validation_size=2)
    assert [len(data.pairs(split)) for split in data.splits()] == [3, 2, 2]
    assert data.pairs("validation")[0] == ("Question: What is 3+1?\nAnswer:", " 3+1=4\n#### 4")
    with pytest.raises(ValueError, match="from 1 to 4"):
        gsm8k(tmp_path, validation_size=5).pairs("train")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("... #### 1,200", True),
        ("#### $1200.", True),
        ("#### $ 1200", True),
        ("#### 3 #### 1200", True),
        ("1200", False),
        ("#### 12", False),
        ("#### .1200", False),
        ("#### 1200.00", True),
        ("#### 1200%", True),
        ("#### 1,200km/h", True),
        ("#### 1200.5", False),
        ("#### -1200", False),
        ("#### 1200/2", False),
        ("#### none", False),
    ],
)
def test_gsm8k_compares_what_follows_the_mark(tmp_path, said, right):
    assert gsm8k(tmp_path).is_right(said, "He pays.\n#### 1200") == right


def test_gsm8k_without_a_number_is_told(tmp_path):
    directory = written(tmp_path, train=[{"question": "?", "answer": "none"}])
    with pytest.raises(ValueError, match=r"train\.jsonl:1: 'answer' names no number"):
        Gsm8k(directory, BYTES).pairs("train")
