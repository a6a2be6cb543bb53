"""Greedy decoding with a cache of keys and values, compiled once per shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax.finetuning.models.t5.network import Transformer

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


@partial(jax.jit, static_argnames=("model", "max_length", "eos_id"))
def decode(
    model: Transformer,
    params: Any,
    encoder_input_tokens: jax.Array,
    max_length: int,
    eos_id: int = 1,
) -> jax.Array:
    """Targets of a batch of inputs, each token the likeliest after those before it.

    The loop ends as soon as every target of the batch has; a row of padding alone has an empty one.

    Args:
      model: a T5.
      params: its parameters.
      encoder_input_tokens: int, ``(batch, inputs)``, padded with 0.
      max_length: tokens of a target at most, the end included.
      eos_id: the token that ends a target.

    Returns:
      int32, ``(batch, max_length)``: targets with their end, padded with 0.

    Raises:
      ValueError: ``max_length`` below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> model = t5.Transformer(t5.CONFIGS["tiny"])
      >>> inputs = jnp.array([[7, 8, 1, 0]])
      >>> params = model.init(jax.random.key(0), inputs, inputs, inputs)["params"]
      >>> t5.decode(model, params, inputs, max_length=6).shape
      (1, 6)
    """
    if max_length < 1:
        raise ValueError(f"decode takes max_length from 1 on, got {max_length!r}.")
    variables = {"params": params}
    encoded: Any = model.apply(variables, encoder_input_tokens, method="encode")

    def apply(variables: Any, tokens: jax.Array, position: jax.Array, mutable: list[str]) -> Any:
        return model.apply(
            variables,
            encoded,
            encoder_input_tokens,
            tokens,
            position,
            max_length,
            method="decode_step",
            mutable=mutable,
        )

    # of a first step only what it remembers is wanted: the rest of it is never computed
    _, memory = apply(variables, encoder_input_tokens[:, 0], jnp.int32(0), ["cache", "memory"])
    cache = jax.tree.map(jnp.zeros_like, memory["cache"])
    variables["memory"] = memory["memory"]

    def step(cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        logits, changed = apply({**variables, "cache": cache}, tokens, position, ["cache"])
        return logits, changed["cache"]

    return _greedy(step, cache, (encoder_input_tokens == 0).all(axis=1), max_length, eos_id)


class _Greedy(NamedTuple):
    """Carry of the greedy loop."""

    position: jax.Array  # int32, ()
    last: jax.Array  # int32, (batch,)
    ended: jax.Array  # bool, (batch,)
    tokens: jax.Array  # int32, (batch, max_length)
    cache: Any


def _greedy(step: Step, cache: Any, empty: jax.Array, max_length: int, eos_id: int) -> jax.Array:
    batch = empty.size

    def unfinished(s: _Greedy) -> jax.Array:
        return (s.position < max_length) & ~s.ended.all()

    def body(s: _Greedy) -> _Greedy:
        logits, cache = step(s.cache, s.last, s.position)
        token = jnp.where(s.ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = s.tokens.at[:, s.position].set(token)
        return _Greedy(s.position + 1, token, s.ended | (token == eos_id), tokens, cache)

    start = _Greedy(
        jnp.int32(0),
        jnp.zeros(batch, jnp.int32),
        empty,
        jnp.zeros((batch, max_length), jnp.int32),
        cache,
    )
    return jax.lax.while_loop(unfinished, body, start).tokens
