"""Arithmetic that must round once, and alike wherever it is repeated.

Whether an entry is kept is decided by comparing bits. XLA may contract a product and a sum, carry
half-precision sums on in float32 or compute an array anew for each of its uses; here is what keeps
it from that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def promote(a: Any, b: Any) -> Any:
    """The dtype of ``a + b``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def wide(dtype: Any) -> Any:
    """The dtype in which distances are computed: float32 at least."""
    return promote(dtype, jnp.float32)


def bits(x: jax.Array) -> jax.Array:
    """``x`` as unsigned integers."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def add(p: jax.Array, u: jax.Array) -> jax.Array:
    """``p + u`` in the dtype of ``p``, as ``optax.apply_updates`` computes it."""
    both = promote(p.dtype, u.dtype)
    return (p.astype(both) + u.astype(both)).astype(p.dtype)


def back(seed: jax.Array, p: jax.Array, dtype: Any) -> jax.Array:
    """The update that asks for the seed, ``seed - p`` in the updates' dtype."""
    both = promote(p.dtype, dtype)
    return (seed.astype(both) - p.astype(both)).astype(dtype)


def asks_for_seed(u: jax.Array, seed: jax.Array, p: jax.Array) -> jax.Array:
    """Whether ``u = seed - p``: compared as bits, which the compiler must round, and never for NaN."""
    asked = back(seed, p, u.dtype)
    return (bits(u) == bits(asked)) & ~jnp.isnan(asked)


def settle(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x``, rounded once: no later sum may contract the product that it came from.

    Args:
      x: any floats.
      zero: int32 scalar that is zero, which the compiler must not know.
    """
    own = bits(x)
    return lax.bitcast_convert_type(own ^ zero.astype(own.dtype), x.dtype)


def settle_half(x: jax.Array, zero: jax.Array) -> jax.Array:
    """:func:`settle` for half precision, which alone may be carried on in float32."""
    return settle(x, zero) if x.dtype.itemsize <= 2 else x


def in_memory(xs: list[jax.Array], zero: jax.Array) -> list[jax.Array]:
    """``xs``, by a loop of no turns: XLA neither computes them again for every use nor before ``zero``."""
    return lax.while_loop(lambda c: c[0] != 0, lambda c: (c[0] >> 1, [-x for x in c[1]]), (zero, xs))[1]
