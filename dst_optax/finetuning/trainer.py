"""Fine-tuning: seqio in, one compiled step, evaluation by decoding, checkpoints that can be killed.

A command makes one run directory:

    run.json             what the run is; another run is refused here
    seed/                the seed model, once (or a reference to where it lies)
    <method>/rng_<n>/    one run each
      checkpoints/<step>   what differs from the seed, the optimizer's state, the data position
      metrics.jsonl, tensorboard/
      predictions/         in the leaderboard's form
      snapshots/<step>     the tuned model on the way, if the recipe asks for it
      tuned/               the tuned model: a subset, or a whole model where all of it moved
      result.json          one row of the table; the run is done
    results.md, scores.png
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from dst_optax import subset
from dst_optax.finetuning import inputs, processes, storage
from dst_optax.finetuning.display import Log, results_table
from dst_optax.finetuning.methods import Method, Params
from dst_optax.finetuning.models import t5
from dst_optax.finetuning.plots import plot_scores
from dst_optax.finetuning.steps import TrainState, make_step
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue
from dst_optax.silos import leaf_path


class Interrupted(Exception):  # noqa: N818
    """The run was asked to stop; it saved a checkpoint first."""


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
      eval_every: steps between evaluations.
      log_every: steps between lines of metrics.
      save_every: steps between checkpoints; improvements are saved as well. None saves at evaluations.
      snapshot_every: steps between exports of the tuned model to ``snapshots/<step>``; None exports none.
      patience: evaluations without a better score before the run stops; None never stops early.
      eval_batch_size: examples decoded at once.
      num_beams: 1 decodes greedily.
      score_train: whether the row of the table has a score on the training split as well.
    """

    steps: int
    batch_size: int = 32
    lengths: Mapping[str, int] = field(default_factory=lambda: {"inputs": 512, "targets": 16})
    accumulate: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dtype: str = "float32"
    dropout: float | None = None
    eval_every: int = 500
    log_every: int = 50
    save_every: int | None = None
    snapshot_every: int | None = None
    patience: int | None = None
    eval_batch_size: int = 64
    num_beams: int = 1
    score_train: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "log_every", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} is {getattr(self, name)}, it must be at least 1.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"recipe: batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}."
            )


def finetune(
    run_dir: str,
    data: SuperGlue,
    model: t5.T5Config,
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
    """Tunes a seed model with each method and each seed of randomness, and compares them.

    What was started before goes on from its last checkpoint; what is done is not done again. Several
    processes train on one mesh after ``jax.distributed.initialize``; they share the file system.

    Args:
      run_dir: where everything goes.
      data: tasks, their source and the vocabulary.
      model: of the network.
      methods: by the name that the table shows.
      recipe: how to train.
      checkpoint: the seed model: a T5X or Hugging Face checkpoint; None initialises one at random.
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
      Interrupted: after SIGINT or SIGTERM, with a checkpoint.
    """
    bench = Bench(
        run_dir,
        data,
        model,
        recipe,
        checkpoint=checkpoint,
        subset_dir=subset_dir,
        mesh_shape=mesh_shape,
        reference_seed=reference_seed,
        config=config,
    )
    rows = bench.baselines()
    for name, method in methods.items():
        for rng_seed in rng_seeds:
            rows.append(bench.run(name, method, rng_seed))
    bench.console.print(results_table(rows, bench.size))
    storage.write_text(bench.root / "results.json", json.dumps(rows, indent=1))
    if processes.writes():
        plot_scores(rows, bench.root / "scores.png", title=", ".join(data.names))
    return rows


class Bench:
    """What all runs of a directory share: data, seed model and evaluation; see :func:`finetune`.

    Attributes:
      root: the run directory.
      data: tasks, their source and the vocabulary.
      train_name: of the seqio mixture to train on.
      network: the T5.
      recipe: how to train.
      mesh: devices.
      seed: the seed model, on the host.
      seed_print: its fingerprint.
      start: where training starts, on the host: the seed model, or with a subset applied.
      evaluator: scores parameters.
      console: to print on.
    """

    def __init__(
        self,
        run_dir: str,
        data: SuperGlue,
        model: t5.T5Config,
        recipe: Recipe,
        *,
        checkpoint: str | None = None,
        subset_dir: str | None = None,
        mesh_shape: tuple[int, int] | None = None,
        reference_seed: bool = False,
        config: str = "",
    ):
        self.root, self.data, self.recipe = Path(run_dir), data, recipe
        self.mesh, self.console = _mesh(mesh_shape), Console(quiet=not processes.writes())
        if recipe.batch_size % (self.mesh.shape["data"] * recipe.accumulate):
            raise ValueError(
                f"recipe: batch_size {recipe.batch_size} must be a multiple of accumulate "
                f"{recipe.accumulate} times the {self.mesh.shape['data']} devices along data."
            )
        self.train_name = data.register()
        data.check()
        dropout = model.dropout_rate if recipe.dropout is None else recipe.dropout
        self.network = t5.Transformer(replace(model, dtype=recipe.dtype, dropout_rate=dropout))
        if data.vocabulary.vocab_size > model.vocab_size:
            raise ValueError(
                f"the vocabulary has {data.vocabulary.vocab_size} pieces, the model's embedding only "
                f"{model.vocab_size}; they do not belong together."
            )
        identity = {
            "tasks": list(data.names),
            "source": repr(data.source),
            "vocabulary": type(data.vocabulary).__name__,
            "model": repr(model),
            "recipe": json.loads(json.dumps(asdict(recipe))),
            "checkpoint": checkpoint,
            "subset_dir": subset_dir,
            "config": config,
        }
        _check_claim(self.root, identity)
        processes.wait(f"{self.root} is free or ours")
        self.seed = _seed(self.root, model, self.network, checkpoint)
        self.start = self.seed if subset_dir is None else subset.Subset.load(subset_dir).apply(self.seed)
        _claim(self.root, identity, None if reference_seed else self.seed)
        self.seed_print = storage.fingerprint(self.seed)
        self.evaluator = Evaluator(self.network, data, recipe, self.mesh)
        for line in self.evaluator.cuts():
            self.console.print(line, highlight=False)

    @property
    def size(self) -> int:
        """Parameters of the seed model."""
        return sum(x.size for x in jax.tree.leaves(self.seed))

    def baselines(self) -> list[dict[str, Any]]:
        """Rows of the most common answer and of the untuned model."""
        known = _baseline(self.root, self.data, self.evaluator, self.start)
        return [{"method": name, "free_params": 0, "seconds": 0.0, **row} for name, row in known.items()]

    def run(self, name: str, method: Method, rng_seed: int) -> dict[str, Any]:
        """Tunes with one method and one seed of randomness, from where an earlier command left it.

        Args:
          name: of the method, to show; also of its directory.
          method: what is tuned.
          rng_seed: of the data order, dropout and new parameters.

        Returns:
          The row of the table.
        """
        return Run(self, name, method, rng_seed).go()


@dataclass(frozen=True)
class Run:
    """One method with one seed of randomness.

    Attributes:
      bench: what it shares with other runs.
      name: of the method, to show.
      method: what is tuned.
      rng_seed: of the data order, dropout and new parameters.
    """

    bench: Bench
    name: str
    method: Method
    rng_seed: int

    @property
    def directory(self) -> Path:
        """Where its files go."""
        return self.bench.root / self.name / f"rng_{self.rng_seed}"

    def go(self) -> dict[str, Any]:
        """Trains from the last checkpoint to the end, then predicts with the best one."""
        done = self.directory / "result.json"
        if done.is_file():
            return json.loads(done.read_text())
        self.directory.mkdir(parents=True, exist_ok=True)
        checkpoints = storage.Checkpoints(self.directory / "checkpoints", self.bench.seed_print)
        progress: dict[str, Any] = {"best_step": None, "best_score": None, "waited": 0, "seconds": 0.0}
        state, last = self.start(), max(checkpoints.steps(), default=0)
        if last:
            progress = checkpoints.progress(last)
            state = self._restore(checkpoints.path(last), state)
        with Log(self.directory, f"{self.name} rng {self.rng_seed}", last) as log:
            state = self._train(checkpoints, state, progress, last, log)
        state = self._restore(checkpoints.path(progress["best_step"]), state)
        row = self._finish(state, progress)
        storage.write_text(done, json.dumps(row, indent=1))
        return row

    def start(self) -> TrainState:
        """Parameters and slots before the first step, on the devices."""
        mesh, key = self.bench.mesh, jax.random.fold_in(jax.random.key(self.rng_seed), 0)
        frozen, tuned = self.method.split(_place(self.bench.start, mesh), key)
        tuned = _place_new(tuned, mesh)
        slots = self.method.init(_place(self.bench.seed, mesh), tuned)
        return TrainState(frozen, tuned, _place_like(slots, tuned, mesh))

    def _restore(self, path: Path, state: TrainState) -> TrainState:
        tuned, slots = self.method.load(path, self.bench.seed, state.tuned, state.slots)
        return TrainState(state.frozen, tuned, slots)

    def _train(
        self,
        checkpoints: storage.Checkpoints,
        state: TrainState,
        progress: dict[str, Any],
        start: int,
        log: Log,
    ) -> TrainState:
        bench, recipe = self.bench, self.bench.recipe
        take_step = jax.jit(
            make_step(
                bench.network,
                self.method,
                accumulate=recipe.accumulate,
                label_smoothing=recipe.label_smoothing,
                z_loss=recipe.z_loss,
            ),
            donate_argnums=0,
        )
        mark, measure = jax.jit(self.method.mark), jax.jit(self.method.metrics)
        batches = inputs.train_batches(
            bench.train_name, recipe.lengths, recipe.batch_size, self.rng_seed, start
        )
        rows = NamedSharding(bench.mesh, PartitionSpec("data"))
        key = jax.random.key(self.rng_seed)
        save_every = recipe.save_every or recipe.eval_every
        pace = _Pace(start)
        with _stop_requests() as stop_requested:
            for step in range(start + 1, recipe.steps + 1):
                if recipe.patience is not None and progress["waited"] >= recipe.patience:
                    break
                batch = next(batches)
                pace.tokens += inputs.count_tokens(batch)
                logging = step % recipe.log_every == 0 or step == 1
                before = mark(state.tuned, state.slots) if logging else None
                state, measured = take_step(state, jax.device_put(batch, rows), jax.random.fold_in(key, step))
                if logging:
                    values = {**measured, **measure(state.tuned, state.slots, before)}
                    values = {name: float(x) for name, x in values.items()}
                    _check_finite(values, step)
                    speed, eta = pace.at(step, recipe.steps)
                    shown = {
                        "step": f"{step}/{recipe.steps}",
                        "loss": f"{values['loss']:.4f}",
                        "tokens/s": f"{speed:,.0f}",
                        "free": f"{values['free_params']:,.0f}",
                        "churn": f"{values.get('churn', 0.0):.3f}",
                        "eta": f"{eta:.0f}s",
                    }
                    log.write(step, {**values, "tokens_per_second": speed}, shown)
                stopping, at_end = processes.anyone(stop_requested()), step == recipe.steps
                if (step % recipe.eval_every == 0 and not stopping) or at_end:
                    jax.block_until_ready(state.tuned)
                    params = self.method.merge(state.frozen, state.tuned)
                    measured, score = bench.evaluator.score(params)
                    better = progress["best_score"] is None or score > progress["best_score"]
                    if better:
                        free = measure(state.tuned, state.slots, mark(state.tuned, state.slots))[
                            "free_params"
                        ]
                        progress |= {"best_step": step, "best_score": score, "free_params": int(free)}
                    progress["waited"] = 0 if better else progress["waited"] + 1
                    log.write(
                        step, {**measured, "eval/score": score}, {"step": f"{step}", "score": f"{score:.1f}"}
                    )
                if recipe.snapshot_every and step % recipe.snapshot_every == 0:
                    self._export(self.directory / "snapshots" / f"{step:08d}", state)
                if stopping or at_end or step % save_every == 0 or progress["best_step"] == step:
                    progress["seconds"] += pace.spent()
                    checkpoints.save(step, lambda p: self.method.save(p, state.tuned, state.slots), progress)  # noqa: B023
                if stopping and not at_end:
                    raise Interrupted(
                        f"stopped at step {step}; the checkpoint is in {checkpoints.path(step)}. The same "
                        "command goes on from there."
                    )
        return state

    def _export(self, path: Path, state: TrainState) -> None:
        if not path.exists():
            with storage.whole(path) as there:
                self.method.export(there, state.tuned, state.slots, self.bench.evaluator.save_model)

    def _finish(self, state: TrainState, progress: dict[str, Any]) -> dict[str, Any]:
        data, evaluator = self.bench.data, self.bench.evaluator
        params = self.method.merge(state.frozen, state.tuned)
        for task in (*data.names, *data.diagnostics):
            split = evaluator.split(task, "test")
            predicted = evaluator.predict(params, split)
            if processes.writes():
                data.write(self.directory / "predictions", task, split.examples, predicted)
        labelled = all(evaluator.split(task, "test").labelled for task in data.names)
        self._export(self.directory / "tuned", state)
        measured, score = evaluator.score(params)
        return {
            "method": self.name,
            "rng_seed": self.rng_seed,
            "score": score,
            "train_score": evaluator.score(params, "train")[1] if self.bench.recipe.score_train else None,
            "test_score": evaluator.score(params, "test")[1] if labelled else None,
            "free_params": progress["free_params"],
            "seconds": progress["seconds"],
            "best_step": progress["best_step"],
            "metrics": measured,
        }


class Evaluator:
    """Decodes splits in batches of one shape, so that it is compiled once.

    Args:
      network: the T5.
      data: tasks and vocabulary.
      recipe: lengths, batch size and beams.
      mesh: devices.
    """

    def __init__(self, network: Any, data: SuperGlue, recipe: Recipe, mesh: Mesh):
        self._network, self._data, self._recipe = network, data, recipe
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        devices = mesh.shape["data"]
        self._batch = -(-recipe.eval_batch_size // devices) * devices
        self._splits: dict[tuple[str, str], inputs.EvalSplit] = {}
        self._decode = jax.jit(
            lambda params, tokens: t5.decode(
                network, params, tokens, recipe.lengths["targets"], num_beams=recipe.num_beams
            ),
            out_shardings=NamedSharding(mesh, PartitionSpec()),
        )

    def split(self, task: str, split: str) -> inputs.EvalSplit:
        """A split, read once."""
        if (task, split) not in self._splits:
            name = self._data.provider(task)
            self._splits[task, split] = inputs.eval_split(name, split, self._recipe.lengths)
        return self._splits[task, split]

    def predict(self, params: Params, split: inputs.EvalSplit) -> list[Any]:
        """Predictions for every example of a split, in the task's own terms."""
        texts = []
        for at in range(0, len(split.tokens), self._batch):
            tokens = split.tokens[at : at + self._batch]
            short = self._batch - len(tokens)
            padded = np.concatenate([tokens, np.repeat(tokens[:1], short, 0)])
            decoded = np.asarray(self._decode(params, jax.device_put(padded, self._rows)))
            texts += [inputs.decode_text(self._data.vocabulary, row) for row in decoded[: len(tokens)]]
        return split.predictions(texts)

    def score(self, params: Params, split: str = "validation") -> tuple[dict[str, float], float]:
        """Metrics of all tasks on a split, and the one score."""
        found = {
            task: examples.metrics(self.predict(params, examples))
            for task in self._data.names
            for examples in [self.split(task, split)]
        }
        kind = "eval" if split == "validation" else split
        flat = {f"{kind}/{task}/{name}": x for task, values in found.items() for name, x in values.items()}
        return flat, self._data.score(found)

    def cuts(self) -> list[str]:
        """One line for every feature whose examples are cut."""
        lines = []
        for task in self._data.names:
            for split in ("train", "validation"):
                name = self._data.provider(task)
                for feature, (cut, longest) in inputs.count_cut(name, split, self._recipe.lengths).items():
                    if cut:
                        lines.append(
                            f"{task} {split}: {cut} examples have {feature} longer than "
                            f"{self._recipe.lengths[feature]} tokens and are cut; the longest has {longest}."
                        )
        return lines

    def save_model(self, directory: Path, params: Params) -> None:
        """Writes a whole model that ``checkpoint=`` can name."""
        params = processes.on_host(params)
        if processes.writes():
            t5.save_hf(params, self._network.config, directory)


class _Pace:
    """Wall time and tokens since the last look."""

    def __init__(self, step: int):
        self.tokens = 0
        self._step, self._clock, self._saved = step, time.perf_counter(), time.perf_counter()

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Tokens a second since the last call, and seconds to go."""
        now = time.perf_counter()
        spent = now - self._clock
        speed, eta = self.tokens / spent, (steps - step) * spent / (step - self._step)
        self.tokens, self._step, self._clock = 0, step, now
        return speed, eta

    def spent(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        spent, self._saved = now - self._saved, now
        return spent


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Notes SIGINT and SIGTERM instead of dying; a second one kills as usual."""
    asked: list[int] = []
    old: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        signal.signal(number, old[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _check_finite(values: Mapping[str, float], step: int) -> None:
    if not np.isfinite(values["loss"]):
        raise ValueError(
            f"the loss is {values['loss']} at step {step}: lower the learning rate, or check the seed model. "
            "Earlier checkpoints are untouched."
        )


def _mesh(shape: tuple[int, int] | None) -> Mesh:
    shape = shape or (jax.device_count(), 1)
    if shape[0] * shape[1] != jax.device_count():
        raise ValueError(f"mesh_shape {shape} does not hold the {jax.device_count()} devices there are.")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=kinds)


def _check_claim(root: Path, identity: dict[str, Any]) -> None:
    """Refuses a directory that is not ours."""
    file = root / "run.json"
    if not file.exists():
        if root.exists() and any(root.iterdir()):
            raise ValueError(f"{root} is not empty and no run directory; give another run_dir.")
        return
    known = json.loads(file.read_text())
    differ = [name for name in identity if known.get(name) != identity[name]]
    if differ:
        name = differ[0]
        raise ValueError(
            f"{root} belongs to another run: {', '.join(differ)} differ. For {name}, it has "
            f"{str(known.get(name))[:300]!r} and this run {str(identity[name])[:300]!r}. Give another "
            "run_dir, or delete it."
        )


def _claim(root: Path, identity: dict[str, Any], seed: Params | None) -> None:
    """Makes the run directory ours, and keeps the seed model there unless it is None."""
    root.mkdir(parents=True, exist_ok=True)
    claimed, kept = (root / "run.json").exists(), (root / "seed").exists()
    processes.wait(f"{root} is looked at")
    if not claimed:
        storage.write_text(root / "run.json", json.dumps(identity, indent=1))
    if seed is not None and not kept:
        with storage.whole(root / "seed") as there:
            storage.save_model(there / "model.safetensors", seed)


def _seed(root: Path, model: t5.T5Config, network: Any, checkpoint: str | None) -> Params:
    """The seed model on the host: from the run directory, or from where it lies."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def init() -> Params:
        return network.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)["params"]

    kept = root / "seed" / "model.safetensors"
    if kept.exists():
        return storage.load_model(kept, jax.eval_shape(init))
    seed = jax.jit(init)() if checkpoint is None else t5.load(checkpoint, model)
    return jax.tree.map(np.asarray, seed)


def _baseline(root: Path, data: SuperGlue, evaluator: "Evaluator", seed: Params) -> dict[str, Any]:
    """Scores of the most common answer and of the model before tuning."""
    file = root / "baseline.json"
    known = file.exists()
    processes.wait(f"{file} is looked for")
    if not known:
        majority = data.majority()
        found: dict[str, Any] = {} if majority is None else {"majority": {"score": majority}}
        metrics, score = evaluator.score(seed)
        found["seed model"] = {"score": score, "metrics": metrics}
        storage.write_text(file, json.dumps(found, indent=1))
    return json.loads(file.read_text())


def _place(params: Params, mesh: Mesh) -> Params:
    """Copies of the parameters on the devices, divided as their logical axes say."""
    return jax.device_put(params, t5.shardings(params, mesh))


def _place_new(tuned: Params, mesh: Mesh) -> Params:
    """Parameters that a method added go on every device; those of the seed stay where they are."""

    def place(x: jax.Array) -> jax.Array:
        on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return x if on_mesh else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(place, tuned)


def _place_like(slots: Any, tuned: Params, mesh: Mesh) -> Any:
    """Slots beside the parameters that they belong to; what belongs to none on every device."""
    known = {name: (x.shape, x.sharding) for name, x in storage.named_leaves(tuned).items()}

    def place(key: Any, x: Any) -> Any:
        path = leaf_path(key)
        for name, (shape, sharding) in known.items():
            if x.shape == shape and f"/{path}".endswith(f"/{name}"):
                return jax.device_put(x, sharding)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(place, slots)
