"""Tokenizers and features: ends by the configuration, padding by lengths, inputs cut at their beginning."""

import json
import shutil

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
seqio = pytest.importorskip("seqio")

from dst_optax.finetuning import inputs  # noqa: E402
from dst_optax.finetuning.models import decoder  # noqa: E402
from dst_optax.finetuning.tasks import features  # noqa: E402
from dst_optax.finetuning.tasks.base import vocabulary_digest  # noqa: E402

MODEL = decoder.CausalLM(decoder.CONFIGS["smollm2_135m"])


def test_features_by_hand():
    pairs = [([5, 0, 6], [7, 0]), ([0], [0, 8, 9])]
    found = inputs.batch_of(MODEL, pairs, {"inputs": 4, "targets": 3})
    assert {name: x.tolist() for name, x in found.items()} == {
        "decoder_input_tokens": [[5, 0, 6, 7, 0, 0], [0, 0, 8, 0, 0, 0]],
        "decoder_target_tokens": [[7, 0, 0], [0, 8, 9]],
        "decoder_loss_weights": [[1, 1, 0], [1, 1, 1]],
        "decoder_target_indices": [[2, 3, 4], [0, 1, 2]],
    }
    assert inputs.count_tokens(found) == 3 + 2 + 1 + 3


def test_inputs_that_nothing_can_follow_are_refused():
    with pytest.raises(Exception, match="empty inputs"):
        inputs.batch_of(MODEL, [([], [1])], {"inputs": 4, "targets": 3})


class Prefixed(seqio.ByteVocabulary):
    prefix_ids = (1,)


def tokens(vocabulary, text, lengths, decoder_only=True):
    if "prefixed" in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove("prefixed")
    seqio.TaskRegistry.add(
        "prefixed",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
                {"inputs": text, "targets": "x"}
            ),
            splits=["train"],
        ),
        preprocessors=features.preprocessors(vocabulary, decoder_only),
        output_features=features.output_features(vocabulary, decoder_only),
    )
    data = seqio.get_mixture_or_task("prefixed").get_dataset(lengths, split="train", shuffle=False)
    (example,) = data.as_numpy_iterator()
    return example["inputs"].tolist(), example["targets"].tolist()


def test_inputs_of_decoders_begin_as_their_tokenizer_wants_and_keep_their_end():
    x = [c + 3 for c in b"abcd"]
    assert tokens(Prefixed(), "abcd", None) == ([1, *x], [ord("x") + 3, 1])
    assert tokens(Prefixed(), "abcd", {"inputs": 3, "targets": 2})[0] == [1, *x[2:]]
    assert tokens(seqio.ByteVocabulary(), "abcd", {"inputs": 3, "targets": 2})[0] == x[1:]
    assert tokens(Prefixed(), "abcd", {"inputs": 3, "targets": 2}, decoder_only=False)[0] == [*x[:2], 1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    import tiny_tokenizer

    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer.make(path)
    return path


def vocabulary_of(directory):
    from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary

    return HuggingFaceVocabulary(directory)


def test_ends_and_prefix_are_those_of_the_model(directory):
    vocabulary = vocabulary_of(directory)
    assert vocabulary.eos_ids == (2, 0)
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.prefix_ids) == (0, 1, (1,))
    assert vocabulary.vocab_size == 3 + 256
    ids = vocabulary.encode("aä 1")
    assert len(ids) == 5
    assert vocabulary.decode(ids) == "aä 1"
    assert np.array_equal(vocabulary.encode_tf(tf.constant("aä 1")), ids)
    assert vocabulary.decode_tf(tf.constant(ids)).numpy().decode() == "aä 1"
    assert vocabulary.decode_until_end([*ids, 2, *ids]) == "aä 1"
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert vocabulary_of(directory).eos_id == 2
    (directory / "generation_config.json").unlink()


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def test_chats_are_worded_by_the_template(directory):
    vocabulary = vocabulary_of(directory)
    assert vocabulary.chat(MESSAGES) == ("<start><turn>user Hi<turn>\n<turn>assistant ", "Ho")
    (directory / "generation_config.json").write_text('{"eos_token_id": 0}')  # a base model's
    assert vocabulary_of(directory).chat(MESSAGES)[1] == "Ho"
    (directory / "generation_config.json").unlink()
    ids = vocabulary.encode("<start><turn>")
    assert ids == [1, 2]


def with_template(directory, path, template, **settings):
    shutil.copytree(directory, path, dirs_exist_ok=True)
    settings = json.loads((path / "tokenizer_config.json").read_text()) | settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return vocabulary_of(path)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", ("Hi|", "Ho|")),
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}|{% endfor %}", ("Hi|", "Ho|")),  # it is null
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% if loop.last %}{% break %}{% endif %}|{% endfor %}{% if add_generation_prompt %}|{% endif %}",
            ("Hi|", "Ho"),
        ),
        (
            [{"name": "tools", "template": "!"}, {"name": "default", "template": "{{ messages | length }}"}],
            None,
        ),
        (
            "{% for m in messages %}{{ m.content | tojson }}{{ {'a': '<é&>'} | tojson }}|{% endfor %}",
            ('"Hi"{"a": "<é&>"}|', '"Ho"{"a": "<é&>"}|'),
        ),
        ([{"name": "tools", "template": "!"}], "has no chat template"),
        ("{% for %}", "the chat template cannot be read"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses the messages: can only concatenate"),
        ("{{ raise_exception('no system') }}", "the chat template refuses the messages: no system"),
        (
            "{% if tools is not none or documents is not none %}!{% endif %}"
            "{% for m in messages %}{{ m.content }}|{% endfor %}",
            ("Hi|", "Ho|"),
        ),
        (
            "{% for m in messages %}{{ m.content[0] }}|{% endfor %}",
            "leaves out words of a message of 'user', 'Hi'",
        ),
        (
            "{% for m in messages %}{{ m.content[loop.index0 :] }}|{% endfor %}",
            "leaves out words of a message of 'assistant', 'Ho'",
        ),
    ],
)
def test_templates_of_the_hub(directory, tmp_path, template, words):
    vocabulary = with_template(directory, tmp_path, template, bos_token=None)
    if isinstance(words, tuple):
        assert vocabulary.chat(MESSAGES) == words
    else:
        with pytest.raises(ValueError, match=words or "words earlier messages anew"):
            vocabulary.chat(MESSAGES)


def test_reasoning_of_earlier_answers_may_be_left_out(directory, tmp_path):
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}|{% endfor %}"
    vocabulary = with_template(directory, tmp_path, template)
    reasoned = {"role": "assistant", "content": "<think>well</think>Ho"}
    assert vocabulary.chat([MESSAGES[0], reasoned, *MESSAGES]) == ("Hi|Ho|Hi|", "Ho|")
    with pytest.raises(
        ValueError, match="leaves out words of a message of 'assistant', '<think>well</think>Ho'"
    ):
        vocabulary.chat([MESSAGES[0], reasoned])


OTHER_TOKENIZERS = {
    "prefix": lambda x: x | {"post_processor": None},
    "normalizer": lambda x: x | {"normalizer": {"type": "Lowercase"}},
    "pre_tokenizer": lambda x: x | {"pre_tokenizer": x["pre_tokenizer"] | {"add_prefix_space": True}},
    "model": lambda x: x | {"model": x["model"] | {"ignore_merges": True}},
}


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_tokenizers_of_the_same_pieces_are_told_apart(directory, tmp_path, kind):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(OTHER_TOKENIZERS[kind](described)))
    ours, other = vocabulary_of(directory), vocabulary_of(tmp_path)
    assert ours.pieces == other.pieces
    assert vocabulary_digest(ours) != vocabulary_digest(other)
    assert vocabulary_digest(ours) == vocabulary_digest(vocabulary_of(directory))
    ours.check_same(directory)
    with pytest.raises(ValueError, match="begins texts with" if kind == "prefix" else f"has another {kind}"):
        ours.check_same(tmp_path)


def test_special_tokens_may_be_named_in_a_file_of_their_own(directory, tmp_path):
    vocabulary = with_template(directory, tmp_path, "{% for m in messages %}{{ pad_token }}{% endfor %}Hi")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<x>"}}')
    assert vocabulary._template(MESSAGES) == "<x><x>Hi"


def test_how_a_tokenizer_was_last_used_is_forgotten(directory, tmp_path):
    """Its file keeps truncation and padding, and every text would be cut."""
    import tokenizers

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four"
    assert vocabulary_of(tmp_path).encode(text) == vocabulary_of(directory).encode(text)


def test_an_end_of_text_that_is_no_special_token_is_stripped(directory, tmp_path):
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in text["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    assert vocabulary_of(tmp_path).chat(MESSAGES)[1] == "Ho"


def test_a_template_of_its_own_goes_first(directory, tmp_path):
    vocabulary = with_template(directory, tmp_path, "{{ 1 }}")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert vocabulary.chat(MESSAGES) == ("Hi", "Ho")


@pytest.mark.parametrize(
    ("part", "says"),
    [("normalizer", "' a:  b' of 'a:' and ' b'"), ("pre_tokenizer", "'a: b' of 'a:' and 'b'")],
)
def test_a_tokenizer_that_begins_every_text_anew_is_refused(directory, tmp_path, part, says):
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    if part == "normalizer":
        tokenizer.normalizer = normalizers.Prepend(" ")
    else:  # as Llama 2's: a space is put where there is none, and the first one is dropped again
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"makes {says}"):
        MODEL.check(vocabulary_of(tmp_path))


def test_absent_and_damaged_files_are_told(tmp_path, directory):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        vocabulary_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        vocabulary_of(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="eos_token_id"):
        vocabulary_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 999]}))
    with pytest.raises(ValueError, match=r"config\.json: tokenizer\.json has no token .* \[999\]"):
        vocabulary_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert vocabulary_of(tmp_path).eos_ids == (0,)


def test_vocabularies_of_other_models_are_refused():
    with pytest.raises(ValueError, match="its own tokenizer, not ByteVocabulary"):
        MODEL.check(seqio.ByteVocabulary())
