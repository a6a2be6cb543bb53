"""One training step, and what is compiled for the runs of a method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_optax.finetuning.losses import cross_entropy
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.finetuning.recipe import Recipe


class TrainState(NamedTuple):
    """What a step changes."""

    frozen: Any  # parameters that stay
    tuned: Any  # parameters that are trained
    slots: Any  # the optimizer's state


def make_step(
    model: LanguageModel,
    method: Method,
    *,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the training step.

    Gradients of ``accumulate`` parts of the batch are summed before the one update, so a subset is
    selected once a step. The loss is the mean over the target tokens of the whole batch.

    Args:
      model: a T5 or a decoder.
      method: what is tuned, and how.
      accumulate: parts of a batch.
      label_smoothing: see :func:`~dst_optax.finetuning.losses.cross_entropy`.
      z_loss: likewise.

    Returns:
      A function of state, batch and random key, to be jitted, that returns the new state and ``loss``,
      ``z_loss``, ``accuracy`` (of tokens), ``tokens`` and ``grad_norm``.
    """

    def part(tuned: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Any]:
        targets = batch["decoder_target_tokens"]
        logits = model.logits(method.merge(frozen, tuned), batch, key)
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        losses, z = cross_entropy(logits, targets, label_smoothing, z_loss)
        right = (jnp.argmax(logits, -1) == targets).astype(jnp.float32)
        sums = {
            "loss": jnp.sum(losses * weights),
            "z_loss": jnp.sum(z * weights),
            "accuracy": jnp.sum(right * weights),
        }
        return sums["loss"], sums

    def gradients(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any]:
        grad = jax.grad(part, has_aux=True)
        if accumulate == 1:
            return grad(state.tuned, state.frozen, batch, key)

        def add(total: Any, piece_and_key: Any) -> tuple[Any, None]:
            piece, key = piece_and_key
            return jax.tree.map(jnp.add, total, grad(state.tuned, state.frozen, piece, key)), None

        parts = {k: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1) for k, x in batch.items()}
        pieces = (parts, jax.random.split(key, accumulate))
        like = jax.eval_shape(grad, state.tuned, state.frozen, *jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add, zeros, pieces)[0]

    def step(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.maximum(jnp.sum(batch["decoder_loss_weights"].astype(jnp.float32)), 1.0)
        grads, sums = gradients(state, batch, key)
        grads = jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads)
        tuned, slots = method.update(grads, state.slots, state.tuned)
        measured = {name: total / tokens for name, total in sums.items()}
        measured["tokens"] = tokens
        squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
        measured["grad_norm"] = jnp.sqrt(jnp.sum(jnp.stack(squares)))
        return TrainState(state.frozen, tuned, slots), measured

    return step


@dataclass(frozen=True, eq=False)
class Programs:
    """What a method's runs compute, compiled once for all of them.

    Attributes:
      method: whose runs.
      step: see :func:`make_step`; it takes over the buffers of the state.
      mark: see :class:`~dst_optax.finetuning.methods.Method`.
      measure: its ``metrics``.
      largest: the largest magnitude of tuned parameters.
    """

    method: Method
    step: Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]
    mark: Callable[[Any, Any], Any]
    measure: Callable[[Any, Any, Any], dict[str, jax.Array]]
    largest: Callable[[Any], jax.Array]

    @classmethod
    def of(cls, model: LanguageModel, method: Method, recipe: Recipe) -> "Programs":
        """Those of a method."""
        step = make_step(
            model,
            method,
            accumulate=recipe.accumulate,
            label_smoothing=recipe.label_smoothing,
            z_loss=recipe.z_loss,
        )
        step = jax.jit(step, donate_argnums=0)
        return cls(method, step, jax.jit(method.mark), jax.jit(method.metrics), jax.jit(_largest))


def _largest(tuned: Any) -> jax.Array:
    return jnp.max(
        jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(jnp.float32) for x in jax.tree.leaves(tuned)])
    )
