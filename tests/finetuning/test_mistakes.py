"""Models, checkpoints and vocabularies that do not belong together are told before anything is compiled."""

import json
import shutil

import decoder_cases as cases
import jax
import numpy as np
import optax
import pytest
import tiny_tokenizer

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("clu")
pytest.importorskip("rich")
seqio = pytest.importorskip("seqio")

from dst_optax.finetuning import trainer  # noqa: E402
from dst_optax.finetuning.methods.full import Full  # noqa: E402
from dst_optax.finetuning.models import decoder, t5  # noqa: E402
from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary  # noqa: E402
from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402

RECIPE = trainer.Recipe(steps=1, batch_size=4, lengths={"inputs": 48, "targets": 16})
TINY = t5.CONFIGS["tiny"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A decoder and a T5 as the hub has them: the T5 with a tokenizer.json, too."""
    pytest.importorskip("tokenizers", reason="needs the extra 'hub'")
    root = tmp_path_factory.mktemp("checkpoints")
    config = tiny_tokenizer.make(root / "decoder")
    decoder.save_hf(cases.weights(config), config, root / "saved", source=root / "decoder")
    shapes = t5.shapes(TINY)
    t5.save_hf(
        t5.parameters.unflatten({p: np.ones(s, np.float32) for p, s in shapes.items()}), TINY, root / "t5"
    )
    shutil.copy(root / "decoder" / "tokenizer.json", root / "t5")
    said = json.loads((root / "t5" / "config.json").read_text())
    (root / "t5" / "config.json").write_text(json.dumps(said | {"eos_token_id": 1}))
    return {"decoder": root / "saved", "t5": root / "t5"}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs what must be refused, with words, before jax compiles or anything is written."""

    def run(words, vocabulary, model, checkpoint):
        compiled = []
        monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: compiled.append(args))
        data = SuperGlue(SyntheticSource(train_size=8), vocabulary, ("rte",), evaluation="options")
        methods = {"full": Full(optax.sgd(1e-2))}
        with pytest.raises(ValueError, match=words):
            trainer.finetune(str(tmp_path / "run"), data, model, methods, RECIPE, checkpoint=str(checkpoint))
        assert not compiled
        assert not (tmp_path / "run").exists()

    return run


def test_a_t5_with_the_file_for_decoders(checkpoints, refused):
    path = checkpoints["t5"]
    refused("this one is a T5", HuggingFaceVocabulary(path), str(path), path)


def test_a_t5_without_a_tokenizer_with_the_file_for_decoders(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra 'hub'")
    with pytest.raises(ValueError, match="leave models/decoder"):
        HuggingFaceVocabulary(tmp_path)


def test_a_decoder_with_the_vocabulary_of_t5(checkpoints, refused):
    path = checkpoints["decoder"]
    refused("needs its own tokenizer, not ByteVocabulary", seqio.ByteVocabulary(), str(path), path)


def test_a_vocabulary_that_is_not_there(tmp_path, refused):
    refused("absent.model does not exist", seqio.SentencePieceVocabulary("absent.model"), TINY, tmp_path)


def test_a_decoder_as_the_checkpoint_of_a_t5(checkpoints, refused):
    refused("model_type is 'llama'", seqio.ByteVocabulary(), TINY, checkpoints["decoder"])


def test_a_t5_as_the_checkpoint_of_a_decoder(checkpoints, refused):
    path = checkpoints["decoder"]
    config = decoder.read_config(path)
    refused("model_type 't5'", HuggingFaceVocabulary(path), config, checkpoints["t5"])


@pytest.mark.parametrize("file", ["decoder", "t5"])
def test_an_absent_config_json(checkpoints, tmp_path, refused, file):
    path = shutil.copytree(checkpoints[file], tmp_path / "bare")
    vocabulary = HuggingFaceVocabulary(path) if file == "decoder" else seqio.ByteVocabulary()
    config = decoder.read_config(path) if file == "decoder" else TINY
    (path / "config.json").unlink()
    refused("config.json", vocabulary, str(path), path)
    refused("config.json", vocabulary, config, path)


def test_a_tokenizer_of_another_size(checkpoints, tmp_path, refused):
    """It has fewer pieces than the embedding has rows, so every token has one."""
    path = shutil.copytree(checkpoints["decoder"], tmp_path / "other")
    text = json.loads((path / "tokenizer.json").read_text())
    text["model"]["vocab"].popitem()
    (path / "tokenizer.json").write_text(json.dumps(text))
    saved = checkpoints["decoder"]
    refused("is not the tokenizer of", HuggingFaceVocabulary(path), str(saved), saved)


def test_a_tokenizer_with_another_end(checkpoints, tmp_path, refused):
    path = shutil.copytree(checkpoints["decoder"], tmp_path / "other")
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | {"eos_token_id": 1}))
    saved = checkpoints["decoder"]
    refused(r"ends texts with \[1\]", HuggingFaceVocabulary(path), str(saved), saved)


@pytest.mark.parametrize("rows", [256, 1024])
def test_a_t5_whose_embedding_has_not_the_vocabularys_rows(tmp_path, refused, rows):
    (tmp_path / "t5").mkdir()
    config = t5.T5Config(rows, 16, 2, 1, 1, 8, 16)
    refused("259 pieces, the model's embedding", seqio.ByteVocabulary(), config, tmp_path / "t5")
