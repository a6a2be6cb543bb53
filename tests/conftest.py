"""Settings that every test shares."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu must not be taken for a TPU

import jax
import pytest


@pytest.fixture
def strict():
    """No silent promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
