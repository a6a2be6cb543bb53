"""Decoder-only models: Llama, SmolLM2, Qwen 2.5, Qwen 3 and Gemma 3 text, as Hugging Face ships them."""

from dst_optax.finetuning.models.decoder.config import CONFIGS, FAMILIES, DecoderConfig, Rope
from dst_optax.finetuning.models.decoder.config_json import config_text, read_config
from dst_optax.finetuning.models.decoder.decoding import decode
from dst_optax.finetuning.models.decoder.huggingface import Tensor, load, save_hf, tensors
from dst_optax.finetuning.models.decoder.model import CausalLM
from dst_optax.finetuning.models.decoder.network import Decoder
from dst_optax.finetuning.models.decoder.parameters import (
    AXIS_RULES,
    axes,
    num_params,
    shapes,
    shardings,
)

__all__ = [
    "AXIS_RULES",
    "CONFIGS",
    "FAMILIES",
    "CausalLM",
    "Decoder",
    "DecoderConfig",
    "Rope",
    "Tensor",
    "axes",
    "config_text",
    "decode",
    "load",
    "num_params",
    "read_config",
    "save_hf",
    "shapes",
    "shardings",
    "tensors",
]
