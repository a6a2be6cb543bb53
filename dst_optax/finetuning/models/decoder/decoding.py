"""Greedy decoding with a cache of keys and values, compiled once per shape."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax.finetuning.models.decoder.network import Decoder


@partial(jax.jit, static_argnames=("model", "max_length", "eos_ids"))
def decode(
    model: Decoder,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    max_length: int,
    eos_ids: tuple[int, ...],
) -> jax.Array:
    """Continues each row of a batch with the likeliest next token, again and again.

    The loop ends as soon as every row has.

    Args:
      model: a decoder.
      params: its parameters, perhaps with a soft prompt.
      tokens: int, ``(batch, length)``: what is continued, each row from its first column on.
      lengths: int, ``(batch,)``: tokens of each row, at least 1; what comes after them is not looked at.
      max_length: tokens of a continuation at most, the end included.
      eos_ids: tokens that end a continuation.

    Returns:
      int32, ``(batch, max_length)``: continuations with their end, and the first of ``eos_ids`` after it.

    Raises:
      ValueError: ``max_length`` below 1 or no ``eos_ids``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import decoder
      >>> model = decoder.Decoder(decoder.DecoderConfig("qwen2", 32, 16, 2, 4, 2, 8, 24, tie_embeddings=True))
      >>> tokens = jnp.array([[7, 8, 0]])
      >>> params = model.init(jax.random.key(0), tokens)["params"]
      >>> decoder.decode(model, params, tokens, jnp.array([3]), max_length=6, eos_ids=(1,)).shape
      (1, 6)
    """
    if max_length < 1 or not eos_ids:
        raise ValueError(
            "decode takes max_length from 1 on and at least one of eos_ids, got "
            f"max_length={max_length!r}, eos_ids={eos_ids!r}."
        )
    prompt_length = params["prompt"].shape[0] if "prompt" in params else 0
    cache_length = prompt_length + tokens.shape[1] + max_length

    def next_tokens(cache: Any, tokens: jax.Array, **where: Any) -> tuple[jax.Array, Any]:
        logits, changed = model.apply(
            {"params": params, **cache}, tokens, cache_length=cache_length, mutable=["cache"], **where
        )
        return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), changed

    def unfinished(s: _Greedy) -> jax.Array:
        return (s.length < max_length) & ~s.ended.all()

    def body(s: _Greedy) -> _Greedy:
        last = jax.lax.dynamic_index_in_dim(s.tokens, s.length - 1, axis=1)
        token, cache = next_tokens(s.cache, last, positions=(prompt_length + lengths + s.length - 1)[:, None])
        token = jnp.where(s.ended, eos_ids[0], token)
        return _Greedy(
            s.length + 1, s.ended | _ends(token, eos_ids), s.tokens.at[:, s.length].set(token), cache
        )

    first, cache = next_tokens({}, tokens, at=(lengths - 1)[:, None])
    blank = jnp.full((tokens.shape[0], max_length), eos_ids[0], jnp.int32)
    start = _Greedy(jnp.int32(1), _ends(first, eos_ids), blank.at[:, 0].set(first), cache)
    return jax.lax.while_loop(unfinished, body, start).tokens


class _Greedy(NamedTuple):
    """Carry of the loop."""

    length: jax.Array  # int32, (): tokens there are of each continuation
    ended: jax.Array  # bool, (batch,)
    tokens: jax.Array  # int32, (batch, max_length)
    cache: Any


def _ends(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return (token[:, None] == jnp.array(eos_ids)).any(axis=1)
