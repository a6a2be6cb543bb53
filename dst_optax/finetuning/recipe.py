"""How long and how to train."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"recipe: {name} is {value!r}, it must be an integer of at least 1.")
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
