"""What the runs of one directory share: data, network, seed model and evaluation."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from dst_optax import subset
from dst_optax.finetuning import hub, placement, processes, storage
from dst_optax.finetuning.display import make_console
from dst_optax.finetuning.evaluator import Evaluator
from dst_optax.finetuning.methods import Method, Params
from dst_optax.finetuning.models import huggingface
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.finetuning.models.named import language_model
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.run_dir import RunDir
from dst_optax.finetuning.steps import Programs
from dst_optax.finetuning.tasks.base import TaskSuite, vocabulary_digest
from dst_optax.paths import require_local


class RunContext:
    """What all runs of a directory share; everything is checked before anything is written.

    Args:
      run_dir: see :func:`~dst_optax.finetuning.trainer.finetune`, like all that follow.
      data: likewise.
      model: likewise.
      recipe: likewise.
      checkpoint: likewise.
      subset_dir: likewise.
      mesh_shape: likewise.
      reference_seed: likewise.
      config: likewise.
      methods: what is to be tuned.

    Attributes:
      run_dir: the run directory.
      data: tasks, their source and the vocabulary.
      train_name: of the seqio mixture to train on.
      model: what is tuned, as it computes.
      recipe: how to train.
      mesh: devices.
      seed: the seed model, on the host.
      seed_fingerprint: its fingerprint.
      start: where training starts, on the host: the seed model, or with a subset applied.
      evaluator: scores parameters.
      console: to print on.
    """

    def __init__(
        self,
        run_dir: str,
        data: TaskSuite,
        model: Any,
        recipe: Recipe,
        *,
        checkpoint: str | None = None,
        subset_dir: str | None = None,
        mesh_shape: tuple[int, int] | None = None,
        reference_seed: bool = False,
        config: str = "",
        methods: Iterable[Method] = (),
    ):
        root = require_local(run_dir, "run_dir")
        plain = language_model(model)
        self.data, self.recipe, self.mesh = data, recipe, placement.make_mesh(mesh_shape)
        self.console = make_console()
        if recipe.batch_size % (self.mesh.shape["data"] * recipe.accumulate):
            raise ValueError(
                f"recipe: batch_size {recipe.batch_size} must be a multiple of accumulate "
                f"{recipe.accumulate} times the {self.mesh.shape['data']} devices along data."
            )
        _require_positions(plain, recipe)
        # a run directory that keeps its seed needs the checkpoint no more
        needed = None if checkpoint is None or RunDir.keeps_seed(root) else hub.local_path(checkpoint)
        plain.check(data.vocabulary, needed)
        self.model = plain.configured(
            dtype=recipe.dtype,
            dropout_rate=recipe.dropout,
            scan_layers=recipe.scan_layers,
            remat=recipe.remat,
        )
        self.train_name = data.register(plain.decoder_only)
        data_digest = data.check(recipe.lengths["targets"])
        identity = {
            "tasks": list(data.names),
            "source": repr(data.source),
            "data_sha256": data_digest,
            "vocabulary": type(data.vocabulary).__name__,
            "vocabulary_sha256": vocabulary_digest(data.vocabulary),
            "model": repr(plain.config),
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "checkpoint": checkpoint,
            "subset_dir": subset_dir,
            "settings": dict(data.settings),
            "config": config,
        }
        unclaimed = RunDir(root, identity)
        unclaimed.check()
        processes.barrier(f"{run_dir} is free or ours")
        self._checkpoint = checkpoint
        load = None if needed is None else partial(self.model.load, needed)
        self.seed = unclaimed.seed(partial(self.model.init, jax.random.key(0)), load)
        self.seed_fingerprint = storage.fingerprint(self.seed)
        self.start = self.seed if subset_dir is None else subset.Subset.load(subset_dir).apply(self.seed)
        for method in methods:
            jax.eval_shape(partial(self._begin, method), self.seed, self.start)
        loaded = {"seed_fingerprint": self.seed_fingerprint}
        if subset_dir is not None:
            loaded["start_fingerprint"] = storage.fingerprint(self.start)
        self.run_dir = replace(unclaimed, identity=identity | loaded)
        self.run_dir.claim(None if reference_seed else self.seed)
        self.evaluator = Evaluator(self.model, data, recipe, self.mesh)
        self._programs: Programs | None = None
        for line in self.evaluator.cuts():
            self.console.print(line, highlight=False)

    def _begin(self, method: Method, seed: Params, start: Params) -> Any:
        """What a run of the method begins with; raises where it cannot tune this model."""
        frozen, tuned = method.split(start, jax.random.key(0), self.model)
        _require_positions(self.model, self.recipe, method.merge(frozen, tuned).get("prompt", ()))
        return method.init(seed, tuned)

    @property
    def size(self) -> int:
        """Parameters of the seed model."""
        return sum(x.size for x in jax.tree.leaves(self.seed))

    def programs(self, method: Method) -> Programs:
        """What the runs of a method compute; runs that follow each other share it."""
        if self._programs is None or self._programs.method is not method:
            self._programs = Programs.of(self.model, method, self.recipe)
        return self._programs

    def baselines(self) -> list[dict[str, Any]]:
        """Rows of the most common answer and of the untuned model."""
        name = "seed model" if self.start is self.seed else "with the subset"
        place = partial(placement.place_model, self.model, self.start, self.mesh)
        rows = self.run_dir.baselines(self.data, self.evaluator, place, name)
        return [{"method": name, "free_params": 0, "seconds": 0.0, **row} for name, row in rows.items()]

    def place_seed_and_start(self) -> tuple[Params, Params]:
        """The seed model and where training starts, on the devices; one copy where they are the same."""
        seed = placement.place_model(self.model, self.seed, self.mesh)
        return seed, seed if self.start is self.seed else placement.place_model(
            self.model, self.start, self.mesh
        )

    def export_hf(self, directory: Path) -> None:
        """Writes the subset in ``directory`` for Hugging Face, too, if the seed came from there."""
        if self._checkpoint is None or not (directory / "subset").exists():
            return
        if processes.is_primary():
            try:
                if (checkpoint := self._huggingface_dir(hub.FILES)) is not None:
                    huggingface.export_subset(directory, checkpoint)
            except ValueError as e:  # the run is whole; `dst-optax subset convert` can do it later
                self.console.print(f"No subset for Hugging Face was written: {e}", highlight=False)
        processes.barrier(f"{directory} is written for Hugging Face")

    def save_model(self, directory: Path, params: Params) -> None:
        """Writes a whole model that ``checkpoint=`` can name."""
        params = processes.on_host(params)
        if processes.is_primary():
            try:
                source = self._huggingface_dir(hub.SETTINGS)
            except ValueError as e:  # it is gone, and the run keeps a copy of its weights
                source = None
                self.console.print(f"The model is saved without the seed's tokenizer: {e}", highlight=False)
            self.model.save(directory, params, source)

    def _huggingface_dir(self, files: Sequence[str]) -> Path | None:
        """Where the seed's files lie if it came from Hugging Face; a ValueError if they are gone."""
        if self._checkpoint is None:
            return None
        directory = Path(hub.local_path(self._checkpoint, files))
        if not directory.exists():
            raise ValueError(f"{directory} does not exist any more.")
        return directory if (directory / "config.json").is_file() else None


def _require_positions(model: LanguageModel, recipe: Recipe, prompt: Sequence[Any] = ()) -> None:
    longest, limit = len(prompt) + sum(recipe.lengths.values()) - 1, getattr(model.config, "max_length", None)
    if limit is not None and longest > limit:
        after = f" after a soft prompt of {len(prompt)}" if len(prompt) else ""
        raise ValueError(
            f"recipe: lengths {dict(recipe.lengths)}{after} make texts of up to {longest} tokens, but the "
            f"model has positions for {limit} only (max_position_embeddings)."
        )
