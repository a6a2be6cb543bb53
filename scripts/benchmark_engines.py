#!/usr/bin/env python
"""Times many tuned models on one resident Hugging Face checkpoint, in PyTorch and in vLLM.

Subsets are compared with LoRA of as many parameters, merged into the weights and not, with vLLM's own sparse
patches, and with loading the tuned checkpoint anew:

    pip install '.[torch]' transformers peft
    python scripts/benchmark_engines.py torch --checkpoint smollm2 --out docs/benchmarks/engines-torch.json
    pip install '.[vllm]'
    python scripts/benchmark_engines.py vllm --checkpoint smollm2 --out docs/benchmarks/engines-vllm.json

Times do not depend on what a model has learnt, so subsets and adapters are random. A request is a switch to
another tuned model and a few greedy tokens of one prompt, inside the process: no HTTP.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import record
import safetensors.numpy

from dst_optax.subset import Entries, Subset, fingerprints, models

Row = dict[str, Any]
PERCENTILES = (50, 95, 99)
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = list(range(100, 116))
TOKENS = 8


def timed(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Milliseconds by percentile, after one call that warms up."""
    call()
    spent = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - start))
    return {f"p{p}": float(np.percentile(spent, p)) for p in PERCENTILES}


def random_subset(checkpoint: pathlib.Path, fraction: float, rng_seed: int) -> Subset:
    """A share of the entries of every tensor, each moved by 1."""
    seed, random = models.open_model(checkpoint), np.random.default_rng(rng_seed)
    prints = dict(zip(seed, fingerprints(seed.values()), strict=True))
    entries = {}
    for name, x in seed.items():
        positions = np.unique(random.integers(0, x.size, max(1, round(fraction * x.size))))
        values = np.asarray(x).reshape(-1)[positions]
        entries[name] = Entries(tuple(x.shape), positions, values + values.dtype.type(1), None, prints[name])
    return Subset(entries)


def random_adapter(checkpoint: pathlib.Path, budget: int, rng_seed: int, directory: pathlib.Path) -> None:
    """Writes a LoRA adapter of at most ``budget`` parameters, in PEFT's form."""
    matrices = {
        name.removesuffix(".weight"): x
        for name, x in models.open_model(checkpoint).items()
        if name.split(".")[-2] in MATRICES
    }
    rank = budget // sum(sum(x.shape) for x in matrices.values())
    if not rank:
        raise SystemExit(f"LoRA of rank 1 has more than {budget:,} parameters; give a larger fraction.")
    random, tensors = np.random.default_rng(rng_seed), {}
    for name, x in matrices.items():
        rows, columns = x.shape
        for half, shape in {"A": (rank, columns), "B": (rows, rank)}.items():
            values = random.standard_normal(shape, np.float32) * 0.02
            tensors[f"base_model.model.{name}.lora_{half}.weight"] = values.astype(x.dtype)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": MATRICES}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({**config, "r": rank, "lora_alpha": rank}))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")


def adapter_size(scratch: pathlib.Path) -> int:
    return sum(x.size for x in models.open_model(scratch / "lora_a" / "adapter_model.safetensors").values())


def model_size(checkpoint: pathlib.Path) -> int:
    return sum(x.size for x in models.open_model(checkpoint).values())


def alternating(switch: Callable[[str], Any]) -> Callable[[], Any]:
    """Calls it with "b" and "a" in turn."""
    names = itertools.cycle("ba")
    return lambda: switch(next(names))


def torch_rows(checkpoint: pathlib.Path, scratch: pathlib.Path, runs: int) -> Iterator[Row]:
    """One module of transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dst_optax.serving.torch import SubsetStore

    torch.manual_seed(0)
    prompt = torch.tensor([PROMPT])
    load_model = functools.partial(AutoModelForCausalLM.from_pretrained, dtype="auto")

    def generate(model: Any) -> None:
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    model = load_model(checkpoint).eval()
    yield {"way": "none", "entries": 0, "request": timed(lambda: generate(model), runs)}
    tuned = scratch / "tuned"
    yield {
        "way": "full",
        "entries": model_size(checkpoint),
        "load": timed(lambda: load_model(tuned), runs),
        "request": timed(lambda: generate(load_model(tuned).eval()), runs),
    }

    store = SubsetStore(model)
    for name in "ab":
        store.load(name, scratch / name)

    def load() -> None:
        store.load("c", scratch / "a")
        store.unload("c")

    switch = alternating(store.activate)
    yield {
        "way": "subset",
        "entries": store.list()[0].entries,
        "load": timed(load, runs),
        "switch": timed(switch, runs),
        "request": timed(lambda: generate(switch()), runs),
    }
    store.deactivate()

    lora = PeftModel.from_pretrained(model, scratch / "lora_a", adapter_name="a")
    lora.load_adapter(scratch / "lora_b", "b")
    lora.eval()

    def load_adapter() -> None:
        lora.load_adapter(scratch / "lora_a", "c")
        lora.delete_adapter("c")

    choose = alternating(lora.set_adapter)
    yield {
        "way": "lora unmerged",
        "entries": adapter_size(scratch),
        "load": timed(load_adapter, runs),
        "switch": timed(choose, runs),
        "request": timed(lambda: (choose(), generate(lora)), runs),
    }
    merge = alternating(lambda name: (lora.unmerge_adapter(), lora.merge_adapter([name])))
    lora.merge_adapter(["b"])
    yield {
        "way": "lora",
        "entries": adapter_size(scratch),
        "switch": timed(merge, runs),
        "request": timed(lambda: (merge(), generate(lora)), runs),
    }


def vllm_rows(checkpoint: pathlib.Path, scratch: pathlib.Path, runs: int) -> Iterator[Row]:
    """One engine for subsets and patches, and another for LoRA, since vLLM wraps the layers for LoRA."""
    from vllm import LLM, SamplingParams

    news = itertools.count(1000)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    start = functools.partial(
        LLM, str(checkpoint), max_model_len=64, max_num_seqs=4, enforce_eager=True, disable_log_stats=True
    )

    def generate(llm: Any, **options: Any) -> None:
        prompt = {"prompt_token_ids": [next(news), *PROMPT]}  # a repeated one would be in the prefix cache
        llm.generate(prompt, sampling, use_tqdm=False, **options)

    yield from _vllm_subsets(start(), generate, scratch, runs)
    rank = json.loads((scratch / "lora_a" / "adapter_config.json").read_text())["r"]
    room = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)  # what vLLM pads ranks to
    yield from _vllm_lora(start(enable_lora=True, max_lora_rank=room, max_loras=2), generate, scratch, runs)
    again = f"import vllm; vllm.LLM({str(scratch / 'tuned')!r}, max_model_len=64, enforce_eager=True)"
    restart = functools.partial(
        subprocess.run, [sys.executable, "-c", again], check=True, capture_output=True
    )
    yield {"way": "restart", "entries": model_size(checkpoint), "load": timed(restart, 2)}


def _vllm_subsets(llm: Any, generate: Callable[..., None], scratch: pathlib.Path, runs: int) -> Iterator[Row]:
    from dst_optax.serving.vllm import SubsetLLM

    yield {"way": "none", "entries": 0, "request": timed(lambda: generate(llm), runs)}
    subsets = SubsetLLM(llm)
    for name in "ab":
        subsets.load(name, scratch / name)

    def load() -> None:
        subsets.load("c", scratch / "a")
        subsets.unload("c")

    def patch(name: str) -> None:
        llm.collective_rpc(_write_patches, args=(name,))
        llm.reset_prefix_cache()

    for name in "ab":
        llm.collective_rpc(_read_patches, args=(name, str(scratch / name)))
    activate, write = alternating(subsets.activate), alternating(patch)
    entries = subsets.list()[0].entries
    yield {
        "way": "subset",
        "entries": entries,
        "load": timed(load, runs),
        "switch": timed(activate, runs),
        "request": timed(lambda: (activate(), generate(llm)), runs),
    }
    subsets.deactivate()
    yield {
        "way": "patches",
        "entries": entries,
        "switch": timed(write, runs),
        "request": timed(lambda: (write(), generate(llm)), runs),
    }
    llm.llm_engine.engine_core.shutdown()


def _vllm_lora(llm: Any, generate: Callable[..., None], scratch: pathlib.Path, runs: int) -> Iterator[Row]:
    from vllm.lora.request import LoRARequest

    directories = {"a": scratch / "lora_a", "b": scratch / "lora_b", "c": scratch / "lora_a"}
    adapters = {
        name: LoRARequest(name, i, str(path)) for i, (name, path) in enumerate(directories.items(), 1)
    }
    for name in "ab":
        generate(llm, lora_request=adapters[name])

    request = alternating(lambda name: generate(llm, lora_request=adapters[name]))
    row = {
        "way": "lora unmerged",
        "entries": adapter_size(scratch),
        "request": timed(request, runs),
    }

    def load() -> None:
        llm.llm_engine.add_lora(adapters["c"])
        llm.llm_engine.remove_lora(adapters["c"].lora_int_id)

    yield {**row, "load": timed(load, runs)}
    llm.llm_engine.engine_core.shutdown()


def _read_patches(worker: Any, name: str, directory: str) -> None:
    """Keeps a subset in a worker in the form that vLLM's own sparse updates have."""
    import torch
    from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

    from dst_optax.serving.in_place import DTYPES, bits

    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    worker.patches = getattr(worker, "patches", {}) | {
        name: [
            CheckpointWeightPatch(
                path,
                e.shape,
                dtypes[e.dtype],
                bits(e.values, torch.device("cpu")).view(dtypes[e.dtype]),
                torch.from_numpy(e.positions),
            )
            for path, e in Subset.load(directory).items()
        ]
    }


def _write_patches(worker: Any, name: str) -> None:
    """Through the model's loader, as tensors full of NaN; what an earlier patch wrote stays."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

    load_checkpoint_weight_patches(worker.get_model(), worker.patches[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", choices=["torch", "vllm"])
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--fraction", type=float, default=0.01, help="share of free parameters")
    parser.add_argument("--runs", type=int, default=20, help="timed calls of each kind")
    parser.add_argument("--out", type=pathlib.Path, help="where the figures go")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_PLUGINS", "dst_subset")
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # patches send a function to the worker
    rows = {"torch": torch_rows, "vllm": vllm_rows}[given.engine]
    report: Row = {"environment": record.environment(), "engine": given.engine, "rows": []}
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        for i, name in enumerate("ab"):
            random_subset(given.checkpoint, given.fraction, i).save(scratch / name)
            budget = int(given.fraction * model_size(given.checkpoint))
            random_adapter(given.checkpoint, budget, i, scratch / f"lora_{name}")
        models.apply_to_files(Subset.load(scratch / "a"), given.checkpoint, scratch / "tuned")
        for row in rows(given.checkpoint, scratch, given.runs):
            report["rows"].append({"model": given.checkpoint.name, "fraction": given.fraction, **row})
            print(json.dumps(report["rows"][-1]), flush=True)
    if given.out:
        record.write(report, given.out)


if __name__ == "__main__":
    main()
