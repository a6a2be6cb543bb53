"""Fine-tuning: the loop.

A command makes one run directory:

    run.json             what the run is; another run is refused here
    .lock                held by the process that is using the directory
    seed/                the seed model, once (or a reference to where it lies)
    <method>/rng_<n>/    one run each
      method.txt           what is tuned, and how; another method is refused
      checkpoints/<step>   what differs from the seed, the optimizer's state, the data position
      metrics.jsonl, tensorboard/
      predictions/         in the leaderboard's form
      snapshots/<step>     the tuned model on the way, if the recipe asks for it
      tuned/               the tuned model: a subset, or a whole model where all of it moved
      result.json          one row of the table; the run is done
    results.json, scores.png
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from dst_optax.finetuning import inputs, placement, processes, storage
from dst_optax.finetuning.context import RunContext
from dst_optax.finetuning.display import Log, results_table
from dst_optax.finetuning.experiments import figures
from dst_optax.finetuning.interrupts import Interrupted, stop_requests
from dst_optax.finetuning.methods import Method
from dst_optax.finetuning.methods.identity import describe
from dst_optax.finetuning.models.base import LanguageModel
from dst_optax.finetuning.models.decoder.config import DecoderConfig
from dst_optax.finetuning.models.t5.config import T5Config
from dst_optax.finetuning.recipe import Recipe
from dst_optax.finetuning.steps import Programs, TrainState
from dst_optax.finetuning.tasks.base import TaskSuite


def finetune(
    run_dir: str,
    data: TaskSuite,
    model: LanguageModel | T5Config | DecoderConfig | str,
    methods: Mapping[str, Method],
    recipe: Recipe,
    *,
    checkpoint: str | None = None,
    subset_dir: str | None = None,
    rng_seeds: Sequence[int] = (0,),
    mesh_shape: tuple[int, int] | None = None,
    reference_seed: bool = False,
    config: str = "",
) -> list[dict[str, Any]]:
    """Tunes a seed model with each method and each random seed, and compares them.

    Rerun the command to resume it: runs go on from their last checkpoint, and finished ones are not
    repeated. Several processes train on one mesh after ``jax.distributed.initialize``; they share the file
    system.

    Args:
      run_dir: where everything goes.
      data: tasks, their source and the vocabulary.
      model: shape of a T5 or of a decoder, or the name of a published T5, e.g. ``t5_1_1_small``.
      methods: by the name that the table shows.
      recipe: how to train.
      checkpoint: the seed model: a T5X or Hugging Face checkpoint, or the name of a model on the Hugging Face
        hub, e.g. ``google/t5-v1_1-small@main``; None initialises one at random.
      subset_dir: a subset of that seed model that training starts from; budgets still count from the seed.
      rng_seeds: seeds of the data order, dropout and new parameters; one run each.
      mesh_shape: devices along (data, model); None puts all along data.
      reference_seed: keep the seed's path in the run directory instead of a copy.
      config: text that a resumed command must repeat.

    Returns:
      Rows of the table: ``method``, ``rng_seed``, ``score``, ``free_params``, ``seconds``, and more.

    Raises:
      ValueError: bad data, checkpoint or settings, or ``run_dir`` belongs to another run. Nothing has
        been overwritten.
      Diverged: the loss, the gradients or the parameters of a run are no longer finite.
      Interrupted: after SIGINT or SIGTERM, with a checkpoint.
    """
    if isinstance(rng_seeds, int) or not all(isinstance(x, int) for x in rng_seeds):
        raise ValueError(f"rng_seeds: {rng_seeds!r} is no sequence of integers, such as (0, 1, 2).")
    if len(set(rng_seeds)) != len(rng_seeds):
        raise ValueError(f"rng_seeds: {rng_seeds!r} has a seed twice; equal runs are no repetition.")
    context = RunContext(
        run_dir,
        data,
        model,
        recipe,
        checkpoint=checkpoint,
        subset_dir=subset_dir,
        mesh_shape=mesh_shape,
        reference_seed=reference_seed,
        config=config,
        methods=methods.values(),
    )
    runs = [
        Run(context, name, method, rng_seed) for name, method in methods.items() for rng_seed in rng_seeds
    ]
    for run in runs:
        run.claim()
    rows = [*context.baselines(), *(run.result() for run in runs)]
    context.console.print(results_table(rows, context.size))
    root = context.run_dir.root
    storage.write_text(root / "results.json", json.dumps(rows, indent=1))
    if processes.is_primary():
        figures.save(figures.scores(rows, title=", ".join(data.names)), root / "scores.png")
    return rows


@dataclass
class Progress:
    """What a checkpoint remembers beside the model.

    Attributes:
      best_step: step of the best evaluation so far; 0 before the first one.
      best_score: its score.
      best_perplexity: its perplexity, where the tasks have one: it decides between equal scores.
      free_params: parameters that differed from the seed then.
      waited: evaluations since then.
      evaluated: the last step whose model was evaluated; a stopped run owes that of its last step.
      seconds: spent in training, over all attempts.
    """

    best_step: int = 0
    best_score: float | None = None
    best_perplexity: float | None = None
    free_params: int = 0
    waited: int = 0
    evaluated: int = 0
    seconds: float = 0.0

    def improves(self, score: float, perplexity: float | None) -> bool:
        """Whether no evaluation has been as good."""
        if self.best_score is None or score != self.best_score:
            return self.best_score is None or score > self.best_score
        return None not in (perplexity, self.best_perplexity) and perplexity < self.best_perplexity  # type: ignore[operator]


@dataclass(frozen=True)
class Run:
    """One method with one random seed.

    Attributes:
      context: what it shares with other runs.
      name: of the method, to show; also of its directory.
      method: what is tuned.
      rng_seed: of the data order, dropout and new parameters.
    """

    context: RunContext
    name: str
    method: Method
    rng_seed: int

    @property
    def directory(self) -> Path:
        """Where its files go."""
        return self.context.run_dir.root / self.name / f"rng_{self.rng_seed}"

    def claim(self) -> None:
        """Notes the method in the run's directory.

        Raises:
          ValueError: the run was begun with another one.
        """
        file, ours = self.directory / "method.txt", describe(self.method)
        exists, begun = file.is_file(), (self.directory / "metrics.jsonl").exists()
        processes.barrier(f"{file} is looked for")
        if exists and (theirs := file.read_text()) != ours:
            at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), 0)
            first, second = (text[max(at - 60, 0) : at + 60] for text in (theirs, ours))
            raise ValueError(
                f"{self.directory} was begun with another method: where it has {first!r}, this one has "
                f"{second!r}. Give another run_dir or name; or delete {file} if the two are the same to you."
            )
        if not exists and not begun:  # runs of earlier versions have no such file
            self.directory.mkdir(parents=True, exist_ok=True)
            storage.write_text(file, ours)

    def result(self) -> dict[str, Any]:
        """The row of the table, of an earlier command or after training from the last checkpoint.

        Raises:
          ValueError: see :meth:`claim`.
          Diverged: the loss, the gradients or the parameters are no longer finite.
          Interrupted: after SIGINT or SIGTERM, with a checkpoint.
        """
        self.claim()
        file = self.directory / "result.json"
        if file.is_file():
            return json.loads(file.read_text())
        checkpoints = storage.Checkpoints(self.directory / "checkpoints", self.context.seed_fingerprint)
        progress, state = Progress(), self.start()
        last = max(checkpoints.steps(), default=0)
        if last:
            # version 0.1 did not write it; one evaluation fewer is better than one that counts twice
            progress = Progress(**{"evaluated": last} | checkpoints.progress(last))
            state = self._restore(checkpoints.path(last), state)
        with Log(self.directory, f"{self.name} rng {self.rng_seed}", last, self.context.recipe.steps) as log:
            state, last = self._train(state, last, progress, checkpoints, log)
        if progress.best_step != last:
            state = self._restore(checkpoints.path(progress.best_step), state)
        row = self._finish(state, progress)
        storage.write_text(file, json.dumps(row, indent=1))
        return row

    def start(self) -> TrainState:
        """Parameters and the optimizer's state before the first step, on the devices."""
        mesh, key = self.context.mesh, jax.random.fold_in(jax.random.key(self.rng_seed), 0)
        seed, start = self.context.place_seed_and_start()
        frozen, tuned = self.method.split(start, key, self.context.model)
        tuned = placement.place_added(tuned, mesh)
        return TrainState(frozen, tuned, placement.place_like(self.method.init(seed, tuned), tuned, mesh))

    def _restore(self, path: Path, state: TrainState) -> TrainState:
        tuned, slots = self.method.load(path, self.context.seed, state.tuned, state.slots)
        return TrainState(state.frozen, tuned, slots)

    def _train(
        self,
        state: TrainState,
        start: int,
        progress: Progress,
        checkpoints: storage.Checkpoints,
        log: Log,
    ) -> tuple[TrainState, int]:
        context, recipe, programs = self.context, self.context.recipe, self._programs
        batches = inputs.train_batches(
            context.model, context.train_name, recipe.lengths, recipe.batch_size, self.rng_seed, start
        )
        batch_sharding = placement.batch_sharding(context.mesh)
        key, began = jax.random.key(self.rng_seed), time.perf_counter() - progress.seconds
        last = start
        if start and recipe.evaluates_at(start) and progress.evaluated < start:
            self._evaluate(start, state, progress, log)
        with stop_requests() as stop_requested:
            for step in range(start + 1, recipe.steps + 1):
                if recipe.patience is not None and progress.waited >= recipe.patience:
                    break
                batch = next(batches)
                log.count(inputs.count_tokens(batch))
                before = programs.mark(state.tuned, state.slots) if recipe.logs_at(step) else None
                batch = jax.device_put(batch, batch_sharding)
                state, measured = programs.step(state, batch, jax.random.fold_in(key, step))
                if recipe.logs_at(step):
                    log.training(step, {**measured, **programs.measure(state.tuned, state.slots, before)})
                stopping = processes.any_process(stop_requested())
                if stopping or recipe.evaluates_at(step) or recipe.saves_at(step):
                    log.require_finite(step, {**measured, "largest parameter": programs.largest(state.tuned)})
                if recipe.evaluates_at(step) and not stopping:
                    self._evaluate(step, state, progress, log)
                if recipe.snapshots_at(step):
                    self._export(self.directory / "snapshots" / f"{step:08d}", state)
                if recipe.saves_at(step) or stopping or progress.best_step == step:
                    progress.seconds = time.perf_counter() - began
                    checkpoints.save(step, self._writer(state), asdict(progress))
                if stopping:
                    raise Interrupted(
                        f"stopped at step {step}; the checkpoint is in {checkpoints.path(step)}. Rerun the "
                        "command to resume."
                    )
                last = step
            if processes.any_process(stop_requested()):  # during the last evaluation
                raise Interrupted(f"stopped after step {last}, the last one. Rerun the command to resume.")
        return state, last

    def _evaluate(self, step: int, state: TrainState, progress: Progress, log: Log) -> None:
        jax.block_until_ready(state.tuned)
        measured, score = self.context.evaluator.score(self.method.merge(state.frozen, state.tuned))
        perplexities = [x for name, x in measured.items() if name.endswith("/perplexity")]
        perplexity = sum(perplexities) / len(perplexities) if perplexities else None
        if progress.improves(score, perplexity):
            mark = self._programs.mark(state.tuned, state.slots)
            free_params = self._programs.measure(state.tuned, state.slots, mark)["free_params"]
            progress.best_step, progress.best_score, progress.best_perplexity = step, score, perplexity
            progress.free_params, progress.waited = int(free_params), 0
        else:
            progress.waited += 1
        progress.evaluated = step
        log.evaluation(step, measured, score)

    @property
    def _programs(self) -> Programs:
        return self.context.programs(self.method)

    def _writer(self, state: TrainState) -> Any:
        return lambda path: self.method.save(path, self.context.seed, state.tuned, state.slots)

    def _export(self, path: Path, state: TrainState) -> None:
        if not path.exists():
            with storage.shared_directory(path) as temporary:
                self.method.export(
                    temporary, self.context.seed, state.tuned, state.slots, self.context.save_model
                )

    def _finish(self, state: TrainState, progress: Progress) -> dict[str, Any]:
        """Exports the best model, predicts and scores with it."""
        data, evaluator = self.context.data, self.context.evaluator
        self._export(self.directory / "tuned", state)
        self.context.export_hf(self.directory / "tuned")
        params = self.method.merge(state.frozen, state.tuned)
        for task in (*data.names, *data.diagnostics):
            split = evaluator.split(task, data.predicted_split(task))
            predicted = evaluator.predict(params, split)
            if processes.is_primary():
                data.write(self.directory / "predictions", task, split.examples, predicted)
        measured, score = evaluator.score(params)
        return {
            "method": self.name,
            "rng_seed": self.rng_seed,
            "score": score,
            "train_score": evaluator.score(params, "train")[1] if self.context.recipe.score_train else None,
            "test_score": evaluator.score(params, "test")[1] if evaluator.tests else None,
            "free_params": progress.free_params,
            "seconds": progress.seconds,
            "device": self.context.mesh.devices.flat[0].device_kind,
            "best_step": progress.best_step,
            "metrics": measured,
        }
