"""The run directory: whose it is, the seed model in it, and what that scores before tuning."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dst_optax.finetuning import processes, storage
from dst_optax.finetuning.evaluator import Evaluator
from dst_optax.finetuning.methods import Params
from dst_optax.finetuning.tasks.base import TaskSuite

LOCK = ".lock"


@dataclass(frozen=True)
class RunDir:
    """A directory that belongs to one run.

    Attributes:
      root: the directory.
      identity: what the run is, in values of JSON; another run is refused.
    """

    root: Path
    identity: Mapping[str, Any]

    def check(self) -> None:
        """Refuses a directory that belongs to something else; writes nothing.

        Raises:
          ValueError: it does; names what differs.
        """
        file = self.root / "run.json"
        if not file.exists():
            if self.root.exists() and any(path.name != LOCK for path in self.root.iterdir()):
                raise ValueError(f"{self.root} is not empty and no run directory; give another run_dir.")
            return
        owner = json.loads(file.read_text())
        differ = [
            name for name in self.identity if owner.get(name, self.identity[name]) != self.identity[name]
        ]
        if differ:
            name = differ[0]
            raise ValueError(
                f"{self.root} belongs to another run: {', '.join(differ)} differ. For {name}, it has "
                f"{str(owner.get(name))[:300]!r} and this run {str(self.identity[name])[:300]!r}. Give "
                "another run_dir, or delete it."
            )

    def claim(self, seed: Params | None) -> None:
        """Makes the directory ours while this process lives; keeps the seed model there unless it is None.

        Raises:
          ValueError: another process is using it, or see :meth:`check`.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if processes.any_process(processes.is_primary() and not storage.lock(self.root / LOCK)):
            raise ValueError(
                f"{self.root}: another process is using it; wait until it ends (a notebook uses it until its "
                "kernel stops), or give another run_dir."
            )
        self.check()
        claimed, kept = (self.root / "run.json").exists(), (self.root / "seed").exists()
        processes.barrier(f"{self.root} is looked at")
        if not claimed:
            storage.write_text(self.root / "run.json", json.dumps(self.identity, indent=1))
        if seed is not None and not kept:
            with storage.shared_directory(self.root / "seed") as temporary:
                storage.save_model(temporary / "model.safetensors", seed)

    @staticmethod
    def keeps_seed(root: Path) -> bool:
        """Whether a run directory has a copy of its seed model."""
        return (root / "seed" / "model.safetensors").exists()

    def seed(self, init: Callable[[], Params], load: Callable[[], Params] | None) -> Params:
        """The seed model on the host: the one kept here, or a new one.

        Args:
          init: makes random parameters.
          load: reads a checkpoint; None takes random parameters.
        """
        if self.keeps_seed(self.root):
            return storage.load_model(self.root / "seed" / "model.safetensors", jax.eval_shape(init))
        return jax.tree.map(np.asarray, jax.jit(init)() if load is None else load())

    def baselines(
        self, data: TaskSuite, evaluator: Evaluator, place: Callable[[], Params], name: str = "seed model"
    ) -> dict[str, Any]:
        """Scores of the most common answer and of the model before tuning; computed once.

        Args:
          data: tasks.
          evaluator: scores the model.
          place: puts the model's parameters on the devices.
          name: what the model is called.
        """
        file = self.root / "baseline.json"
        exists = file.exists()
        processes.barrier(f"{file} is looked for")
        if not exists:
            majority = data.majority()
            rows: dict[str, Any] = {} if majority is None else {"majority": {"score": majority}}
            params = place()
            metrics, score = evaluator.score(params)
            rows[name] = {"score": score, "metrics": metrics}
            if evaluator.tests:
                rows[name]["test_score"] = evaluator.score(params, "test")[1]
                if majority is not None:
                    rows["majority"]["test_score"] = data.majority("test")
            storage.write_text(file, json.dumps(rows, indent=1))
        return json.loads(file.read_text())
