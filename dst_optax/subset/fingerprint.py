"""A 128-bit fingerprint of a tensor that does not depend on how it is sharded.

Four lanes of 32 bits. An entry with bits x at row-major index i, both split in 32-bit words, gives

    lane_j = mix(x_lo * A_j + x_hi * B_j + i_lo * C_j + i_hi * D_j + E_j)      mod 2**32

to each lane j, and a lane is the sum over all entries, plus a part of SHA-256 of dtype and shape. Sums
are the same in any order, so every device adds up what it holds, and streams need not be aligned.
``mix`` is the finalizer of MurmurHash3, and the constants are in :mod:`dst_optax.subset.fingerprint_numpy`.
The fingerprint tells models apart that differ by accident; it is no protection against someone who looks
for a collision.
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from dst_optax.subset import fingerprint_numpy, trees


def fingerprint(x: Any) -> str:
    """Fingerprint of a tensor.

    Args:
      x: numpy or jax array, any shape, dtype and sharding. Where it spans processes, all of them must
        call.

    Returns:
      32 hexadecimal digits, the same on every process.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from dst_optax.subset.fingerprint import fingerprint
      >>> fingerprint(np.ones((2, 3), np.float32))
      '79864dea55c02322131571a7ef041457'
      >>> fingerprint(jnp.ones((2, 3))) == fingerprint(np.ones((2, 3), np.float32))
      True
    """
    return next(fingerprints([x]))


def fingerprints(arrays: Iterable[Any]) -> Iterator[str]:
    """Fingerprints of many tensors; one exchange between processes for all that span them.

    Args:
      arrays: numpy or jax arrays; read one after another.

    Yields:
      32 hexadecimal digits for each.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset.fingerprint import fingerprint, fingerprints
      >>> a, b = np.zeros(3, np.float32), np.ones(3, np.float32)
      >>> list(fingerprints([a, b])) == [fingerprint(a), fingerprint(b)]
      True
    """
    pending = [(_salt(x.dtype, x.shape), _partial(x), trees.spans_processes(x)) for x in arrays]
    if any(spans for _, _, spans in pending):
        from jax.experimental import multihost_utils

        local = np.stack([np.asarray(p) if spans else np.zeros(4, np.uint32) for _, p, spans in pending])
        total = np.asarray(multihost_utils.process_allgather(local)).sum(0, dtype=np.uint32)
    else:
        total = None
    for i, (salt, partial, spans) in enumerate(pending):
        lanes = total[i] if spans and total is not None else np.asarray(partial)
        yield (lanes + salt).astype(">u4").tobytes().hex()


def _salt(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    text = f"{np.dtype(dtype).name}{list(shape)}"
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], ">u4").astype(np.uint32)


def _partial(x: Any) -> Any:
    """Lanes of what this process holds of ``x``, each entry once; (4,) uint32."""
    if "jax" not in sys.modules:
        return fingerprint_numpy.lanes(np.asarray(x))
    from dst_optax.subset import fingerprint_jax  # a compiled program is several times as fast

    return fingerprint_jax.lanes(x)


def changed(fingerprint: str, positions: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """The fingerprint of a tensor after some entries have changed; costs as much as they are many.

    Args:
      fingerprint: of the tensor before.
      positions: (k,) row-major positions.
      before: (k,) values that were there.
      after: (k,) values that are there now, of the same dtype.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset.fingerprint import changed, fingerprint
      >>> x = np.arange(9, dtype=np.float32)
      >>> new = changed(fingerprint(x), np.array([2]), x[[2]], np.array([7], np.float32))
      >>> x[2] = 7
      >>> new == fingerprint(x)
      True
    """
    old = np.frombuffer(bytes.fromhex(fingerprint), ">u4").astype(np.uint32)
    gone, come = (fingerprint_numpy.lanes_of_entries(x, positions) for x in (before, after))
    return (old - gone + come).astype(">u4").tobytes().hex()
