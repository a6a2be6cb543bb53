"""A directory like one of the hub's, with a model and a tokenizer so small that tests make it on the spot."""

import json
from pathlib import Path

from dst_optax.finetuning.models import decoder

WORDS = ["<end>", "<start>", "<turn>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + ' ' + m['content'] + '<turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant ' }}{% endif %}"
)


def make(directory: Path, **config) -> decoder.DecoderConfig:
    """Bytes as tokens, 0 the end, 1 put before every text; returns the shape of the model beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*WORDS, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(WORDS)
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A", special_tokens=[("<start>", 1)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    shape = decoder.DecoderConfig("llama", len(vocabulary), 16, 2, 4, 2, 4, 24, tie_embeddings=True, **config)
    ends = {"bos_token_id": 1, "eos_token_id": [2, 0]}
    special = {"bos_token": "<start>", "eos_token": {"content": "<end>"}}
    texts = {
        "config.json": json.loads(decoder.config_text(shape)) | ends,
        "tokenizer_config.json": special | {"chat_template": CHAT},
    }
    for name, value in texts.items():
        (directory / name).write_text(json.dumps(value))
    return shape
