"""Double precision for a block of a test (``jax.enable_x64`` is younger than the oldest supported jax)."""

import contextlib

import jax


@contextlib.contextmanager
def x64(on=True):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
