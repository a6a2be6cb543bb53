"""Greedy and beam decoding with a cache of keys and values, compiled once per shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax.finetuning.models.t5.network import Transformer

Step = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


@partial(jax.jit, static_argnames=("model", "max_length", "num_beams", "eos_id", "alpha"))
def decode(
    model: Transformer,
    params: Any,
    encoder_input_tokens: jax.Array,
    max_length: int,
    num_beams: int = 1,
    eos_id: int = 1,
    alpha: float = 0.6,
) -> jax.Array:
    r"""The likeliest targets of a batch of inputs, as far as greedy or beam search finds them.

    A target :math:`y` scores :math:`\log p(y) / ((5 + |y|) / 6)^\alpha` in beam search. The loop ends
    as soon as every target of the batch has; a row of padding alone has an empty one.

    Args:
      model: a T5.
      params: its parameters.
      encoder_input_tokens: int, ``(batch, inputs)``, padded with 0.
      max_length: tokens of a target at most, the end included.
      num_beams: 1 is greedy search.
      eos_id: the token that ends a target.
      alpha: how much beam search favours long targets.

    Returns:
      int32, ``(batch, max_length)``: targets with their end, padded with 0.

    Raises:
      ValueError: ``max_length`` or ``num_beams`` below 1, ``alpha`` below 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> model = t5.Transformer(t5.CONFIGS["tiny"])
      >>> inputs = jnp.array([[7, 8, 1, 0]])
      >>> params = model.init(jax.random.key(0), inputs, inputs, inputs)["params"]
      >>> t5.decode(model, params, inputs, max_length=6).shape
      (1, 6)

    References:
      Wu et al., Google's Neural Machine Translation System, arXiv 1609.08144.
    """
    if max_length < 1 or num_beams < 1 or alpha < 0:
        raise ValueError(
            "decode takes max_length and num_beams from 1 and alpha from 0 on, got "
            f"max_length={max_length!r}, num_beams={num_beams!r}, alpha={alpha!r}."
        )
    variables = {"params": params}
    encoded: Any = model.apply(variables, encoder_input_tokens, method="encode")
    encoded, inputs = (jnp.repeat(x, num_beams, axis=0) for x in (encoded, encoder_input_tokens))

    def apply(variables: Any, tokens: jax.Array, position: jax.Array, mutable: list[str]) -> Any:
        return model.apply(
            variables, encoded, inputs, tokens, position, max_length, method="decode_step", mutable=mutable
        )

    # of a first step only what it remembers is wanted: the rest of it is never computed
    _, memory = apply(variables, inputs[:, 0], jnp.int32(0), ["cache", "memory"])
    cache = jax.tree.map(jnp.zeros_like, memory["cache"])
    variables["memory"] = memory["memory"]

    def step(cache: Any, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        logits, changed = apply({**variables, "cache": cache}, tokens, position, ["cache"])
        return logits, changed["cache"]

    empty = (encoder_input_tokens == 0).all(axis=1)
    if num_beams == 1:
        return _greedy(step, cache, empty, max_length, eos_id)
    batch_axis = 1 if model.config.scan_layers else 0
    return _beam(step, cache, batch_axis, empty, max_length, num_beams, eos_id, alpha)


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


class _Beam(NamedTuple):
    """Carry of the beam loop: ``beams`` targets that go on and ``beams`` that have ended, best first."""

    position: jax.Array  # int32, ()
    last: jax.Array  # int32, (batch * beams,)
    live_scores: jax.Array  # float32, (batch, beams): log-probabilities
    live: jax.Array  # int32, (batch, beams, max_length)
    ended_scores: jax.Array  # float32, (batch, beams): log-probabilities over the length's penalty
    ended: jax.Array  # int32, (batch, beams, max_length)
    cache: Any


def _beam(
    step: Step,
    cache: Any,
    batch_axis: int,
    empty: jax.Array,
    max_length: int,
    beams: int,
    eos_id: int,
    alpha: float,
) -> jax.Array:
    batch = empty.size

    def penalty(length: Any) -> jax.Array:
        return jnp.asarray((5 + length) / 6, jnp.float32) ** alpha

    def unfinished(s: _Beam) -> jax.Array:
        # log-probabilities only fall, so that no target that goes on will score above this
        hope = s.live_scores[:, 0] / penalty(max_length)
        return (s.position < max_length) & (hope > s.ended_scores[:, 0]).any()

    def body(s: _Beam) -> _Beam:
        logits, cache = step(s.cache, s.last, s.position)
        scores = jax.nn.log_softmax(logits).reshape(batch, beams, -1) + s.live_scores[..., None]
        vocab = scores.shape[-1]
        # at most one continuation of each beam ends it, so that half of these go on
        scores, choice = jax.lax.top_k(scores.reshape(batch, -1), 2 * beams)
        parent, token = choice // vocab, choice % vocab
        tokens = _rows(s.live, parent).at[:, :, s.position].set(token)
        ends = token == eos_id

        live_scores, going = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
        parents = _rows(parent, going) + beams * jnp.arange(batch)[:, None]
        cache = jax.tree.map(lambda x: jnp.take(x, parents.ravel(), axis=batch_axis), cache)

        final = jnp.where(ends, scores / penalty(s.position + 1), -jnp.inf)
        ended_scores, best = jax.lax.top_k(jnp.concatenate([s.ended_scores, final], axis=1), beams)
        return _Beam(
            s.position + 1,
            _rows(token, going).ravel(),
            live_scores,
            _rows(tokens, going),
            ended_scores,
            _rows(jnp.concatenate([s.ended, tokens], axis=1), best),
            cache,
        )

    nothing = jnp.full((batch, beams), -jnp.inf)
    blank = jnp.zeros((batch, beams, max_length), jnp.int32)
    first = nothing.at[:, 0].set(jnp.where(empty, -jnp.inf, 0.0))
    start = _Beam(jnp.int32(0), jnp.zeros(batch * beams, jnp.int32), first, blank, nothing, blank, cache)
    s = jax.lax.while_loop(unfinished, body, start)
    any_ended = jnp.isfinite(s.ended_scores[:, :1])
    return jnp.where(empty[:, None], 0, jnp.where(any_ended, s.ended[:, 0], s.live[:, 0]))


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """``x[b, index[b, i]]`` for each batch entry ``b``."""
    return jax.vmap(lambda x, index: x[index])(x, index)
