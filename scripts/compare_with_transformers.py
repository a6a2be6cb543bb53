"""Scores a SuperGLUE task's options with our decoder and with PyTorch's transformers, which must agree.

A run leaves its subset twice: in our coordinates, and in those of the checkpoint that it started from. The
first is applied to our parameters, the second by the command to the checkpoint's files, and every option of
every validation example is scored by either: ours in one padded batch, PyTorch's row by row.

    pip install torch transformers
    dst-optax subset apply --subset RUN/dst/rng_0/tuned/subset_hf --seed smollm2 --out tuned
    python scripts/compare_with_transformers.py --seed smollm2 --subset RUN/dst/rng_0/tuned/subset \
        --tuned tuned --data superglue --task cb --inputs 64 --targets 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dst_optax import subset
from dst_optax.finetuning import inputs
from dst_optax.finetuning.evaluator import target_scores
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.tasks.superglue.sources import JsonlSource
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]


class Comparison(NamedTuple):
    """How far two lists of log-likelihoods agree.

    Attributes:
      examples: how many there are.
      same: those in which the same option is the likeliest.
      largest: the largest difference of an option's log-likelihood.
    """

    examples: int
    same: int
    largest: float


def main() -> None:
    """Prints the comparison; exits with 1 if any example is predicted otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, text in (
        ("seed", "the checkpoint"),
        ("subset", "in our coordinates"),
        ("tuned", "the checkpoint with the subset"),
        ("data", "of SuperGLUE"),
        ("task", "for example cb"),
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--inputs", type=int, default=512, help="tokens of an input")
    parser.add_argument("--targets", type=int, default=16, help="tokens of an option")
    arguments = parser.parse_args()

    model, lengths = (
        language_model(arguments.seed),
        {"inputs": arguments.inputs, "targets": arguments.targets},
    )
    sizes, pairs = options(model, arguments.seed, arguments.data, arguments.task, lengths)
    params = subset.Subset.load(arguments.subset).apply(model.load(arguments.seed))
    mine = our_scores(model, params, pairs, lengths)
    theirs = transformers_scores(arguments.tuned, pairs)
    comparison = compare(sizes, mine, theirs)
    print(
        f"{comparison.same} of {comparison.examples} examples are predicted alike; log-likelihoods differ by "
        f"{comparison.largest:.2e} at most, where the largest is {np.abs(mine).max():.1f}."
    )
    raise SystemExit(comparison.same != comparison.examples)


def options(
    model: LanguageModel, checkpoint: str, data: str, task: str, lengths: inputs.Lengths
) -> tuple[list[int], list[Any]]:
    """How many options each validation example has, and inputs and option of each, as tokens."""
    vocabulary = HuggingFaceVocabulary(checkpoint)
    suite = SuperGlue(JsonlSource(data), vocabulary, (task,), evaluation="options")
    suite.register(model.decoder_only)
    split = inputs.eval_split(model, suite.provider(task), "validation", lengths)
    choices = [suite.options(split, example) for example in split.examples]
    pairs = [
        (example["inputs"].tolist(), list(vocabulary.encode(option)))
        for example, each in zip(split.examples, choices, strict=True)
        for option in each
    ]
    return [len(each) for each in choices], pairs


def our_scores(model: LanguageModel, params: Any, pairs: Pairs, lengths: inputs.Lengths) -> np.ndarray:
    """The log-likelihood of each option by our network, ``(pairs,)``."""
    batch = inputs.batch_of(model, pairs, lengths)
    scores = jax.jit(lambda params, batch: target_scores(model, params, batch))(params, batch)
    return np.asarray(scores["log_likelihood"])


def transformers_scores(directory: str | Path, pairs: Pairs) -> np.ndarray:
    """The log-likelihood of each option by the PyTorch model of a checkpoint in float32, ``(pairs,)``."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    scores = []
    with torch.no_grad():
        for given, option in pairs:
            logits = network(torch.tensor([[*given, *option]])).logits[0, len(given) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(-1, torch.tensor(option)[:, None])
            scores.append(chosen.sum().item())
    return np.array(scores)


def compare(sizes: Sequence[int], mine: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Compares log-likelihoods of options, example by example.

    Args:
      sizes: options of each example.
      mine: log-likelihoods, one after the other.
      theirs: likewise.
    """
    ends = np.cumsum(sizes)[:-1]
    each = zip(np.split(mine, ends), np.split(theirs, ends), strict=True)
    same = sum(int(a.argmax() == b.argmax()) for a, b in each)
    return Comparison(len(sizes), same, float(np.abs(mine - theirs).max()))


if __name__ == "__main__":
    main()
