"""The paper's update, literally: five lines and a silo-wise ``jnp.quantile``.

This page is the method. :mod:`dst_optax.transform` computes the same subset exactly and fast; here
the rank is computed by ``jnp.quantile`` in float32, and so may be off by one in large silos. Every
tensor is a silo, and the seed is what ``init`` sees.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dst_optax import distances


class ReferenceState(NamedTuple):
    """State of :func:`dynamic_subset_tuning`."""

    seed: Any  # like params


def dynamic_subset_tuning(
    fraction_of_free_params: float = 0.1, *, distance: distances.Distance = distances.absolute
) -> optax.GradientTransformation:
    """Dynamic Subset Tuning by sorting; see :func:`dst_optax.dynamic_subset_tuning`.

    Args:
      fraction_of_free_params: fraction of each tensor that may differ from the seed, in [0, 1].
      distance: component-wise ``d(theta, theta_hat, theta_seed)``.

    Returns:
      A transform to be chained after an optimizer. Apply its updates with :func:`optax.apply_updates`,
      which leaves reverted entries off by a rounding error for a step.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from dst_optax import reference
      >>> tx = optax.chain(optax.sgd(1.0), reference.dynamic_subset_tuning(0.5))
      >>> params = jnp.zeros(5)
      >>> updates, _ = tx.update(jnp.arange(5.0), tx.init(params), params)
      >>> updates.tolist()
      [0.0, 0.0, 0.0, -3.0, -4.0]

    References:
      Stahlberg, Lichtarge, Kumar, *Dynamic Subset Tuning: Expanding the Operational Range of
      Parameter-Efficient Training for Large Language Models*, arXiv 2411.08610.
    """

    def init(params: Any) -> ReferenceState:
        return ReferenceState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ReferenceState]:
        def silo(u: jax.Array, theta: jax.Array, seed: jax.Array) -> jax.Array:
            theta_hat = theta + u
            delta = distance(seed, theta_hat, seed)
            q = jnp.quantile(delta, 1 - fraction_of_free_params, method="lower")
            return jnp.where(delta > q, u, seed - theta)

        return jax.tree.map(silo, updates, params, state.seed), state

    return optax.GradientTransformation(init, update)
