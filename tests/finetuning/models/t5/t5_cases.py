"""Models, inputs and weights that the tests of T5 share.

Run as a script, it records what ``transformers`` makes of them in ``transformers.npz``; with the
argument ``t5x``, what T5X's own network makes of them in ``t5x.npz``.
"""

import dataclasses
import functools
import pathlib
import sys
import zlib

import jax
import numpy as np

from dst_optax.finetuning.models import t5

RECORD = pathlib.Path(__file__).with_name("transformers.npz")
T5X_RECORD = pathlib.Path(__file__).with_name("t5x.npz")
LENGTH = 8
EOS = {"v1_0": 2, "v1_1": 14, "byt5": 127}  # tokens that these weights like to make

_V1_1 = t5.T5Config(
    vocab_size=48, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2, head_dim=8, mlp_dim=24
)
CONFIGS = {
    "v1_0": dataclasses.replace(_V1_1, mlp_activations=("relu",), logits_via_embedding=True),
    "v1_1": _V1_1,
    "byt5": dataclasses.replace(
        _V1_1, vocab_size=384, num_encoder_layers=3, num_decoder_layers=1, num_heads=3, head_dim=4
    ),
}
VARIANTS = {
    "ul2": dataclasses.replace(
        _V1_1, mlp_activations=("silu", "linear"), relpos_max_distance=64, norm_epsilon=1e-2
    ),
    "gated_relu": dataclasses.replace(_V1_1, mlp_activations=("relu", "linear"), relpos_buckets=12),
    "gelu": dataclasses.replace(_V1_1, mlp_activations=("gelu",), logits_via_embedding=True),
}
"""Other T5s that transformers has; T5X's example has not all of them."""


def weights(config, scale=0.4):
    """Parameters as waves: the same on every machine, and large enough to tell tokens apart."""

    def wave(path, shape):
        n = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        x = np.sin(n * n * 0.7 + zlib.crc32(path.encode()) % 1000)
        return np.asarray(1 + 0.3 * x if path.endswith("scale") else scale * x, np.float32)

    unstacked = dataclasses.replace(config, scan_layers=False)
    params = t5.parameters.unflatten({p: wave(p, s) for p, s in t5.shapes(unstacked).items()})
    params["token_embedder"]["embedding"] /= scale
    return t5.stack_layers(params) if config.scan_layers else params


def batch(config, inputs=40, targets=7):
    """Inputs with padding, decoder inputs and targets, int32."""
    rng = np.random.default_rng(3)
    x = rng.integers(2, config.vocab_size, (3, inputs)).astype(np.int32)
    x[1, inputs // 2 :] = 0
    x[2, 3:] = 0
    y = rng.integers(2, config.vocab_size, (3, targets)).astype(np.int32)
    return x, np.pad(y, ((0, 0), (1, 0)))[:, :-1], y


def packed(config):
    """The batch as if each row held two examples: tokens, segments and positions."""
    tokens = batch(config)
    ends = [np.arange(a.shape[1]) >= a.shape[1] // 2 for a in (tokens[0], tokens[2])]
    segments = [np.where(a > 0, 1 + end, 0) for a, end in zip((tokens[0], tokens[2]), ends, strict=True)]
    positions = [np.tile(np.arange(a.shape[1]), (len(a), 1)) for a in (tokens[0], tokens[2])]
    return *tokens, *segments, *positions


def logits(config, params, *tokens):
    return np.asarray(_logits(config, params, *tokens))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, *tokens):
    return t5.Transformer(config).apply({"params": params}, *tokens, enable_dropout=False)


def hugging_face(path):
    """transformers' own T5 at a path, every weight found and used."""
    import transformers

    model, info = transformers.T5ForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model.eval()


def hugging_face_logits(model, x, y_in):
    import torch

    x, y_in = torch.tensor(x).long(), torch.tensor(y_in).long()
    with torch.no_grad():
        return model(input_ids=x, attention_mask=x > 0, decoder_input_ids=y_in).logits.numpy()


def hugging_face_greedy(model, x, eos_id):
    """Generated tokens without the start, padded to LENGTH."""
    import torch

    x = torch.tensor(x).long()
    with torch.no_grad():
        found = model.generate(
            x, attention_mask=x > 0, do_sample=False, num_beams=1, max_new_tokens=LENGTH, eos_token_id=eos_id
        )
    found = found.numpy()[:, 1:]
    return np.pad(found, ((0, 0), (0, LENGTH - found.shape[1])))


def record():
    import tempfile

    found = {}
    for name, config in (CONFIGS | VARIANTS).items():
        with tempfile.TemporaryDirectory() as path:
            t5.save_hf(weights(config), config, path)
            model = hugging_face(path)
        x, y_in, _ = batch(config)
        found[f"{name}/logits"] = hugging_face_logits(model, x, y_in)
        if name in EOS:
            found[f"{name}/greedy"] = hugging_face_greedy(model, x, EOS[name])
    np.savez_compressed(RECORD, **found)


def record_t5x():
    """Needs T5X, or of it only ``t5x/examples/t5`` on the path."""
    from t5x.examples.t5 import network

    found = {}
    for name, config in CONFIGS.items():
        known = {field.name for field in dataclasses.fields(network.T5Config)}
        fields = {k: v for k, v in dataclasses.asdict(config).items() if k in known}
        model = network.Transformer(network.T5Config(**fields | {"mlp_activations": config.mlp_activations}))
        variables = {"params": weights(config)}
        for kind, tokens in (("logits", batch(config)), ("packed", packed(config))):
            found[f"{name}/{kind}"] = np.asarray(model.apply(variables, *tokens, enable_dropout=False))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *batch(config))["params"]
        found[f"{name}/names"] = np.array(
            [f"{p} {x.shape}" for p, x in t5.parameters.flatten(shapes).items()]
        )
    np.savez_compressed(T5X_RECORD, **found)


if __name__ == "__main__":
    record_t5x() if sys.argv[1:] == ["t5x"] else record()
