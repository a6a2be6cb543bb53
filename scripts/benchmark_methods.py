#!/usr/bin/env python
"""What a method costs beside its score: seconds a step, compilation, memory and the tuned model's file.

    python scripts/get_smollm2.py smollm2
    python scripts/benchmark_methods.py --checkpoint smollm2 --out docs/benchmarks/methods.json

Steps of 8 examples of a language model with clipped Adam, all methods in turn. PEFT's LoRA and
SHiRA take part where torch and peft are installed. Memory is what the compiled step takes, its arguments and
its temporary arrays; PyTorch does not say its own on a processor.
"""

import argparse
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from benchmark import alternate

from dst_optax.finetuning import inputs, optimizers
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.methods.dst import DST
from dst_optax.finetuning.methods.fixed_subset import FixedSubset
from dst_optax.finetuning.methods.full import Full
from dst_optax.finetuning.methods.lora import LoRA
from dst_optax.finetuning.methods.prompt import Prompt
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.steps import TrainState, make_step

RATE = 1e-3


def methods(budget: int) -> dict[str, Any]:
    """The methods of the sweep at a budget; a prompt has a hundredth of it."""
    adam = optimizers.decayed(RATE, steps=1000, warmup=1)
    return {
        "full": Full(adam),
        "dst, strict": DST(adam, num_free_params=budget),
        "dst, fill": DST(adam, num_free_params=budget, ties="fill"),
        "fixed": FixedSubset(adam, num_free_params=budget, ties="fill"),
        "lora": LoRA(adam, num_free_params=budget),
        "prompt": Prompt(adam, num_free_params=budget // 100),
    }


def bytes_of(write: Callable[[Path], None]) -> int:
    """Bytes that a function writes into a directory."""
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        return sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())


def peft_method(
    checkpoint: str, name: str, budget: int, batch: inputs.Batch
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of one of PEFT's methods, and its row."""
    import torch
    from peft_baselines import adapted, log_likelihoods
    from transformers import AutoModelForCausalLM

    model = adapted(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), name, budget, 0)
    tuned = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(tuned, RATE, betas=(0.9, 0.98))

    def step() -> None:
        adam.zero_grad()
        (-log_likelihoods(model, batch).mean()).backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        adam.step()

    return step, {
        "method": f"PEFT {name}",
        "free": sum(p.numel() for p in tuned),
        "file_bytes": bytes_of(model.save_pretrained),
    }


def rows(
    checkpoint: str, chosen: dict[str, Any], budget: int, tokens: int, runs: int, scan_layers: bool
) -> list[dict[str, Any]]:
    """One a method."""
    model = language_model(checkpoint).configured(dtype="float32", scan_layers=scan_layers)
    seed = jax.tree.map(jnp.asarray, model.load(checkpoint))
    random, key = np.random.default_rng(0), jax.random.key(0)
    pairs = [(random.integers(3, 40000, tokens), random.integers(3, 40000, 2)) for _ in range(8)]
    batch = inputs.batch_of(model, pairs, {"inputs": tokens, "targets": 2})

    def start_of(method: Method) -> TrainState:
        frozen, tuned = method.split(seed, key, model)
        return jax.tree.map(jnp.copy, TrainState(frozen, tuned, method.init(seed, tuned)))

    results, steps = {}, {}
    for name, method in chosen.items():  # before the states of all methods fill the memory
        state_of_one = start_of(method)
        start = time.perf_counter()
        lowered = jax.jit(make_step(model, method), donate_argnums=0).lower(state_of_one, batch, key)
        steps[name] = lowered.compile()
        memory = steps[name].memory_analysis()
        results[name] = {
            "method": name,
            "compile_seconds": time.perf_counter() - start,
            "step_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        }
        print(results[name], flush=True)

    state = {name: start_of(method) for name, method in chosen.items()}

    def step(name: str) -> Any:
        state[name], measured = steps[name](state[name], batch, key)
        return measured

    calls = {name: functools.partial(step, name) for name in steps}
    if importlib.util.find_spec("peft") is not None:
        for name in ("lora", "shira"):
            call, row = peft_method(checkpoint, name, budget, batch)
            calls[row["method"]], results[row["method"]] = call, row
    times = alternate(calls, runs)
    for name, method in chosen.items():
        tuned, slots = state[name].tuned, state[name].slots
        mark = method.mark(tuned, slots)
        results[name]["free"] = int(method.metrics(tuned, slots, mark)["free_params"])
        export = functools.partial(method.export, tuned=tuned, state=slots, save_model=model.save)
        results[name]["file_bytes"] = bytes_of(export)
    return [row | {"times": times[name]} for name, row in results.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a Hugging Face directory")
    parser.add_argument("--budget", type=int, default=1345150, help="free parameters")
    parser.add_argument("--methods", nargs="+", choices=methods(1), help="some of ours")
    parser.add_argument("--tokens", type=int, default=64, help="of an example's input")
    parser.add_argument("--runs", type=int, default=5, help="steps of each method")
    parser.add_argument("--scan-layers", action="store_true", help="compile one layer instead of all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    chosen = methods(given.budget)
    if given.methods:
        chosen = {name: chosen[name] for name in given.methods}
    cell = {
        "part": "methods",
        "budget": given.budget,
        "tokens": given.tokens,
        "scan_layers": given.scan_layers,
        "rows": rows(given.checkpoint, chosen, given.budget, given.tokens, given.runs, given.scan_layers),
    }
    record.write({"environment": record.environment(), "cells": [cell]}, given.out)
    for row in cell["rows"]:
        print(row)


if __name__ == "__main__":
    main()
