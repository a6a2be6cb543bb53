"""The loss against T5X's formula, spelled out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dst_optax.finetuning.losses import cross_entropy


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 9),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.sampled_from([0.0, 1e-4, 0.5]),
)
def test_is_cross_entropy_with_a_smooth_target_less_its_entropy_plus_z(seed, classes, smoothing, z):
    random = np.random.default_rng(seed)
    logits = 3 * random.standard_normal((2, 3, classes)).astype(np.float32)
    targets = random.integers(0, classes, (2, 3))
    wanted = np.where(np.eye(classes)[targets] == 1, 1 - smoothing, smoothing / (classes - 1))
    log_z = np.log(np.sum(np.exp(logits.astype(np.float64)), -1))
    entropy = -np.sum(np.where(wanted > 0, wanted * np.log(np.maximum(wanted, 1e-30)), 0), -1)
    want = np.sum(wanted * (log_z[..., None] - logits), -1) - entropy
    loss, z_part = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing, z)
    np.testing.assert_allclose(z_part, z * log_z**2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss - z_part, want, rtol=1e-4, atol=1e-4)


def test_half_precision_logits_are_widened():
    logits = jnp.asarray([[5.0, -3.0, 0.5]], jnp.bfloat16)
    loss, _ = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(float(np.log(np.exp(8) + 1 + np.exp(3.5))), rel=1e-6)
