"""Named subsets on one resident seed model, switched in place."""

from dst_optax.serving.jax import SubsetStore

__all__ = ["SubsetStore"]
