"""Turns a checkpoint of T5X into a subset file.

python -m t5x_integration.export MODEL_DIR runs/cb [--seed=.../checkpoint_1000000]
"""

import os
from typing import Annotated, Any

import numpy as np
import typer

from dst_optax import subset
from dst_optax.paths import as_path
from dst_optax.subset import checkpoints as stored
from t5x_integration import checkpoints
from t5x_integration.optimizers import unrounded


def export(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], seed: Any = None
) -> subset.Subset:
    """Writes what differs from the seed; one tensor at a time is in memory.

    Args:
      checkpoint: directory ``checkpoint_<step>`` of a run with DST, T5X's legacy format or Orbax; or
        MODEL_DIR, for its last checkpoint.
      out: directory to make, local or ``gs://``, see :meth:`dst_optax.subset.Subset.save`.
      seed: the checkpoint that the run started from; None takes the seed that DST keeps in the optimizer's
        state.

    Returns:
      The subset.

    Raises:
      ValueError: no such checkpoint, another seed than the run's own, or no seed for a tensor.
    """
    tuned = tensors(checkpoint)
    model, kept = _model(tuned), _kept_seed(tuned)
    seeds = kept if seed is None else _model(tensors(seed))
    lacking = [path for path in model if path not in seeds]
    if lacking:
        raise ValueError(
            f"{checkpoint} keeps no seed of {lacking[0]!r} (none is captured before the first step); give "
            "the checkpoint that the run started from as the seed."
        )
    seeds = {path: seeds[path] for path in model}
    other = next((p for p, x in seeds.items() if p in kept and not _are_equal(x, kept[p])), None)
    if other is not None:
        raise ValueError(
            f"{seed} is not what the run in {checkpoint} started from: {other!r} is another one than in the "
            "seed that DST keeps. Leave --seed out, or give the checkpoint that the run started from."
        )
    widest = lambda *arrays: max(arrays, key=lambda x: x.dtype.itemsize)  # noqa: E731
    seeds = {path: widest(x, kept.get(path, x)) for path, x in seeds.items()}
    extracted = subset.from_models(seeds, {path: _like(seeds[path], x) for path, x in model.items()})
    extracted.save(out)
    return extracted


def tensors(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays of a checkpoint by the names that T5X gives them, "target/..." and "state/...".

    Args:
      checkpoint: directory ``checkpoint_<step>``, T5X's legacy format or Orbax, local or ``gs://``; or a
        directory of such, of which the last is taken.

    Returns:
      Arrays, none read yet.

    Raises:
      ValueError: there is none.
    """
    path = as_path(checkpoint)
    if steps := checkpoints.steps(path):
        path = path / f"checkpoint_{steps[-1]}"
    arrays = stored.open_state(path)
    if arrays is None:
        raise ValueError(f"{path} is no checkpoint of T5X; give a directory checkpoint_<step>.")
    return arrays


def _model(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("target/"): x for name, x in arrays.items() if name.startswith("target/")}


def _like(seed: Any, x: Any) -> Any:
    """The array in its seed's dtype, if T5X saved it in fewer bits."""
    if x.dtype == seed.dtype or x.dtype.itemsize >= seed.dtype.itemsize:
        return x
    return stored.StoredArray(x.shape, seed.dtype, lambda: np.asarray(unrounded(x, np.asarray(seed))))


def _are_equal(given: Any, kept: Any) -> bool:
    """Whether two tensors are equal, in the dtype of the one that was saved in fewer bits."""
    if given is kept:
        return True
    x, y = np.asarray(given), np.asarray(kept)
    narrow = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return x.shape == y.shape and x.astype(narrow).tobytes() == y.astype(narrow).tobytes()


def _kept_seed(arrays: dict[str, Any]) -> dict[str, Any]:
    """The seed in the state of DST, under the wrapper or in a chain."""
    captured = [state for state in checkpoints.dst_states(arrays) if np.asarray(arrays[f"{state}/captured"])]
    prefixes = [f"{state}/seed/" for state in captured]
    return {
        name.removeprefix(prefix): x
        for prefix in prefixes
        for name, x in arrays.items()
        if name.startswith(prefix)
    }


def main(
    checkpoint: Annotated[
        str, typer.Argument(help="Directory checkpoint_<step>, or MODEL_DIR for the last.")
    ],
    out: Annotated[str, typer.Argument(help="Directory of the subset to write.")],
    seed: Annotated[
        str | None, typer.Option(help="Checkpoint that the run started from; else the seed that DST keeps.")
    ] = None,
) -> None:
    """Write what differs from the seed in a checkpoint of T5X."""
    try:
        print(export(checkpoint, out, seed))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    typer.run(main)
