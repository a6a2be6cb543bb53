"""Settings that every test shares."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu must not be taken for a TPU

import hypothesis
import jax
import pytest

# The same examples at every run; `HYPOTHESIS_PROFILE=fuzz` draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture
def strict():
    """No silent promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
