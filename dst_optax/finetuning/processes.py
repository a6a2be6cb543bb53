"""Several processes of one program on one file system: the first one writes, all wait for it."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_primary() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def barrier(what: str) -> None:
    """Waits until all processes are here.

    Args:
      what: the place, the same in all processes.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(asks: bool) -> bool:
    """Whether any process asks for something, known to all of them."""
    if jax.process_count() == 1:
        return asks
    return bool(np.any(multihost_utils.process_allgather(np.array(asks))))


def on_host(tree: Any) -> Any:
    """Whole arrays as numpy's, also where they lie on devices of several processes.

    Example:
      >>> import jax.numpy as jnp
      >>> on_host({"w": jnp.ones(2)})
      {'w': array([1., 1.], dtype=float32)}
    """

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
