"""What a run says while it runs: metrics.jsonl, TensorBoard, a live line."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dst_optax.atomic import atomic_file
from dst_optax.finetuning import processes


def make_console() -> Console:
    """Where the first process prints; lines and tables are as long as they are, unless on a terminal."""
    console = Console(quiet=not processes.is_primary(), soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000
    return console


class Diverged(ValueError):  # noqa: N818
    """The loss, the gradients or the parameters are no longer finite."""


class Log:
    """Writes metrics to ``metrics.jsonl`` and TensorBoard and shows them; in one of several processes.

    Args:
      directory: of the run.
      title: shown beside the metrics.
      start: step that the run goes on from; later lines of an earlier attempt are removed.
      steps: step that it ends at.
    """

    def __init__(self, directory: Path, title: str, start: int, steps: int):
        from clu import metric_writers

        self._title, self._steps = title, steps
        self._tokens, self._last = 0, None
        self._writers: tuple[TextIO, Any] | None = None
        if processes.is_primary():
            file = directory / "metrics.jsonl"
            _forget_after(file, start)
            self._writers = file.open("a"), metric_writers.SummaryWriter(str(directory / "tensorboard"))
        self.console = make_console()
        self._shown: dict[str, str] = {}
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> "Log":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        for writer in self._writers or ():
            writer.close()

    def count(self, tokens: int) -> None:
        """Notes tokens of a step, for the speed that the next line shows."""
        self._tokens += tokens

    def training(self, step: int, values: Mapping[str, Any]) -> None:
        """Records a training step.

        Args:
          step: the step.
          values: scalars, on the devices or off.

        Raises:
          Diverged: the loss or the gradients are not finite.
        """
        self.require_finite(step, values)
        values = {name: float(x) for name, x in values.items()}
        shown = {
            "step": f"{step}/{self._steps}",
            "loss": f"{values['loss']:.4f}",
            "free": f"{values['free_params']:,.0f}",
            "churn": f"{values.get('churn', 0.0):.3f}",
        }
        now = time.perf_counter()
        if self._last is not None:  # before the first line, programs are compiled
            last, clock = self._last
            speed, eta = self._tokens / (now - clock), (self._steps - step) * (now - clock) / (step - last)
            values["tokens_per_second"] = speed
            shown |= {"tokens/s": f"{speed:,.0f}", "eta": f"{eta:.0f}s"}
        self._tokens, self._last = 0, (step, now)
        self._write(step, values, shown)

    def require_finite(self, step: int, values: Mapping[str, Any]) -> None:
        """Raises :class:`Diverged` unless the loss, the gradients and the parameters of a step are finite.

        Before each checkpoint, too: a run could not go on from one of a model that is NaN.
        """
        for name in ("loss", "grad_norm", "largest parameter"):
            if not math.isfinite(values.get(name, 0.0)):
                raise Diverged(
                    f"the {name} is {float(values[name])} at step {step}: lower the learning rate (in "
                    "another run_dir), or check the seed model."
                )

    def evaluation(self, step: int, values: Mapping[str, float], score: float) -> None:
        """Records an evaluation.

        Args:
          step: the step.
          values: metrics by name.
          score: the one number that models are compared by.
        """
        self._write(step, {**values, "eval/score": score}, {"step": f"{step}", "score": f"{score:.1f}"})

    def _write(self, step: int, values: Mapping[str, Any], shown: Mapping[str, str]) -> None:
        if self._writers is None:
            return
        stream, board = self._writers
        stream.write(json.dumps({"step": step, **values}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
        board.write_scalars(step, values)
        self._shown.update(shown)
        if self._live is None:
            self.console.print(f"{self._title}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
            return
        table = Table(*self._shown, title=self._title)
        table.add_row(*self._shown.values())
        self._live.update(table, refresh=True)


def _forget_after(file: Path, step: int) -> None:
    """Removes lines of steps that will be done again, and a line that a kill cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    with atomic_file(file) as temporary:
        temporary.write_text("".join(kept))


def results_table(rows: list[dict[str, Any]], model_size: int) -> Table:
    """The table at the end of a command.

    Args:
      rows: with ``method``, ``score``, ``free_params`` and ``seconds``, one a run; runs of one method are
        drawn together as mean and standard deviation.
      model_size: parameters of the model.

    Returns:
      A table to print.
    """
    import numpy as np

    table = Table("method", "score", "free parameters", "share", "seconds", "best step")
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in methods:
        same = [row for row in rows if row["method"] == method]
        scores = [row["score"] for row in same]
        spread = f" ± {np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
        free = np.mean([row["free_params"] for row in same])
        seconds = np.mean([row["seconds"] for row in same])
        share = f"{100 * free / model_size:.3g}%"
        best = ", ".join(str(row["best_step"]) for row in same if "best_step" in row)
        table.add_row(method, f"{np.mean(scores):.1f}{spread}", f"{free:,.0f}", share, f"{seconds:.0f}", best)
    return table
