"""Floating-point arithmetic whose every bit is decided, whatever the compiler would rather do.

XLA may compute a value twice, rounded differently, and order work as it likes; ``lax.reduce_precision``
and ``lax.optimization_barrier`` do not prevent that on CPU. What does is a number that is zero and that the
compiler cannot know, :func:`opaque_zero`: it rounds values (:func:`force_rounding`) and puts them in memory
once and in order (:func:`in_memory`). Both are the identity, and have its derivative.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def promote(a: Any, b: Any) -> Any:
    """The dtype of ``a + b``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def add(p: jax.Array, u: jax.Array) -> jax.Array:
    """``p + u`` in the dtype of ``p``, as ``optax.apply_updates`` computes it."""
    both = promote(p.dtype, u.dtype)
    return (p.astype(both) + u.astype(both)).astype(p.dtype)


def difference(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """``a - b``, rounded to ``dtype``."""
    both = promote(b.dtype, dtype)
    return (a.astype(both) - b.astype(both)).astype(dtype)


def bits(x: jax.Array) -> jax.Array:
    """``x`` as unsigned integers."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def opaque_zero(passes: jax.Array) -> jax.Array:
    """A uint32 zero that the compiler cannot know, from a number that is never negative."""
    return (jnp.max(passes) >> 31).astype(jnp.uint32)


@jax.custom_jvp
def force_rounding(x: jax.Array, zero: jax.Array) -> jax.Array:
    """``x``, rounded to its dtype.

    XLA contracts a product and a sum, and carries half-precision sums on in float32: the same subset
    would then not be chosen on every mesh (test_updates_that_are_products_in_the_same_program).
    """
    own = bits(x)
    return lax.bitcast_convert_type(own ^ zero.astype(own.dtype), x.dtype)


@jax.custom_jvp
def in_memory(xs: list[jax.Array], zero: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """``xs``, computed once and not before ``zero`` is known, and a zero that waits for them.

    By a loop of no turns. Otherwise XLA computes them anew for each use, or those of all batches first,
    which takes four bytes a parameter (test_temporary_memory_is_that_of_one_batch).
    """
    return _no_turns(xs, zero)


def _no_turns(xs: list[jax.Array], zero: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    def turn(carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        left, arrays = carry
        return left >> 1, [~x if x.dtype == bool else -x for x in arrays]

    zero, xs = lax.while_loop(lambda carry: carry[0] != 0, turn, (zero, xs))
    return xs, zero


# What is computed beside a derivative is differentiated again for the second one, and a scan forgets these
# rules: so it is the loop, whose own derivative is the identity's, and not the bits, whose derivative is 0.


@force_rounding.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, zero), (tangent, _) = primals, tangents
    return _no_turns([x], zero)[0][0], tangent


@in_memory.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _no_turns(*primals), tangents
