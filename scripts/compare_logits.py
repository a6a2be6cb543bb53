"""Compares logits of a checkpoint, ours and those of PyTorch's transformers, with transformers in float64.

Float32 itself is not exact: what rounding alone does shows in PyTorch's own float32.

    pip install torch transformers
    python scripts/compare_logits.py smollm2 "The capital of France is Paris." "def f(n): return n"
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dst_optax.finetuning.models.decoder.vocabulary import HuggingFaceVocabulary
from dst_optax.finetuning.models.named import language_model


class Distances(NamedTuple):
    """How far logits in float32 are from those of transformers in float64.

    Attributes:
      ours: the largest difference of ours.
      theirs: that of transformers.
      largest: the largest logit.
    """

    ours: float
    theirs: float
    largest: float


def main() -> None:
    """Prints a line a text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="a directory as Hugging Face ships it")
    parser.add_argument("texts", nargs="+", metavar="text")
    arguments = parser.parse_args()
    vocabulary = HuggingFaceVocabulary(arguments.checkpoint)
    rows = [vocabulary.encode(text) for text in arguments.texts]
    for ids, distance in zip(rows, distances(arguments.checkpoint, rows), strict=True):
        print(
            f"{len(ids)} tokens: ours differ by {distance.ours:.1e} at most, transformers' in float32 by "
            f"{distance.theirs:.1e}, where the largest is {distance.largest:.1f}"
        )


def distances(checkpoint: str, rows: Sequence[Sequence[int]]) -> list[Distances]:
    """The distances of each row of tokens."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    def network(dtype: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()

    model: Any = language_model(checkpoint)
    params, float32, float64 = model.load(checkpoint), network(torch.float32), network(torch.float64)
    result = []
    for ids in rows:
        ours = np.asarray(model.network.apply({"params": params}, jnp.asarray([ids], jnp.int32)))
        with torch.no_grad():
            theirs, exact = (net(torch.tensor([list(ids)])).logits.numpy() for net in (float32, float64))
        ours_off, theirs_off = (float(np.abs(x - exact).max()) for x in (ours, theirs))
        result.append(Distances(ours_off, theirs_off, float(np.abs(exact).max())))
    return result


if __name__ == "__main__":
    main()
