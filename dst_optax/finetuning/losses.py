"""Cross entropy as T5X computes it: label smoothing and the z-loss."""

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    r"""Loss of every target token.

    With smoothing :math:`\alpha` over V classes the wanted distribution is :math:`1-\alpha` on the
    target and :math:`\alpha/(V-1)` elsewhere; its entropy is subtracted, so that 0 is the least loss.
    The z-loss adds :math:`z \log^2 Z`, Z the softmax's normaliser.

    Args:
      logits: (..., V), any float; computed in float32.
      targets: (...), int.
      label_smoothing: alpha.
      z_loss: z.

    Returns:
      Loss with the z-loss and the z-loss alone, (...), float32.

    Example:
      >>> import jax.numpy as jnp
      >>> loss, z = cross_entropy(jnp.zeros((1, 4)), jnp.zeros(1, int), z_loss=1.0)
      >>> float(loss[0] - z[0]) == float(jnp.log(4.0))
      True
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = log_z - right
    if label_smoothing:
        classes = logits.shape[-1]
        rest = label_smoothing / (classes - 1)
        entropy = -((1 - label_smoothing) * np.log1p(-label_smoothing) + label_smoothing * np.log(rest))
        others = classes * log_z - jnp.sum(logits, axis=-1) - loss
        loss = (1 - label_smoothing) * loss + rest * others - float(entropy)
    z = z_loss * jnp.square(log_z)
    return loss + z, z
