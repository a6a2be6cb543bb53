"""Named subsets on one resident seed model, switched in place.

:class:`SubsetStore` holds JAX arrays; :class:`dst_optax.serving.torch.SubsetStore` a PyTorch module.
"""

from dst_optax.serving.jax import SubsetStore

__all__ = ["SubsetStore"]
