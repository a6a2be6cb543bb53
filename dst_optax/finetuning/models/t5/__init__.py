"""T5 1.0, T5 1.1 and ByT5, with T5X's parameters and T5X and Hugging Face checkpoints."""

from dst_optax.finetuning.models.t5.checkpoints import load
from dst_optax.finetuning.models.t5.config import CONFIGS, T5Config
from dst_optax.finetuning.models.t5.decoding import decode
from dst_optax.finetuning.models.t5.huggingface import FAMILIES, config_of, save_hf
from dst_optax.finetuning.models.t5.model import T5
from dst_optax.finetuning.models.t5.network import Transformer
from dst_optax.finetuning.models.t5.parameters import (
    AXIS_RULES,
    logical_axes,
    num_params,
    shapes,
    shardings,
    stack_layers,
    unstack_layers,
)

__all__ = [
    "AXIS_RULES",
    "CONFIGS",
    "FAMILIES",
    "T5",
    "T5Config",
    "Transformer",
    "config_of",
    "decode",
    "load",
    "logical_axes",
    "num_params",
    "save_hf",
    "shapes",
    "shardings",
    "stack_layers",
    "unstack_layers",
]
