"""Models are found by configuration, published name and checkpoint, and by nothing else."""

import json

import pytest

from dst_optax.finetuning.models import decoder, t5
from dst_optax.finetuning.models.named import language_model

CONFIG = decoder.DecoderConfig("qwen3", 264, 16, 2, 4, 2, 4, 24, tie_embeddings=True)


def test_models_are_found_by_config_name_and_checkpoint(tmp_path):
    assert language_model("t5_small") == t5.T5(t5.CONFIGS["t5_small"])
    assert language_model("qwen3_0_6b") == decoder.CausalLM(decoder.CONFIGS["qwen3_0_6b"])
    assert language_model(CONFIG).config is CONFIG
    (tmp_path / "config.json").write_text(decoder.config_text(decoder.CONFIGS["gemma3_270m"]))
    assert language_model(str(tmp_path)).config == decoder.CONFIGS["gemma3_270m"]
    mt5 = {"model_type": "mt5", "d_model": 64, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(mt5))
    assert language_model(str(tmp_path)).config.emb_dim == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no config.json"),
        ('{"model_type": "mistral"}', "'mistral' is not supported; t5, mt5, llama"),
        ('{"model_type": "mt5", "tie_word_embeddings": true}', "mT5 whose logits are tied"),
        ('{"model_type": "t5", "eos_token_id": 2}', "eos_token_id is 2; only 1"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ],
)
def test_checkpoints_of_no_family_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        language_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "nearest"), [("t5_1.1_small", "t5_1_1_small"), ("smollm2-135m", "smollm2_135m")]
)
def test_unknown_names_are_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean {nearest}"):
        language_model(name)
