"""Distances d(theta, theta_hat, theta_seed): how much it costs to keep an entry at its seed.

A distance is component-wise and non-negative. It takes three arguments, so that it may weigh the
way from ``theta`` to ``theta_hat`` by the value the entry had in the seed model. The transform
calls it with float32 arrays at least, and with ``theta = theta_seed``: the cost of reverting. Below 0
it counts as 0; to find such a distance, functionalise the update with ``jax.experimental.checkify``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Distance = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def absolute(theta: jax.Array, theta_hat: jax.Array, theta_seed: jax.Array) -> jax.Array:
    """Absolute difference, ``|theta - theta_hat|``.

    Args:
      theta: values, any shape, float32 or float64.
      theta_hat: values to compare with, same shape and dtype.
      theta_seed: seed values, same shape and dtype; unused.

    Returns:
      Distances, same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import distances
      >>> distances.absolute(jnp.array([1.0, 2.0]), jnp.array([1.5, 0.0]), jnp.zeros(2)).tolist()
      [0.5, 2.0]
    """
    del theta_seed
    return jnp.abs(theta - theta_hat)


def squared(theta: jax.Array, theta_hat: jax.Array, theta_seed: jax.Array) -> jax.Array:
    """Squared difference, ``(theta - theta_hat)**2``.

    It ranks as :func:`absolute` does, except that small differences underflow to ties at zero.

    Args:
      theta: values, any shape, float32 or float64.
      theta_hat: values to compare with, same shape and dtype.
      theta_seed: seed values, same shape and dtype; unused.

    Returns:
      Distances, same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import distances
      >>> distances.squared(jnp.array([1.0, 2.0]), jnp.array([1.5, 0.0]), jnp.zeros(2)).tolist()
      [0.25, 4.0]
    """
    del theta_seed
    return jnp.square(theta - theta_hat)


def relative(theta: jax.Array, theta_hat: jax.Array, theta_seed: jax.Array, floor: float = 1e-6) -> jax.Array:
    """Difference relative to the seed, ``|theta - theta_hat| / max(|theta_seed|, floor)``.

    Without the floor every entry that is zero in the seed would outrank all others.

    Args:
      theta: values, any shape, float32 or float64.
      theta_hat: values to compare with, same shape and dtype.
      theta_seed: seed values, same shape and dtype.
      floor: smallest magnitude of the seed that is told apart, in units of the parameters.

    Returns:
      Distances, same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from dst_optax import distances
      >>> seed = jnp.array([4.0, 0.5])
      >>> distances.relative(seed, seed + 1.0, seed).tolist()
      [0.25, 2.0]
    """
    return jnp.abs(theta - theta_hat) / jnp.maximum(jnp.abs(theta_seed), jnp.asarray(floor, theta.dtype))
