"""Loading T5 from whichever kind of checkpoint lies at a path."""

import os
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from dst_optax.finetuning import hub
from dst_optax.finetuning.models import checkpoints
from dst_optax.finetuning.models.t5 import huggingface, parameters, t5x
from dst_optax.finetuning.models.t5.config import T5Config
from dst_optax.subset import models


def load(
    path: str | os.PathLike[str], config: T5Config, dtype: DTypeLike | None = "float32"
) -> dict[str, Any]:
    """Loads parameters from a T5X or a Hugging Face checkpoint.

    Names and shapes are checked, all of them, before any value is read; so is ``config.json``.

    Args:
      path: a T5X checkpoint (``checkpoint_<step>``, legacy or Orbax), a directory of Hugging Face's
        (``model.safetensors`` or an index of shards), or one ``.safetensors`` file; safetensors may have
        T5X's names as well.
      config: the model's shape; with ``scan_layers`` its layers are stacked.
      dtype: dtype of the parameters; None keeps the checkpoint's.

    Returns:
      Parameters as numpy arrays in the host's memory; ``jax.device_put(params, t5.shardings(params,
      mesh))`` places them.

    Raises:
      ValueError: no such checkpoint, a damaged one, or one of another model.

    Example:
      >>> import dataclasses, tempfile, jax, jax.numpy as jnp
      >>> from dst_optax.finetuning.models import t5
      >>> config, tokens, path = t5.CONFIGS["tiny"], jnp.ones((1, 1), int), tempfile.mkdtemp()
      >>> params = t5.Transformer(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
      >>> t5.save_hf(params, config, path)
      >>> stacked = t5.load(path, dataclasses.replace(config, scan_layers=True), dtype="bfloat16")
      >>> stacked["encoder"]["encoder"]["mlp"]["wo"]["kernel"].shape
      (128, 2, 64)
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a T5X or a Hugging Face checkpoint.")
    hub.require_safetensors(path)
    arrays = models.open_model(path)
    if any("/" in name for name in arrays):
        return t5x.read(path, arrays, config, dtype)
    huggingface.check_config(path, config)
    arrays.pop(huggingface.UNUSED, None)
    table, shapes = huggingface.tensors(config), parameters.shapes(config)
    return parameters.unflatten(checkpoints.read(path, arrays, table, shapes, dtype))
