"""What is compared with PEFT is scored as the trainer scores."""

from types import SimpleNamespace

import pytest

for needed in ("torch", "peft", "transformers", "tokenizers", "seqio"):
    pytest.importorskip(needed)

import peft_baselines  # noqa: E402
import tiny_tokenizer  # noqa: E402
import torch  # noqa: E402

from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402


class Names:
    """COPA with a choice that begins with the other one."""

    def rows(self, task, split):
        words = {"premise": "It fell", "question": "cause", "choice1": "Bob", "choice2": "Bob Jr"}
        return [{**words, "idx": 0, "label": 1}]


def test_options_that_begin_with_another_are_ended(tmp_path, monkeypatch):
    tiny_tokenizer.make(tmp_path)
    vocabulary, scored = HuggingFaceVocabulary(tmp_path), []

    def log_likelihoods(model, batch):
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        scored.extend(t[w > 0].tolist() for t, w in zip(targets, weights, strict=True))
        return torch.tensor(weights)

    monkeypatch.setattr(peft_baselines, "log_likelihoods", log_likelihoods)
    data = SuperGlue(Names(), vocabulary, ("copa",), evaluation="options")
    data.register(True)
    model = SimpleNamespace(name_or_path=str(tmp_path))
    assert peft_baselines.score(model, data, "copa", "validation", {"inputs": 32, "targets": 8}) == 100
    end = [vocabulary.eos_id]
    assert scored == [vocabulary.encode(option) + end for option in (" bob", " bob Jr")]
    with pytest.raises(ValueError, match="option ' bob Jr' has 8 tokens, but targets only 7"):
        peft_baselines.score(model, data, "copa", "validation", {"inputs": 32, "targets": 7})
