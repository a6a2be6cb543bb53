"""LoRA and SHiRA of PEFT in PyTorch, on the weights, batches, rates and splits of our sweep.

For comparison with experiments/score_vs_budget_smollm2.gin: the same checkpoint, the same batches in the same
order, clipped Adam with the same schedule, rates chosen on held-out training rows and scores on the official
validation split.

    pip install torch transformers peft
    python scripts/peft_baselines.py --checkpoint smollm2 --data superglue --method shira --budget 1345150 \
        --learning-rates 1e-3 3e-3 --rng-seeds 0 1 2 --out runs/peft.jsonl

A GPU is used where there is one. Runs that the file has are not repeated.

Both spend the budget as our LoRA does: the same rank for all matrices, and one more for some. SHiRA frees
entries of the same matrices at random, as many in each as LoRA of that rank has.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dst_optax.finetuning import inputs
from dst_optax.finetuning.evaluator import option_tokens
from dst_optax.finetuning.methods.lora import ranks
from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.tasks.superglue.sources import HeldOut, JsonlSource
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: Any, method: str, budget: int, seed: int) -> Any:
    """The model with an adapter of at most ``budget`` parameters."""
    linear = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in MATRICES}
    rank_of = ranks({name: tuple(m.weight.shape) for name, m in linear.items()}, budget)
    if method == "lora":
        return get_peft_model(
            model, LoraConfig(r=1, rank_pattern=rank_of, lora_alpha=16, target_modules=list(rank_of))
        )
    matrices: dict[int, list[str]] = {}
    for name, rank in rank_of.items():
        matrices.setdefault(rank, []).append(name)
    (first, *others) = [
        ShiraConfig(r=rank, target_modules=names, random_seed=seed) for rank, names in matrices.items()
    ]
    model = get_peft_model(model, first)  # one adapter has one rank
    for config in others:
        model.add_adapter(f"rank_{config.r}", config)
    model.base_model.set_adapter(list(model.peft_config))
    return model


def log_likelihoods(model: Any, batch: inputs.Batch) -> torch.Tensor:
    """Of the targets of each row, (rows, targets), 0 where there is none."""
    on_device = {name: torch.from_numpy(x).to(model.device) for name, x in batch.items()}
    at = on_device["decoder_target_indices"].long()
    hidden = model.get_base_model().model(on_device["decoder_input_tokens"].long())[0]
    rows = torch.arange(len(at), device=model.device)[:, None]
    logits = model.get_base_model().lm_head(hidden[rows, at])
    targets = on_device["decoder_target_tokens"].long()
    log_probs = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    return log_probs * on_device["decoder_loss_weights"]


def score(model: Any, data: SuperGlue, task: str, split: str, lengths: dict[str, int]) -> float:
    """By the likeliest option, as the trainer scores."""
    lm = language_model(str(model.name_or_path))
    eval_split = inputs.eval_split(lm, data.provider(task), split, lengths)
    options = [data.options(eval_split, example) for example in eval_split.examples]
    pairs = [
        (example["inputs"], tokens)
        for example, each in zip(eval_split.examples, options, strict=True)
        for tokens in option_tokens(data.vocabulary, each, lengths["targets"])
    ]
    batch, scores = inputs.batch_of(lm, pairs, lengths), []
    with torch.no_grad():
        for start in range(0, len(pairs), 30):
            part = {name: x[start : start + 30] for name, x in batch.items()}
            scores += log_likelihoods(model, part).sum(1).tolist()
    likelihoods = iter(scores)
    predictions = []
    for example, each in zip(eval_split.examples, options, strict=True):
        best = int(np.argmax([next(likelihoods) for _ in each]))
        predictions.append(eval_split.prediction(each[best], example))
    return data.score({task: eval_split.metrics(predictions)})


def rates(peak: float, steps: int, warmup: int) -> Iterator[float]:
    """Those of ``optimizers.decayed``: linear warm-up from 0, then a cosine to 0."""
    for step in range(steps):
        if step < warmup:
            yield peak * step / warmup
        else:
            yield peak * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))


def train(
    given: argparse.Namespace, data: SuperGlue, mixture: str, peak: float, rng_seed: int
) -> dict[str, Any]:
    """The row of one run."""
    lengths = {"inputs": given.inputs, "targets": given.targets}
    torch.manual_seed(rng_seed)
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=torch.float32)
    model = adapted(model, given.method, given.budget, rng_seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    tuned = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(tuned, betas=(0.9, 0.98))
    lm = language_model(given.checkpoint)
    batches = inputs.train_batches(lm, mixture, lengths, given.batch_size, rng_seed)
    began = time.perf_counter()
    for step, rate in enumerate(rates(peak, given.steps, given.warmup), 1):
        batch = next(batches)
        loss = -log_likelihoods(model, batch).sum() / float(batch["decoder_loss_weights"].sum())
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        if step % 10 == 0 or step == 1:
            print(f"{given.method} {peak:g} step {step}/{given.steps}  loss {loss.item():.4f}", flush=True)
    return settings(given) | {
        "learning_rate": peak,
        "rng_seed": rng_seed,
        "free_params": sum(p.numel() for p in tuned),
        "seconds": time.perf_counter() - began,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "score": score(model, data, given.task, "validation", lengths),
        "test_score": score(model, data, given.task, "test", lengths),
    }


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What tells runs apart, beside learning rate and random seed."""
    names = (
        "task",
        "budget",
        "held_out",
        "held_out_seed",
        "inputs",
        "targets",
        "steps",
        "warmup",
        "batch_size",
    )
    where = {"model": Path(given.checkpoint).resolve().name, "source": Path(given.data).resolve().name}
    return {"method": f"PEFT {given.method}"} | where | {name: getattr(given, name) for name in names}


def main() -> None:
    """Trains the adapters, and adds a line a run to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a Hugging Face directory")
    parser.add_argument("--data", required=True, help="of SuperGLUE")
    parser.add_argument("--method", required=True, choices=["lora", "shira"])
    parser.add_argument("--budget", required=True, type=int, help="trained parameters at most")
    parser.add_argument("--learning-rates", required=True, type=float, nargs="+")
    parser.add_argument("--rng-seeds", default=[0], type=int, nargs="+")
    parser.add_argument("--task", default="cb")
    parser.add_argument("--held-out", type=int, default=50, help="training rows to choose rates on")
    parser.add_argument("--held-out-seed", type=int, default=0, help="draws them; -1 takes the last ones")
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--targets", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", required=True, type=Path, help="a file of JSON lines")
    given = parser.parse_args()

    drawn = None if given.held_out_seed < 0 else given.held_out_seed
    source = HeldOut(JsonlSource(given.data), given.held_out, drawn)
    vocabulary = HuggingFaceVocabulary(given.checkpoint)
    data = SuperGlue(source, vocabulary, (given.task,), evaluation="options")
    mixture = data.register(True)
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    done = [json.loads(line) for line in lines]
    for rng_seed in given.rng_seeds:
        for peak in given.learning_rates:
            run = settings(given) | {"learning_rate": peak, "rng_seed": rng_seed}
            if not any(row.items() >= run.items() for row in done):
                row = train(given, data, mixture, peak, rng_seed)
                with open(given.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
