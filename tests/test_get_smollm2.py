"""The script that makes SmolLM2's directory: heads in transformers' order, a tokenizer that can be read."""

import json

import numpy as np
import pytest

pytest.importorskip("flax")

import get_smollm2


def test_halves_of_heads_are_no_longer_interleaved():
    rows = np.arange(3 * 64)[:, None] * np.ones((1, 2))
    name, found = get_smollm2.hugging_face("blk.7.attn_k.weight", rows)
    assert name == "model.layers.7.self_attn.k_proj.weight"
    for head in range(3):
        for pair in range(32):
            for half in range(2):
                assert found[64 * head + 32 * half + pair, 0] == 64 * head + 2 * pair + half
    name, found = get_smollm2.hugging_face("blk.7.attn_v.weight", rows)
    assert name == "model.layers.7.self_attn.v_proj.weight"
    assert found is rows
    assert get_smollm2.hugging_face("token_embd.weight", rows)[0] == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match="rope_freqs"):
        get_smollm2.hugging_face("rope_freqs.weight", rows)


def test_the_tokenizer_divides_digits_and_knows_what_is_special():
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    said = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "1 2"],
    }
    said["tokenizer.ggml.tokens"].append("12")
    said["tokenizer.ggml.token_type"].append(1)
    made = tokenizers.Tokenizer.from_str(json.dumps(get_smollm2.tokenizer(said)))
    assert made.encode("ab 12<|im_end|>").ids == [7, 6, 4, 5, 1]
    assert made.decode([7, 6, 4, 5, 1]) == "ab 12"
