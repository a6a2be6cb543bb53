"""Optimizers that gin can spell."""

import optax


def clipped(optimizer: optax.GradientTransformation, max_norm: float = 1.0) -> optax.GradientTransformation:
    """An optimizer that sees gradients of bounded global norm.

    Args:
      optimizer: any optax optimizer.
      max_norm: bound.

    Returns:
      ``optax.chain(optax.clip_by_global_norm(max_norm), optimizer)``.

    Example:
      >>> import optax
      >>> tx = clipped(optax.sgd(1.0), max_norm=0.5)
    """
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)
