"""Whole runs of a tiny model: the same bits however often a run is stopped, and clear refusals."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

seqio = pytest.importorskip("seqio")
ocp = pytest.importorskip("orbax.checkpoint")
for needed in ("clu", "rich", "tensorboard", "matplotlib"):
    pytest.importorskip(needed)

import processes  # noqa: E402
from few import Few  # noqa: E402
from real_data import REAL_DATA, needs_data  # noqa: E402

import dst_optax  # noqa: E402
from dst_optax import subset  # noqa: E402
from dst_optax.finetuning import evaluator, storage, trainer  # noqa: E402
from dst_optax.finetuning.context import RunContext  # noqa: E402
from dst_optax.finetuning.evaluator import Evaluator  # noqa: E402
from dst_optax.finetuning.methods.dst import DST  # noqa: E402
from dst_optax.finetuning.methods.full import Full  # noqa: E402
from dst_optax.finetuning.methods.lora import LoRA  # noqa: E402
from dst_optax.finetuning.models import t5  # noqa: E402
from dst_optax.finetuning.steps import TrainState, make_step  # noqa: E402
from dst_optax.finetuning.tasks.span_corruption import SpanCorruption  # noqa: E402
from dst_optax.finetuning.tasks.superglue import tasks  # noqa: E402
from dst_optax.finetuning.tasks.superglue.sources import JsonlSource  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402
from dst_optax.subset import models  # noqa: E402

MODEL = t5.T5Config(
    vocab_size=384,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_dim=16,
    dropout_rate=0.1,
)
RECIPE = trainer.Recipe(
    steps=6,
    batch_size=8,
    lengths={"inputs": 48, "targets": 16},
    accumulate=2,
    eval_every=3,
    save_every=1,
    log_every=2,
    eval_batch_size=24,
)
TESTS = [str(Path(__file__).parents[i]) for i in range(2)]
DATA = SuperGlue(Few(), seqio.ByteVocabulary(), ("rte",))


def dst():
    return DST(optax.adam(1e-2), 0.05)


def tune(directory, **changes):
    given = {"data": DATA, "model": MODEL, "methods": {"dst": dst()}, "recipe": RECIPE, **changes}
    return trainer.finetune(str(directory), **given)


def restored(run):
    """Tuned parameters and slots of the last checkpoint."""
    seed = storage.load_model(run.parents[1] / "seed" / "model.safetensors", shapes())
    params = jax.tree.map(jnp.asarray, seed)
    return dst().load(run / "checkpoints" / "00000006", seed, params, dst().init(seed, params))


def contents(run):
    """Everything a checkpoint holds, by name, as bits."""
    found = subset.Subset.load(run / "checkpoints" / "00000006" / "subset")
    parts = [(path, part, e) for path, e in found.items() for part in ("positions", "values")]
    out = {f"{path}:{part}": getattr(e, part).tobytes() for path, part, e in parts}
    for name, x in storage.named_leaves(restored(run)).items():
        out[name] = np.asarray(x).tobytes()
    return out


def logged(run, name):
    """Steps and values of a metric."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def contents_of_subset(directory):
    """The tuned subset, as bits."""
    found = subset.Subset.load(directory / "dst/rng_0/tuned/subset").items()
    return {path: (e.positions.tobytes(), e.values.tobytes()) for path, e in found}


def shapes():
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = lambda: t5.Transformer(MODEL).init(jax.random.key(0), tokens, tokens, tokens)["params"]  # noqa: E731
    return jax.eval_shape(init)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, tune(directory)


def test_the_tuned_model_is_there_before_anything_is_predicted(tmp_path, monkeypatch):
    run, predict = tmp_path / "run/dst/rng_0", Evaluator.predict

    def fail_at_the_end(self, params, split):
        if (run / "checkpoints/00000001").exists():
            raise OSError("no prediction")
        return predict(self, params, split)

    monkeypatch.setattr(Evaluator, "predict", fail_at_the_end)
    with pytest.raises(OSError, match="no prediction"):
        tune(tmp_path / "run", recipe=replace(RECIPE, steps=1))
    assert subset.Subset.load(run / "tuned/subset").count > 0


def test_a_run_leaves_what_it_promises(whole):
    directory, rows = whole
    run = directory / "dst" / "rng_0"
    assert [row["method"] for row in rows] == ["majority", "seed model", "dst"]
    row = rows[-1]
    assert 0 < row["free_params"] <= 0.06 * sum(x.size for x in jax.tree.leaves(shapes()))
    labels = Counter(row["label"] for row in DATA.source.rows("rte", "validation"))
    assert rows[0]["score"] == pytest.approx(100 * max(labels.values()) / DATA.source.size)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "loss" in line} == {1, 2, 4, 6}
    assert {line["step"] for line in lines if "eval/score" in line} == {3, 6}
    assert len((run / "predictions" / "RTE.jsonl").read_text().splitlines()) == DATA.source.size
    tuned = subset.Subset.load(run / "tuned" / "subset")
    assert tuned.count == row["free_params"]
    assert row["device"] == jax.devices()[0].device_kind
    assert (directory / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run / "tensorboard").iterdir())
    best = json.loads((run / "checkpoints" / "00000006" / "progress.json").read_text())["best_step"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {f"{s:08d}" for s in {best, 6}}


@pytest.mark.parametrize(("scores", "best"), [([50.0, 40.0], 3), ([40.0, 50.0], 6)])
def test_what_is_exported_is_the_best_model(tmp_path, monkeypatch, scores, best):
    found = iter([30.0, *scores, 0.0])  # of the seed model, on the way, and at the end

    def score(self, params, split="validation"):
        return {}, next(found) if split == "validation" else 0.0

    monkeypatch.setattr(evaluator.Evaluator, "score", score)
    row = tune(tmp_path)[-1]
    run = tmp_path / "dst" / "rng_0"
    checkpoint = subset.Subset.load(run / "checkpoints" / f"{best:08d}" / "subset").items()
    kept = {path: (e.positions.tobytes(), e.values.tobytes()) for path, e in checkpoint}
    assert row["best_step"] == best
    assert contents_of_subset(tmp_path) == kept


def test_checkpoints_hold_no_copy_of_the_model(whole):
    run = whole[0] / "dst" / "rng_0" / "checkpoints" / "00000006"
    size = 4 * sum(x.size for x in jax.tree.leaves(shapes()))
    values = subset.Subset.load(run / "subset").nbytes
    with ocp.StandardCheckpointer() as checkpointer:
        stored = jax.tree.leaves(checkpointer.metadata(run / "slots").item_metadata.tree)
    slots = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in stored)
    assert values < 0.2 * size
    assert 2 * size < slots < 2 * size + 16 * len(jax.tree.leaves(shapes())) + 100  # Adam's two slots


def test_done_runs_are_not_done_again(whole, monkeypatch):
    monkeypatch.setattr(trainer.Programs, "of", None)
    assert tune(whole[0]) == whole[1]


def test_ctrl_c_saves_and_the_resumed_run_is_the_same_bit_for_bit(whole, tmp_path, monkeypatch):
    spent = trainer.inputs.count_tokens

    def interrupt(batch):
        interrupt.calls += 1
        if interrupt.calls == 3:  # a step that is evaluated
            os.kill(os.getpid(), signal.SIGINT)
        return spent(batch)

    interrupt.calls = 0
    monkeypatch.setattr(trainer.inputs, "count_tokens", interrupt)
    with pytest.raises(trainer.Interrupted, match="stopped at step 3"):
        tune(tmp_path / "run")
    # what Python starts with; a shell's background jobs ignore the signal
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    row = tune(tmp_path / "run")[-1]
    assert {**row, "seconds": None} == {**whole[1][-1], "seconds": None}
    run, other = (directory / "dst" / "rng_0" for directory in (tmp_path / "run", whole[0]))
    assert contents(run) == contents(other)
    assert logged(run, "eval/score") == logged(other, "eval/score")


def test_a_run_of_version_0_1_evaluates_no_step_twice(whole, tmp_path):
    """Its progress files do not say which step was evaluated last."""
    shutil.copytree(whole[0], tmp_path / "run")
    run = tmp_path / "run" / "dst" / "rng_0"
    (run / "result.json").unlink()
    file = run / "checkpoints" / "00000006" / "progress.json"
    progress = json.loads(file.read_text())
    assert progress.pop("evaluated") == 6
    file.write_text(json.dumps(progress))
    row = tune(tmp_path / "run")[-1]
    assert {**row, "seconds": None} == {**whole[1][-1], "seconds": None}
    assert logged(run, "eval/score") == logged(whole[0] / "dst" / "rng_0", "eval/score")


def test_a_stop_in_the_last_evaluation_ends_the_command(tmp_path, monkeypatch):
    methods, recipe = {"dst": dst(), "full": Full(optax.sgd(1e-2))}, replace(RECIPE, steps=1)
    log = lambda name: tmp_path / "run" / name / "rng_0" / "metrics.jsonl"  # noqa: E731
    score = Evaluator.score

    def interrupt(self, *given):
        if log("dst").exists() and not log("full").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return score(self, *given)

    monkeypatch.setattr(Evaluator, "score", interrupt)
    with pytest.raises(trainer.Interrupted, match="stopped after step 1, the last one"):
        tune(tmp_path / "run", methods=methods, recipe=recipe)
    monkeypatch.setattr(Evaluator, "score", score)
    assert not log("full").exists()
    assert [row["method"] for row in tune(tmp_path / "run", methods=methods, recipe=recipe)][2:] == [
        "dst",
        "full",
    ]


KILLED = """
import sys, time
sys.path[:0] = {tests!r}
from dst_optax.finetuning import storage
import test_trainer
save = storage.save_tree
def slow(path, tree):  # dies in the middle of a checkpoint
    save(path, tree)
    if path.parent.name.endswith("00000003"):
        print("SAVING", flush=True)
        time.sleep(600)
storage.save_tree = slow
test_trainer.tune({run!r})
"""


@pytest.mark.slow
def test_kill_9_while_saving_loses_only_the_steps_since_the_last_checkpoint(whole, tmp_path):
    code = KILLED.format(tests=TESTS, run=str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        while child.poll() is None and b"SAVING" not in child.stdout.readline():
            time.sleep(0.01)
        child.kill()
    made = tmp_path / "run" / "dst" / "rng_0" / "checkpoints"
    assert (made / ".tmp-00000003").is_dir()
    assert (made / "00000002" / "progress.json").is_file()
    tune(tmp_path / "run")
    assert contents(tmp_path / "run" / "dst" / "rng_0") == contents(whole[0] / "dst" / "rng_0")
    lines = [json.loads(x) for x in (made.parent / "metrics.jsonl").read_text().splitlines()]
    assert len([x for x in lines if "loss" in x]) == 4


def test_another_run_is_refused_before_anything_is_written(whole):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole[0].rglob("*"))
    recipe = replace(RECIPE, batch_size=16)
    with pytest.raises(ValueError, match=r"belongs to another run: recipe differ.*'batch_size': 8"):
        tune(whole[0], recipe=recipe)
    assert sorted((p, p.stat().st_mtime_ns) for p in whole[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": SuperGlue(DATA.source, DATA.vocabulary, ("rtx",))}, "unknown SuperGLUE task 'rtx'"),
        ({"data": SuperGlue(DATA.source, DATA.vocabulary, ("axb",))}, "axb has no training data"),
        (
            {"data": SuperGlue(JsonlSource("/absent"), DATA.vocabulary, ("rte",))},
            "/absent/RTE/train.jsonl does not",
        ),
        ({"model": replace(MODEL, vocab_size=100)}, "the vocabulary has 259 pieces"),
        ({"checkpoint": "/absent"}, "/absent"),
        ({"checkpoint": "gs://bucket/seed"}, "checkpoint: gs://bucket/seed lies in an object store"),
        ({"subset_dir": "/absent"}, "/absent"),
        ({"mesh_shape": (3, 5)}, "mesh_shape"),
        ({"methods": {"full": Full(optax.sgd(1)), "dst": DST(optax.sgd(1), 10.0)}}, "fraction.*10"),
        ({"methods": {"lora": LoRA(optax.sgd(1), num_free_params=1)}}, "LoRA: 1 free parameters are too few"),
        ({"rng_seeds": 0}, "rng_seeds: 0 is no sequence"),
    ],
)
def test_bad_input_is_refused_before_training(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        tune(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_a_store_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run_dir: gs://bucket/run lies in an object store"):
        tune("gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_a_run_notices_that_its_data_has_changed(tmp_path):
    (tmp_path / "RTE").mkdir()

    def write(label):
        row = {"premise": "P", "hypothesis": "H", "label": label, "idx": 0}
        for name in ("train", "val", "test"):
            (tmp_path / "RTE" / f"{name}.jsonl").write_text(json.dumps(row))

    data = SuperGlue(JsonlSource(str(tmp_path)), DATA.vocabulary, ("rte",))
    write("entailment")
    RunContext(str(tmp_path / "run"), data, MODEL, RECIPE)
    RunContext(str(tmp_path / "run"), data, MODEL, RECIPE)
    write("not_entailment")
    with pytest.raises(ValueError, match="belongs to another run: data_sha256 differ"):
        RunContext(str(tmp_path / "run"), data, MODEL, RECIPE)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bad_rows_of_any_split_are_named_before_anything_is_written(split, tmp_path):
    data = tmp_path / "data" / "RTE"
    data.mkdir(parents=True)
    row = {"premise": "P", "hypothesis": "H", "label": "entailment", "idx": 0}
    for name in ("train", "val", "test"):
        text = json.dumps(row) + ("\n{" if name == split else "")
        (data / f"{name}.jsonl").write_text(text)
    source = JsonlSource(str(tmp_path / "data"))
    with pytest.raises(ValueError, match=rf"{split}\.jsonl:2: "):
        tune(tmp_path / "run", data=SuperGlue(source, DATA.vocabulary, ("rte",)))
    assert not (tmp_path / "run").exists()


def test_bfloat16_an_optimizer_without_slots_and_diagnostics(tmp_path):
    data = SuperGlue(DATA.source, DATA.vocabulary, ("rte",), diagnostics=("axb",))
    recipe = replace(RECIPE, steps=2, eval_every=2, dtype="bfloat16")
    (row,) = tune(tmp_path, data=data, recipe=recipe, methods={"full": Full(optax.sgd(1e-2))})[2:]
    assert row["best_step"] == 2
    run = tmp_path / "full" / "rng_0"
    tuned = storage.load_tree(run / "checkpoints" / "00000002" / "tuned", shapes())
    assert {x.dtype for x in jax.tree.leaves(tuned)} == {jnp.dtype("float32")}
    lines = [json.loads(x) for x in (run / "predictions" / "AX-b.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in lines] == list(range(len(data.source.rows("axb", "test"))))
    assert {line["label"] for line in lines} <= {"entailment", "not_entailment"}


def test_another_method_is_refused_under_its_name(tmp_path):
    """Its row, or its optimizer's state, would be taken for the new method's."""
    recipe, run = replace(RECIPE, steps=1), tmp_path / "run"
    tune(run, recipe=recipe)
    for other in (DST(optax.adam(1e-2), 0.5), DST(optax.adam(0.5), 0.05), Full(optax.sgd(1e-2))):
        with pytest.raises(ValueError, match=r"dst/rng_0 was begun with another method"):
            tune(run, recipe=recipe, methods={"full": Full(optax.sgd(1e-2)), "dst": other})
        assert not (run / "full" / "rng_0" / "result.json").exists()
    with pytest.raises(ValueError, match="a seed twice"):
        tune(run, recipe=recipe, rng_seeds=(0, 0))


def test_another_vocabulary_of_the_same_kind_is_refused(tmp_path):
    RunContext(str(tmp_path / "run"), DATA, MODEL, RECIPE)
    other = SuperGlue(DATA.source, seqio.ByteVocabulary(extra_ids=7), ("rte",))
    with pytest.raises(ValueError, match="vocabulary_sha256 differ"):
        RunContext(str(tmp_path / "run"), other, MODEL, RECIPE)


def test_no_checkpoint_is_written_of_a_model_that_is_nan(tmp_path):
    """The run could never go on from it."""
    recipe = replace(RECIPE, log_every=100, eval_every=2, steps=4)
    methods = {"full": Full(optax.sgd(lambda step: jnp.where(step < 2, 1e-3, jnp.nan)))}
    with pytest.raises(ValueError, match=r"the largest parameter is nan at step 3"):
        tune(tmp_path, methods=methods, recipe=recipe)
    checkpoints = tmp_path / "full" / "rng_0" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["00000002"]


@pytest.mark.parametrize(
    "change", ["evaluation", "noise_density", "mean_span", "validation_size", "corruptions"]
)
def test_other_examples_or_scores_of_the_same_data_are_refused(tmp_path, change):
    (tmp_path / "a.txt").write_text("Some words of a text. " * 40)
    texts = SpanCorruption(str(tmp_path), seqio.ByteVocabulary(extra_ids=100), 48, validation_size=4)
    data = DATA if change == "evaluation" else texts
    other = {
        "evaluation": "options",
        "noise_density": 0.1,
        "mean_span": 2.0,
        "validation_size": 3,
        "corruptions": 2,
    }
    run = tmp_path / "run"
    RunContext(str(run), data, MODEL, RECIPE)
    data = replace(data, **{change: other[change]})
    with pytest.raises(ValueError, match=f"belongs to another run: settings differ.*{change}"):
        RunContext(str(run), data, MODEL, RECIPE)
    forget(run, "settings")  # as versions before 0.2 did not write it
    RunContext(str(run), data, MODEL, RECIPE)


def forget(run, *names):
    """Makes a run directory one of an earlier version, which did not write all that identifies it."""
    identity = json.loads((run / "run.json").read_text())
    assert all(identity.pop(name) is not None for name in names)
    (run / "run.json").write_text(json.dumps(identity))


def test_a_second_command_in_a_run_directory_is_refused(tmp_path):
    """It would take checkpoints that the first one is writing for those of a killed run."""
    fcntl = pytest.importorskip("fcntl")
    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="run: another process is using it"):
            RunContext(str(run), DATA, MODEL, RECIPE)
    assert [path.name for path in run.iterdir()] == [".lock"]
    for _ in range(2):  # one command may open it again
        RunContext(str(run), DATA, MODEL, RECIPE)
    with (run / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_does(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    RunContext(str(tmp_path / "run"), DATA, MODEL, RECIPE)


def test_the_model_is_placed_before_it_is_scored(tmp_path, monkeypatch):
    """Parameters on the host would be whole on every device, in every batch."""
    context = RunContext(str(tmp_path), DATA, MODEL, RECIPE)
    scored = []
    monkeypatch.setattr(
        evaluator.Evaluator, "score", lambda self, params, *_: (scored.append(params), ({}, 0.0))[1]
    )
    context.baselines()
    wanted = context.model.shardings(context.seed, context.mesh)
    for params in scored:
        assert jax.tree.map(lambda x: x.sharding, params) == wanted
    assert scored


def test_a_shape_of_a_mesh_is_a_pair(tmp_path):
    with pytest.raises(ValueError, match="mesh_shape 2 is no pair"):
        tune(tmp_path, mesh_shape=2)


def test_recipes_are_checked():
    with pytest.raises(ValueError, match="no multiple of accumulate 3"):
        trainer.Recipe(steps=1, batch_size=8, accumulate=3)
    with pytest.raises(ValueError, match="steps is 0"):
        trainer.Recipe(steps=0)


def batch_of(random, rows):
    targets = random.integers(1, 300, (rows, 5)).astype(np.int32)
    targets[: rows // 2, 3:] = 0
    return {
        "encoder_input_tokens": random.integers(1, 300, (rows, 7)).astype(np.int32),
        "decoder_input_tokens": np.roll(targets, 1, 1),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }


def test_accumulated_gradients_are_those_of_the_whole_batch():
    network = t5.Transformer(replace(MODEL, dropout_rate=0.0))
    tokens = jnp.ones((1, 1), jnp.int32)
    params = network.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)["params"]
    method = Full(optax.sgd(1.0))
    state = TrainState({}, params, method.init(params, params))
    batch = batch_of(np.random.default_rng(0), 8)
    made = [
        jax.jit(make_step(t5.T5(network.config), method, accumulate=n))(state, batch, jax.random.key(1))
        for n in (1, 4)
    ]
    (one, facts), (four, same) = made
    for name, x in facts.items():
        np.testing.assert_allclose(x, same[name], rtol=1e-4, err_msg=name)
    assert facts["tokens"] == np.count_nonzero(batch["decoder_target_tokens"])
    for x, y in zip(jax.tree.leaves(one.tuned), jax.tree.leaves(four.tuned), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_a_selection_a_step_however_many_parts(whole):
    _, slots = restored(whole[0] / "dst" / "rng_0")
    assert int(optax.tree.get(slots, "step")) == RECIPE.steps


def test_dst_adds_the_seed_and_eight_bytes_a_silo():
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes())
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    adam = optax.adam(1e-2).init(params)
    leaves = len(jax.tree.leaves(params))
    extra = size(dst().init(params, params)) - size(adam) - size(params)
    assert extra <= 8 * leaves + 64


EIGHT = """
import json, sys
sys.path[:0] = {tests!r}
import jax, test_trainer
assert jax.device_count() == 8
for shape in ((8, 1), (2, 4)):
    run = {run!r} + f"/{{shape[0]}}x{{shape[1]}}"
    test_trainer.tune(run, methods=test_trainer.SGD, recipe=test_trainer.SMOOTH, model=test_trainer.WIDE,
                      mesh_shape=shape)
run = test_trainer.trainer.Run(test_trainer.RunContext(
    run, test_trainer.DATA, test_trainer.WIDE, test_trainer.SMOOTH, mesh_shape=shape),
    "dst", test_trainer.SGD["dst"], 0)
state = run.start()
print(json.dumps({{
    name: [list(x.sharding.spec), len({{str(s.index) for s in x.addressable_shards}})]
    for part in (state.tuned, state.slots)
    for name, x in test_trainer.storage.named_leaves(part).items()
}}))
"""
WIDE = replace(MODEL, num_heads=4)
SMOOTH = replace(RECIPE, dropout=0.0, accumulate=1, log_every=1, eval_every=6)
SGD = {"dst": DST(optax.sgd(0.3, momentum=0.9), 0.05)}  # Adam makes much of rounding where gradients vanish


@pytest.mark.slow
def test_model_parallel_training_is_data_parallel_training(tmp_path):
    code = EIGHT.format(tests=TESTS, run=str(tmp_path))
    (places,) = processes.finish(processes.start("-c", 8, code))
    losses = []
    for shape in ("8x1", "2x4"):
        lines = (tmp_path / shape / "dst/rng_0/metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.95 * losses[0][0]

    kernels = [x for name, x in places.items() if name.endswith("encoder/layers_0/mlp/wi_0/kernel")]
    assert kernels == [[[None, "model"], 4]] * 3  # parameter, momentum, seed
    scalars = [x for n, x in places.items() if n.rpartition("/")[2] in ("captured", "threshold", "step")]
    assert scalars
    assert {x[1] for x in scalars} == {1}


def test_a_seed_that_training_starts_from_is_placed_once(whole):
    seed, start = RunContext(str(whole[0]), DATA, MODEL, RECIPE).place_seed_and_start()
    assert seed is start


def test_splits_that_were_not_looked_at_to_the_end_are_told_even_if_nothing_is_cut(whole):
    evaluator = RunContext(str(whole[0]), DATA, MODEL, RECIPE).evaluator
    every = evaluator.cuts(most=10**6)
    first = [line for line in evaluator.cuts(most=2) if "of the first 2 examples" in line]
    assert not [line for line in every if "of the first" in line]
    assert [line.partition(":")[0] for line in first] == ["rte train"] * 2 + ["rte validation"] * 2
    assert first[1].startswith("rte train: 0 of the first 2 examples have targets longer than 16 tokens")


def test_training_goes_on_from_a_subset(whole, tmp_path):
    """A second stage stays within the budget of the first seed, and starts where the first one ended."""
    first = whole[0] / "dst" / "rng_0" / "tuned" / "subset"
    seed = tmp_path / "seed"
    context = RunContext(str(whole[0]), DATA, MODEL, RECIPE)
    t5.save_hf(context.seed, MODEL, seed)
    rows = tune(tmp_path / "run", checkpoint=str(seed), subset_dir=str(first))
    assert rows[1]["metrics"] == whole[1][-1]["metrics"]  # of the model before tuning
    second = RunContext(
        str(tmp_path / "run"), DATA, MODEL, RECIPE, checkpoint=str(seed), subset_dir=str(first)
    )
    assert json.loads((tmp_path / "run/run.json").read_text())["start_fingerprint"] == storage.fingerprint(
        second.start
    )
    state = trainer.Run(second, "dst", dst(), 0).start()
    mask = jax.tree.leaves(dst_optax.subset_mask(state.tuned, state.slots))
    assert sum(int(x.sum()) for x in mask) == subset.Subset.load(first).count > 0
    tuned = subset.Subset.load(tmp_path / "run/dst/rng_0/tuned/subset")
    assert 0 < tuned.count == rows[-1]["free_params"] <= 0.06 * context.size
    result = tuned.apply(context.seed)  # its fingerprints are the first seed's
    t5.save_hf(result, MODEL, tmp_path / "merged")
    merged, exported = (models.open_model(tmp_path / name) for name in ("merged", "seed"))
    exported = subset.Subset.load(tmp_path / "run/dst/rng_0/tuned/subset_hf").apply(exported)
    assert all((exported[name] == x).all() for name, x in merged.items())


def test_runs_of_every_seed_stop_early_and_cut_examples_are_counted(tmp_path, capsys):
    sizes = {
        split: [len(e["inputs"].encode()) + 1 for e in tasks.examples("rte", split, DATA.source)]
        for split in ("train", "validation")
    }
    short = min(max(known) for known in sizes.values()) - 1
    recipe = replace(
        RECIPE,
        steps=9,
        lengths={"inputs": short, "targets": 16},
        accumulate=1,
        eval_every=1,
        log_every=9,
        patience=2,
    )
    still = {"full": Full(optax.sgd(0.0, momentum=0.9))}  # no score is ever better than the first
    rows = tune(tmp_path / "run", methods=still, recipe=recipe, rng_seeds=(0, 1))
    assert [(r["rng_seed"], r["best_step"]) for r in rows if r["method"] == "full"] == [(0, 1), (1, 1)]
    for run in (tmp_path / "run/full").iterdir():
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines if "eval/score" in line] == [1, 2, 3]

    printed = " ".join(capsys.readouterr().out.split())
    for split, known in sizes.items():
        cut = sum(n > short for n in known)
        assert (
            f"rte {split}: {cut} examples have inputs longer than {short} tokens and are cut; "
            f"the longest has {max(known)}."
        ) in printed


def test_a_referenced_seed_that_has_changed_is_refused_with_both_named(whole, tmp_path):
    known = RunContext(str(whole[0]), DATA, MODEL, RECIPE).seed
    seed, run = tmp_path / "seed", tmp_path / "run"
    t5.save_hf(known, MODEL, seed)
    tune(run, checkpoint=str(seed), reference_seed=True)
    assert not (run / "seed").exists()
    assert contents_of_subset(run) == contents_of_subset(whole[0])

    other = jax.tree.map(lambda x: x + 1, known)
    t5.save_hf(other, MODEL, seed)
    before, after = storage.fingerprint(known), storage.fingerprint(other)
    with pytest.raises(ValueError, match=f"seed_fingerprint differ.*'{before}' and this run '{after}'"):
        tune(run, checkpoint=str(seed), reference_seed=True)

    forget(run, "seed_fingerprint")
    (run / "dst/rng_0/result.json").unlink()
    with pytest.raises(ValueError, match=f"made from the seed model {before}, .* is {after}"):
        tune(run, checkpoint=str(seed), reference_seed=True)


@needs_data
def test_a_few_steps_of_the_real_cb(tmp_path):
    vocabulary = seqio.SentencePieceVocabulary(str(REAL_DATA / "t5_vocab" / "spiece.model"))
    data = SuperGlue(JsonlSource(str(REAL_DATA / "superglue")), vocabulary, ("cb",))
    recipe = replace(RECIPE, steps=2, lengths={"inputs": 64, "targets": 8}, eval_every=2)
    rows = tune(tmp_path / "run", data=data, recipe=recipe, model=replace(MODEL, vocab_size=32128))
    assert rows[0]["score"] == pytest.approx(36.1, abs=0.1)  # always contradiction: 50% right, F1 22.2
    lines = (tmp_path / "run/dst/rng_0/predictions/CB.jsonl").read_text().splitlines()
    assert [json.loads(x)["idx"] for x in lines] == list(range(250))
    assert {json.loads(x)["label"] for x in lines} <= {"entailment", "contradiction", "neutral"}
