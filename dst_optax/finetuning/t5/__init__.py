"""T5 1.0, T5 1.1 and ByT5, with T5X's parameters and T5X and Hugging Face checkpoints."""

from dst_optax.finetuning.t5.config import CONFIGS, T5Config
from dst_optax.finetuning.t5.decoding import decode
from dst_optax.finetuning.t5.network import Transformer

__all__ = ["CONFIGS", "T5Config", "Transformer", "decode"]
