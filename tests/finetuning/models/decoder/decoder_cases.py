"""Models, inputs and weights that the tests of decoders share.

Run as a script, it records what ``transformers`` makes of them in ``transformers.npz``.
"""

import dataclasses
import functools
import pathlib
import zlib

import jax
import numpy as np

from dst_optax.finetuning.models import decoder
from dst_optax.finetuning.models.base import unflatten

RECORD = pathlib.Path(__file__).with_name("transformers.npz")
LENGTHS = (24, 13, 1)
NEW = 8

_LLAMA = decoder.DecoderConfig(
    family="llama",
    vocab_size=47,
    emb_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    tie_embeddings=False,
)
_QWEN2 = dataclasses.replace(
    _LLAMA, family="qwen2", num_heads=6, num_kv_heads=1, emb_dim=24, rope=decoder.Rope(1e6)
)
_GEMMA = dataclasses.replace(
    _LLAMA,
    family="gemma3_text",
    num_layers=3,
    head_dim=8,
    tie_embeddings=True,
    rope=decoder.Rope(1e6),
    query_pre_attn_scalar=5,
    sliding_window=4,
    local_rope=decoder.Rope(10.0),
    sliding_layers=(True, True, False),
)
CONFIGS = {
    "llama": dataclasses.replace(_LLAMA, rope=decoder.Rope(5e5)),
    "smollm2": dataclasses.replace(
        _LLAMA, tie_embeddings=True, norm_eps=1e-5, num_heads=3, num_kv_heads=3, emb_dim=12
    ),
    "llama_linear": dataclasses.replace(_LLAMA, rope=decoder.Rope(1e4, "linear", factor=3.0)),
    "llama3_2": dataclasses.replace(  # of its four frequencies one is kept, one scaled, two are between
        _LLAMA,
        tie_embeddings=True,
        head_dim=8,
        rope=decoder.Rope(30.0, "llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=40),
    ),
    "qwen2": _QWEN2,
    "qwen2_tied": dataclasses.replace(_QWEN2, tie_embeddings=True, num_kv_heads=3),
    "qwen3": dataclasses.replace(_LLAMA, family="qwen3", head_dim=8, rope=decoder.Rope(1e6)),
    "gemma3": _GEMMA,
    "gemma3_linear": dataclasses.replace(_GEMMA, rope=decoder.Rope(1e6, "linear", factor=8.0)),
}
NAMES_AND_SCAN = [(name, False) for name in CONFIGS] + [("qwen2", True), ("gemma3", True)]


def weights(config, scale=0.4):
    """Parameters as waves: the same on every machine, and large enough to tell tokens apart."""
    unstacked = dataclasses.replace(config, scan_layers=False)

    def wave(path, shape):
        n = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        x = np.sin(n * n * 0.7 + zlib.crc32(path.encode()) % 1000)
        return np.asarray(1 + 0.3 * x if path.endswith("scale") else scale * x, np.float32)

    flat = {path: wave(path, shape) for path, shape in decoder.shapes(unstacked).items()}
    return unflatten(stacked(flat, config.num_layers) if config.scan_layers else flat)


def stacked(flat, num_layers):
    """Parameters by path with their layers stacked along axis 1."""
    found = {path: x for path, x in flat.items() if not path.startswith("layers_")}
    for path in flat:
        if path.startswith("layers_0/"):
            rest = path.removeprefix("layers_0/")
            found[f"layers/{rest}"] = np.stack([flat[f"layers_{i}/{rest}"] for i in range(num_layers)], 1)
    return found


def batch(config):
    """Rows of tokens, 0 among them, of three lengths; what comes after a row's end is anything."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, config.vocab_size, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    tokens[:, 0] = (5, 0, 7)
    return tokens, np.array(LENGTHS, np.int32)


def logits(config, params, tokens, at=None):
    return np.asarray(_logits(config, params, tokens, at))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens, at=None):
    return decoder.Decoder(config).apply({"params": params}, tokens, at=at)


def hugging_face(path):
    """transformers' own model at a path, every weight found and used."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def signature(x):
    """A number that changes when a tensor is transposed."""
    return float((x.ravel().astype(np.float64) * np.cos(np.arange(x.size))).sum()) + x.shape[0]


def record():
    import tempfile

    import torch

    found = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as path:
            decoder.save_hf(weights(config), config, path)
            model = hugging_face(path)
            model.save_pretrained(path)
            held = {k: x.numpy() for k, x in model.state_dict().items()}
            if config.tie_embeddings:
                del held["lm_head.weight"]
            found[f"{name}/names"] = np.array(list(held))
            found[f"{name}/signatures"] = np.array([signature(x) for x in held.values()])
            found[f"{name}/config"] = np.array((pathlib.Path(path) / "config.json").read_text())
        tokens, lengths = batch(config)
        rows, greedy = [], []
        for row, length in zip(tokens, lengths, strict=True):
            x = torch.tensor(row[None, :length]).long()
            with torch.no_grad():
                rows.append(np.pad(model(x).logits[0].numpy(), ((0, max(LENGTHS) - length), (0, 0))))
                new = model.generate(
                    x,
                    attention_mask=torch.ones_like(x),
                    do_sample=False,
                    max_new_tokens=NEW,
                    eos_token_id=None,
                    pad_token_id=0,
                )
            greedy.append(new[0, length:].numpy())
        found[f"{name}/logits"], found[f"{name}/greedy"] = np.stack(rows), np.stack(greedy)
    np.savez_compressed(RECORD, **found)


if __name__ == "__main__":
    record()
