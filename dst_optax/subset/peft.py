"""Export to PEFT's SHiRA adapters: sparse additive deltas of linear layers.

An adapter adds ``value - seed`` to the seed's weight, which rounds; the exact way is
:func:`dst_optax.subset.models.apply_to_files`. SHiRA gives every layer ``r * (rows + columns)`` entries, so
layers with fewer are filled up with deltas of zero.
"""

import json
import os
import pathlib
import re

import numpy as np
import safetensors.numpy

from dst_optax.atomic import atomic_file
from dst_optax.paths import require_local
from dst_optax.subset.core import Subset
from dst_optax.subset.entries import Entries
from dst_optax.subset.errors import SubsetError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NOT_LINEAR = (
    r"embed(?!_out)|shared|wte|wpe|relative_attention_bias"  # torch.nn.Embedding
    r"|(c_attn|q_attn|c_fc|c_proj)\.weight|(gate|router)\.weight"  # GPT-2's Conv1D; routers of experts
)
"""Matrices of the models in transformers that belong to no ``torch.nn.Linear``, the one layer that PEFT's
SHiRA takes."""


def save_shira(
    subset: Subset,
    directory: str | os.PathLike[str],
    base_model: str | None = None,
    not_linear: str = NOT_LINEAR,
) -> None:
    """Writes a subset as a SHiRA adapter for ``peft.PeftModel.from_pretrained``.

    Args:
      subset: with seed values; its paths are PyTorch's, ``a.b.weight``, as safetensors of Hugging Face have.
      directory: local; made if it is missing. An adapter of SHiRA in it is replaced.
      base_model: name or path of the seed model for the adapter's configuration.
      not_linear: regex of matrices that belong to no ``torch.nn.Linear``.

    Raises:
      SubsetError: seed values are missing, or a tensor with entries cannot be expressed: it is no matrix of a
        linear layer, or so many entries differ elsewhere that it cannot be filled up; or another adapter is
        in the directory. Nothing is written.
      ValueError: the directory lies in an object store.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from dst_optax import subset
      >>> from dst_optax.subset import peft
      >>> seed = {"proj.weight": np.zeros((4, 4), np.float32)}
      >>> tuned = {"proj.weight": np.eye(4, dtype=np.float32)}
      >>> extracted = subset.from_models(seed, tuned, with_seed_values=True)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     peft.save_shira(extracted, directory)
      ...     print(sorted(os.listdir(directory)))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    target = require_local(directory, "directory")
    _check_replaceable(target)
    try:
        others = re.compile(not_linear)
    except re.error as e:
        raise SubsetError(f"not_linear: {not_linear!r} is no regular expression: {e}.") from e
    if not subset.has_seed_values:
        raise SubsetError("SHiRA stores differences: extract the subset with with_seed_values=True.")
    filled = {path: e for path, e in subset.items() if len(e)}
    if not filled:
        raise SubsetError("the subset is empty; there is nothing to export.")
    for path, e in filled.items():
        if len(e.shape) != 2 or not path.endswith(".weight") or others.search(path):
            raise SubsetError(
                f"{path!r} of shape {list(e.shape)} has {len(e)} entries and is not the weight of a linear "
                "layer; SHiRA cannot express it. Merge the subset into the model instead; where not_linear "
                "mistakes the name, give another regex."
            )
    rank = max(-(-len(e) // sum(e.shape)) for e in filled.values())
    tensors = {}
    for path, e in filled.items():
        count = rank * sum(e.shape)
        if count > e.size:
            raise SubsetError(
                f"{path!r} of shape {list(e.shape)} has fewer entries than the {count} that SHiRA gives it "
                f"at the rank {rank}, which the densest layer needs. Merge the subset into the model instead."
            )
        positions, delta = _filled_up(e, count)
        name = f"base_model.model.{path.removesuffix('.weight')}"
        tensors[f"{name}.shira_weight"] = delta
        tensors[f"{name}.shira_indices"] = np.stack(np.unravel_index(positions, e.shape)).astype(np.int32)
    modules = [path.removesuffix(".weight") for path in filled]
    config = {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "target_modules": "|".join(re.escape(m) for m in modules),  # a regex of whole names
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "task_type": None,
    }
    target.mkdir(parents=True, exist_ok=True)
    with atomic_file(target / WEIGHTS) as temporary:
        safetensors.numpy.save_file(tensors, temporary, {"format": "pt"})
    with atomic_file(target / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1))


def _check_replaceable(directory: pathlib.Path) -> None:
    """Raises if an adapter of another kind is there."""
    if not any((directory / name).exists() for name in (WEIGHTS, CONFIG)):
        return
    try:
        kind = json.loads((directory / CONFIG).read_text())["peft_type"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = "unknown"
    if kind != "SHIRA":
        raise SubsetError(
            f"{directory} holds an adapter of the kind {kind!r}, which would be overwritten; give this one a "
            "directory of its own."
        )


def _filled_up(e: Entries, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and float32 deltas, filled up with zeros at the first positions that are free."""
    assert e.seed_values is not None
    delta = np.zeros(count, np.float32)
    delta[: len(e)] = e.values.astype(np.float32) - e.seed_values.astype(np.float32)
    free = np.setdiff1d(np.arange(min(e.size, count)), e.positions, assume_unique=True)
    positions = np.concatenate([e.positions, free[: count - len(e)]])
    order = np.argsort(positions)
    return positions[order], delta[order]
