"""Models by name, by configuration, or by checkpoint, whichever family they are of."""

import difflib
import json
import os
from pathlib import Path
from typing import Any

from dst_optax.finetuning import hub
from dst_optax.finetuning.models import decoder, t5
from dst_optax.finetuning.models.base import LanguageModel


def language_model(model: Any) -> LanguageModel:
    """The model of a configuration or a published name.

    Args:
      model: a ``T5Config`` or ``DecoderConfig``, the name of a published one, a Hugging Face checkpoint whose
        ``config.json`` is read (a directory, or a name on the hub), or a model already.

    Raises:
      ValueError: no such name, or no configuration that is supported.

    Example:
      >>> language_model("t5_1_1_small").decoder_only
      False
    """
    if isinstance(model, str):
        model = _config_of(model)
    if isinstance(model, t5.T5Config):
        return t5.T5(model)
    return decoder.CausalLM(model) if isinstance(model, decoder.DecoderConfig) else model


def _config_of(model: str) -> Any:
    published = t5.CONFIGS | decoder.CONFIGS
    if model in published:
        return published[model]
    path = hub.local_path(model)
    if Path(path).exists():
        return read_config(path)
    nearest = difflib.get_close_matches(model, published, 1, cutoff=0)[0]
    raise ValueError(
        f"unknown model {model!r}; did you mean {nearest}? Known are {', '.join(published)}, and directories "
        "of Hugging Face checkpoints."
    )


def read_config(directory: str | os.PathLike[str]) -> Any:
    """The configuration of a Hugging Face checkpoint, whichever family it is of.

    Args:
      directory: holds ``config.json``.

    Returns:
      A ``T5Config`` or a ``DecoderConfig``; how to compute has its defaults.

    Raises:
      ValueError: there is no such file, or its model is of no family that we have.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> _ = (directory / "config.json").write_text('{"model_type": "t5", "d_model": 64}')
      >>> read_config(directory).emb_dim
      64
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{directory} holds no config.json, so its shape is not known. Download all files of the "
            "checkpoint; of one of T5X, MODEL is the name of the published model, such as t5_1_1_small."
        )
    try:
        family = json.loads(file.read_text()).get("model_type", "t5")
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{file} cannot be read as the configuration of a model: {e}.") from e
    if family in decoder.FAMILIES:
        return decoder.read_config(directory)
    if family in t5.FAMILIES:
        return t5.config_of(directory)
    raise ValueError(
        f"{file}: model_type {family!r} is not supported; {', '.join((*t5.FAMILIES, *decoder.FAMILIES))} are."
    )
