"""Hugging Face checkpoints of every family: which table relates their tensors to our parameters."""

import dataclasses
import os
import re
from collections.abc import Container
from pathlib import Path

from dst_optax.finetuning.models import decoder, t5
from dst_optax.finetuning.models.named import read_config
from dst_optax.finetuning.models.t5.huggingface import tensors as t5_tensors
from dst_optax.subset import Subset, models
from dst_optax.subset.coordinates import Tensor


def tensors_of(directory: str | os.PathLike[str], *, stacked: bool) -> list[Tensor]:
    """The table of the model that a checkpoint's ``config.json`` describes.

    Args:
      directory: of the checkpoint.
      stacked: whether our parameters stack all layers, as ``scan_layers`` has them.

    Returns:
      One row a tensor.

    Raises:
      ValueError: there is no ``config.json``, or its model is of no family that we have.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> _ = (directory / "config.json").write_text('{"model_type": "t5"}')
      >>> tensors_of(directory, stacked=False)[-1].path
      'token_embedder/embedding'
    """
    config = dataclasses.replace(read_config(directory), scan_layers=stacked)
    return t5_tensors(config) if isinstance(config, t5.T5Config) else decoder.tensors(config)


def export_subset(directory: Path, checkpoint: Path) -> None:
    """Writes a run's subset once more as ``subset_hf``, for the Hugging Face checkpoint that it started from.

    Args:
      directory: holds ``subset``; values are rounded to the checkpoint's dtypes.
      checkpoint: with ``config.json``.
    """
    subset, model = Subset.load(directory / "subset"), models.open_model(checkpoint)
    table = tensors_of(checkpoint, stacked=is_stacked(subset, checkpoint))
    dtypes = [(f"^{re.escape(row.path)}$", model[row.name].dtype) for row in table]
    subset.astype(dtypes).to_hf(table, model).save(directory / "subset_hf")


def is_stacked(paths: Container[str], directory: str | os.PathLike[str]) -> bool:
    """Whether these are the paths of a model whose layers are stacked."""
    return all(row.path in paths for row in tensors_of(directory, stacked=True))
