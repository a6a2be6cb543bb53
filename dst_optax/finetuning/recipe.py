"""How long and how to train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How long and how to train; the same for all methods of a command.

    Attributes:
      steps: training steps.
      batch_size: examples a step.
      lengths: tokens of ``inputs`` and ``targets``; longer examples are cut, and counted.
      accumulate: parts that a batch is computed in, to save memory.
      label_smoothing: as in T5X.
      z_loss: as in T5X.
      dtype: of the computation; parameters stay float32.
      dropout: rate; None keeps the model's.
      scan_layers: whether layers are stacked and one of them is compiled instead of all; None keeps the
        model's way.
      remat: whether a layer's activations are computed again in the backward pass, to save memory; None
        keeps the model's way.
      eval_every: steps between evaluations.
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints; improvements are saved as well. None saves at evaluations.
      snapshot_every: steps between exports of the tuned model to ``snapshots/<step>``; None exports none.
      patience: evaluations without a better score before the run stops; None never stops early.
      eval_batch_size: examples decoded at once.
      score_train: whether the row of the table has a score on the training split as well.

    Example:
      >>> recipe = Recipe(steps=100, eval_every=30)
      >>> [step for step in range(1, 101) if recipe.evaluates_at(step)]
      [30, 60, 90, 100]
    """

    steps: int
    batch_size: int = 32
    lengths: Mapping[str, int] = field(default_factory=lambda: {"inputs": 512, "targets": 16})
    accumulate: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dtype: str = "float32"
    dropout: float | None = None
    scan_layers: bool | None = None
    remat: bool | None = None
    eval_every: int = 500
    log_every: int = 50
    save_every: int | None = None
    snapshot_every: int | None = None
    patience: int | None = None
    eval_batch_size: int = 64
    score_train: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "log_every", "eval_batch_size"):
            _require(name, getattr(self, name), _counts, "an integer of at least 1")
        for name in ("save_every", "snapshot_every", "patience"):
            value = getattr(self, name)
            _require(name, value, lambda x: x is None or _counts(x), "None or an integer of at least 1")
        for name, kinds in (
            ("scan_layers", (bool, type(None))),
            ("remat", (bool, type(None))),
            ("score_train", bool),
        ):
            value = getattr(self, name)
            _require(name, value, lambda x, kinds=kinds: isinstance(x, kinds), "True or False")
        _require("lengths", self.lengths, _are_lengths, 'of the form {"inputs": 512, "targets": 16}')
        _require("dtype", self.dtype, _floats, "'float32' or 'bfloat16'")
        _require("label_smoothing", self.label_smoothing, lambda x: 0 <= x < 1, "at least 0 and below 1")
        _require("z_loss", self.z_loss, lambda x: x >= 0, "at least 0")
        _require(
            "dropout", self.dropout, lambda x: x is None or 0 <= x < 1, "None, or at least 0 and below 1"
        )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"recipe: batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}."
            )

    def logs_at(self, step: int) -> bool:
        """Whether metrics are logged after this step."""
        return step % self.log_every == 0 or step == 1

    def evaluates_at(self, step: int) -> bool:
        """Whether the model is evaluated after this step."""
        return step % self.eval_every == 0 or step == self.steps

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is written after this step, even if the model has not improved."""
        return step % (self.save_every or self.eval_every) == 0 or step == self.steps

    def snapshots_at(self, step: int) -> bool:
        """Whether the tuned model is exported after this step."""
        return self.snapshot_every is not None and step % self.snapshot_every == 0


def _require(name: str, value: Any, holds: Callable[[Any], bool], wanted: str) -> None:
    try:
        fine = holds(value)
    except TypeError:
        fine = False
    if not fine:
        raise ValueError(f"recipe: {name} is {value!r}; it must be {wanted}.")


def _counts(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _are_lengths(x: Any) -> bool:
    return isinstance(x, Mapping) and set(x) == {"inputs", "targets"} and all(map(_counts, x.values()))


def _floats(x: Any) -> bool:
    return x in ("float32", "bfloat16")  # float16 would need a scaled loss
