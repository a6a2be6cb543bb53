"""Checkpoints by their names on the Hugging Face hub."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from dst_optax import paths
from dst_optax.atomic import atomic_file

NAME = re.compile(r"(?P<model>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration, vocabulary and chat template."""
FILES = ("*.safetensors", *SETTINGS)
"""What of a model is wanted."""


def local_path(checkpoint: str, files: Sequence[str] = FILES) -> str:
    """Where a checkpoint lies on this machine.

    Args:
      checkpoint: a path, or the name of a model on the hub, ``owner/model`` or ``owner/model@revision``. What
        exists as a path is a path. A model that is not in the hub's cache is downloaded.
      files: patterns of what is wanted of it.

    Returns:
      The path; of a model on the hub, its directory in the cache.

    Raises:
      ValueError: the name is no path, and there is no such model in the cache and on the hub.

    Example:
      >>> local_path("/")
      '/'
    """
    name = NAME.fullmatch(checkpoint)
    if paths.require_local(checkpoint, "checkpoint").exists() or name is None:
        return checkpoint
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub import errors  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{checkpoint} does not exist. If it is a model on the Hugging Face hub, "
            "pip install 'dst-optax[hub]'."
        ) from error
    model, revision = name["model"], name["revision"]
    try:
        return huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=list(files))
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{checkpoint} is neither a path nor in the Hugging Face cache, and the hub cannot be reached. "
            f"Run 'hf download {model} --revision {revision or 'main'}' where there is a network and set "
            "HF_HOME to the directory that it fills; or give the path of a checkpoint."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise ValueError(
            f"{checkpoint} is no path, and the Hugging Face hub refuses it: {error} Check the name and the "
            "revision; private and gated models need 'hf auth login'."
        ) from error


def require_safetensors(checkpoint: Path) -> None:
    """Refuses a checkpoint of Hugging Face's without safetensors, as the hub's older ones are.

    Args:
      checkpoint: where it lies on this machine.

    Raises:
      ValueError: it has a ``config.json`` or pickled weights, but no safetensors.
    """
    is_one = (checkpoint / "config.json").is_file() or any(checkpoint.glob("pytorch_model*.bin*"))
    if is_one and not any(checkpoint.glob("*.safetensors*")):
        raise ValueError(
            f"{checkpoint} has no safetensors. If its files are incomplete, download all of them. Pickled "
            "weights are neither downloaded nor read: load such a model in transformers; save_pretrained "
            "writes safetensors into a directory that CHECKPOINT can name, with the tokenizer's files."
        )


def copy_settings(checkpoint: Path, directory: Path) -> None:
    """Copies what a checkpoint has beside its weights and ``config.json``, above all its tokenizer.

    Args:
      checkpoint: where it lies on this machine.
      directory: to copy into.
    """
    for file in sorted(file for pattern in SETTINGS for file in checkpoint.glob(pattern)):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            with atomic_file(directory / file.name) as temporary:
                shutil.copyfile(file, temporary)
