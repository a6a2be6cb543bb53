"""Named subsets on one resident seed model, switched in place.

:class:`SubsetStore` holds JAX arrays, :class:`dst_optax.serving.torch.SubsetStore` a PyTorch module.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst_optax.serving.jax import SubsetStore

__all__ = ["SubsetStore"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dst_optax.serving import jax

        return getattr(jax, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
