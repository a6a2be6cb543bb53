"""Experiments: sweeps that can be killed, tables and figures from fixed numbers."""

import functools
import html.parser
import json
import re
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

for needed in ("seqio", "orbax.checkpoint", "clu", "rich", "tensorboard", "matplotlib"):
    pytest.importorskip(needed)
import seqio  # noqa: E402
from few import Few  # noqa: E402

from dst_optax import cli, distances, subset  # noqa: E402
from dst_optax.finetuning import display, optimizers, trainer  # noqa: E402
from dst_optax.finetuning.experiments import (  # noqa: E402
    figures,
    regularisation,
    score_vs_budget,
    serving_latency,
    subset_convergence,
    summary,
)
from dst_optax.finetuning.methods.dst import DST  # noqa: E402
from dst_optax.finetuning.methods.full import Full  # noqa: E402
from dst_optax.finetuning.models import decoder, t5  # noqa: E402
from dst_optax.finetuning.models.base import unflatten  # noqa: E402
from dst_optax.finetuning.models.named import language_model  # noqa: E402
from dst_optax.finetuning.tasks.jsonl import Jsonl  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402

MODEL = t5.T5Config(
    vocab_size=384,
    emb_dim=8,
    num_heads=1,
    head_dim=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
    mlp_dim=8,
    dropout_rate=0.0,
)
DECODER = decoder.DecoderConfig("qwen2", 384, 8, 1, 2, 1, 8, 16, tie_embeddings=True)
RECIPE = trainer.Recipe(
    steps=2, batch_size=4, lengths={"inputs": 48, "targets": 16}, eval_every=2, eval_batch_size=36
)
DATA = SuperGlue(Few(train_size=20), seqio.ByteVocabulary(), ("rte",))


OPTIMIZER = functools.partial(optimizers.decayed, steps=2, warmup=1)


def sweep(
    directory,
    rng_seeds=(0, 1),
    tuning_seeds=1,
    learning_rates=(1e-2, 1e-1),
    optimizer=OPTIMIZER,
    dst=DST,
    data=DATA,
):
    return score_vs_budget.score_vs_budget(
        str(directory),
        data,
        MODEL,
        {"full": Full, "dst": functools.partial(dst, ties="fill")},
        {"full": [None], "dst": [100]},
        learning_rates,
        optimizer,
        RECIPE,
        rng_seeds=rng_seeds,
        tuning_seeds=tuning_seeds,
    )


SCORES = {"score": 60.0, "test_score": 55.0, "seconds": 3.0}


class Killed(BaseException):
    pass


def pretend(monkeypatch, train, scores):
    """Runs that do not train: the trainer has tests of its own."""

    def finish(self, *_):
        free = getattr(self.method, "num_free_params", 999)
        return {"method": self.name, "rng_seed": self.rng_seed, "free_params": free, **scores(self)}

    monkeypatch.setattr(score_vs_budget, "_seconds_a_run", lambda *_: 30.0)
    monkeypatch.setattr(trainer.Run, "_train", lambda *given: (train(*given), RECIPE.steps))
    monkeypatch.setattr(trainer.Run, "_finish", finish)
    for name in ("start", "_restore"):
        monkeypatch.setattr(trainer.Run, name, lambda *_: None)
    monkeypatch.setattr(trainer.storage.Checkpoints, "path", lambda *_: None)


def test_a_killed_sweep_neither_loses_nor_repeats_runs(tmp_path, monkeypatch, capsys):
    trained = []

    def train(self, *_):
        if len(trained) == 4:
            raise Killed
        trained.append((self.name, self.rng_seed))

    pretend(monkeypatch, train, lambda run: SCORES)
    with pytest.raises(Killed):
        sweep(tmp_path / "sweep")
    assert "6 runs: 1 tasks x 2 methods" in (said := capsys.readouterr().out)
    assert "0 are done, the others take about 0.5 minutes each, 3 in all" in said
    assert len((tmp_path / "sweep" / "results.jsonl").read_text().splitlines()) == 2 + 4
    before = list(trained)
    trained.clear()
    rows = sweep(tmp_path / "sweep")
    assert "4 are done, the others take about 0.5 minutes each, 1 in all" in capsys.readouterr().out
    assert len(trained) == 2
    assert not set(trained) & set(before)
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert {row["free_params"] for row in rows if row["method"] == "dst"} == {100}
    tuned = [row for row in rows if "learning_rate" in row]
    assert [(r["method"], r["rng_seed"]) for r in tuned] == [
        ("full", 0), ("full", 0), ("dst", 0), ("dst", 0), ("full", 1), ("dst", 1),
    ]  # fmt: skip
    assert tuned[0].items() >= SCORES.items()
    assert (tmp_path / "sweep" / "score_vs_budget_rte.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_with_other_rates_adds_to_what_there_is(tmp_path, monkeypatch):
    pretend(monkeypatch, lambda *_: None, lambda run: SCORES)
    before = sweep(tmp_path, (0,), learning_rates=[1e-2])
    monkeypatch.setattr(score_vs_budget, "_seconds_a_run", None)  # nothing is left to do
    assert sweep(tmp_path, (0,), learning_rates=[1e-2]) == before
    monkeypatch.undo()
    pretend(monkeypatch, lambda *_: None, lambda run: SCORES)
    after = sweep(tmp_path, (1,), learning_rates=[1e-1])
    assert [row.get("learning_rate") for row in after] == [None, None, 0.1, 0.1]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*before, *after[2:]]


def test_a_directory_of_another_sweep_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(score_vs_budget, "_seconds_a_run", None)
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "mine").touch()
    with pytest.raises(ValueError, match="rte is not empty and no run directory"):
        sweep(tmp_path)


def test_the_rate_is_that_of_the_best_mean_over_the_tuning_seeds(tmp_path, monkeypatch, capsys):
    trained = []

    def scores(run):
        high = "0.1" in run.name
        return SCORES | {
            "score": {0: 90.0 if high else 80.0, 1: 20.0 if high else 70.0, 2: 75.0}[run.rng_seed]
        }

    pretend(monkeypatch, lambda run, *_: trained.append((run.name, run.rng_seed)), scores)
    rows = sweep(tmp_path / "sweep", (0, 1, 2), tuning_seeds=2)
    assert "10 runs: 1 tasks x 2 methods with budgets" in capsys.readouterr().out
    assert len(trained) == len(set(trained)) == 10
    last = [(r["method"], r["learning_rate"]) for r in rows if r.get("rng_seed") == 2]
    assert last == [("full", 0.01), ("dst", 0.01)]
    assert {s["learning_rate"] for s in summary.summarise(rows)} == {None, 0.01}
    with pytest.raises(ValueError, match=r"tuning_seeds: got 4; it must be from 1 to 2"):
        sweep(tmp_path / "other", tuning_seeds=4)


def test_a_sweep_over_rows_of_ones_own(tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "validation", "test"):
        (rows / f"{split}.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 4)
    pretend(monkeypatch, lambda run, *_: None, lambda run: SCORES)
    found = sweep(tmp_path / "sweep", data=Jsonl(str(rows), seqio.ByteVocabulary()))
    seed_model, *runs = found
    assert seed_model["method"] == "seed model"
    assert seed_model["test_score"] == 0.0
    assert {row["task"] for row in runs} == {"jsonl"}
    assert len(runs) == 2 * (2 + 1)
    assert "| dst | 100 |" in (tmp_path / "sweep" / "results.md").read_text()
    assert (tmp_path / "sweep" / "score_vs_budget_jsonl.png").exists()


def test_another_method_under_the_name_of_a_cell_is_refused(tmp_path, monkeypatch):
    pretend(monkeypatch, lambda *_: None, lambda run: SCORES)
    rows = sweep(tmp_path, (0,))
    other = functools.partial(DST, distance=distances.squared)
    with pytest.raises(ValueError, match=r"dst 100 lr 0\.01/rng_0 was begun with another method"):
        sweep(tmp_path, (0,), dst=other)
    for file in tmp_path.glob("*/*/*/method.txt"):
        file.unlink()  # as versions before 0.2 did not write it
    assert sweep(tmp_path, (0,), dst=other) == rows


def test_a_rate_that_diverges_does_not_end_the_sweep(tmp_path, monkeypatch, capsys):
    trained = []

    def train(run, *_):
        trained.append(run.name)
        if run.name in ("full all lr 0.1", "dst 100 lr 0.01", "dst 100 lr 0.1"):
            raise display.Diverged("the loss is nan at step 7: ...")

    pretend(monkeypatch, train, lambda run: SCORES)
    rows = sweep(tmp_path)
    said = capsys.readouterr().out
    assert "full all lr 0.1 rng 0: the loss is nan at step 7" in said
    assert "rte: dst 100 diverges with all learning rates; give lower ones" in said
    diverged = [(r["method"], r["learning_rate"], r["score"]) for r in rows if r.get("diverged")]
    assert diverged == [("full", 0.1, None), ("dst", 0.01, None), ("dst", 0.1, None)]
    assert [s["learning_rate"] for s in summary.summarise(rows) if s["method"] in ("full", "dst")] == [0.01]
    table = (tmp_path / "results.md").read_text().splitlines()
    assert "| full | 0.1 | 0 |" in [line.replace("|  |", "|") for line in table]
    assert "| dst | 100 | 0.1 | 0 |" in table
    before = list(trained)
    assert sweep(tmp_path) == rows
    assert trained == before


def test_a_run_is_timed_where_all_processes_see_it(tmp_path, monkeypatch):
    """And not where a killed sweep left finished ones."""
    (tmp_path / "probe" / "2").mkdir(parents=True)
    timed = []

    def context(where, recipe):
        assert not where.exists()
        where.mkdir(parents=True)
        timed.append((where, recipe.steps))

    monkeypatch.setattr(trainer.Run, "result", lambda self: {})
    assert score_vs_budget._seconds_a_run(context, tmp_path / "probe", Full(optax.sgd(1.0)), RECIPE) >= 0
    assert timed == [(tmp_path / "probe" / str(steps), steps) for steps in (2, 12)]
    assert not list(tmp_path.iterdir())


def test_each_method_has_its_grid(tmp_path, monkeypatch):
    trained = []
    pretend(monkeypatch, lambda run, *_: trained.append(run.name), lambda run: SCORES)
    sweep(tmp_path / "sweep", (0,), learning_rates={"full": [1e-3], "dst": [0.1, 0.2]})
    assert trained == ["full all lr 0.001", "dst 100 lr 0.1", "dst 100 lr 0.2"]
    trained.clear()
    of_budgets = {"full": {None: [1e-2]}, "dst": {100: [0.3], 50: [0.4]}}
    sweep(tmp_path / "by budget", (0,), learning_rates=of_budgets)
    assert trained == ["full all lr 0.01", "dst 100 lr 0.3"]
    with pytest.raises(ValueError, match="learning_rates: nothing for dst with a budget of 100"):
        sweep(tmp_path / "other", learning_rates=of_budgets | {"dst": {50: [0.4]}})
    for one in ({"learning_rates": {"full": [1e-3]}}, {"optimizer": {"full": OPTIMIZER}}):
        with pytest.raises(ValueError, match=f"{next(iter(one))}: nothing for dst"):
            sweep(tmp_path / "other", **one)


def test_each_method_has_its_optimizer(tmp_path, monkeypatch):
    made = {}

    def factory(name):
        return lambda rate: made.setdefault((name, rate), optax.sgd(rate))

    def train(run, *_):
        assert run.method.optimizer is made[run.name.split()[0], 1e-2]

    pretend(monkeypatch, train, lambda run: SCORES)
    of_each = {name: factory(name) for name in ("full", "dst")}
    sweep(tmp_path / "sweep", (0,), learning_rates=[1e-2], optimizer=of_each)
    assert set(made) == {("full", 1e-2), ("dst", 1e-2)}


def test_seeds_of_a_rate_share_a_compiled_step(tmp_path, monkeypatch):
    monkeypatch.setattr(score_vs_budget, "_seconds_a_run", lambda *_: 30.0)
    traced = []

    class Counted(DST):
        def update(self, grads, state, tuned):
            traced.append(self)
            return super().update(grads, state, tuned)

    rows = sweep(
        tmp_path / "sweep", (0, 1), 2, learning_rates={"full": [1e-3], "dst": [0.1, 0.2]}, dst=Counted
    )
    assert len(traced) == 2  # once a rate
    assert len([row for row in rows if row["method"] == "dst"]) == 4


def row(method, budget, rate, rng_seed, score, test_score):
    return {
        "task": "rte",
        "method": method,
        "budget": budget,
        "learning_rate": rate,
        "rng_seed": rng_seed,
        "free_params": budget or 1000,
        "score": score,
        "test_score": test_score,
        "seconds": 10.0,
    }


ROWS = [
    {"task": "rte", "method": "majority", "score": 50.0, "free_params": 0, "seconds": 0.0},
    row("full", None, 0.1, 0, 80.0, 78.0),
    row("dst", 64, 0.1, 0, 60.0, 99.0),
    row("dst", 64, 1.0, 0, 70.0, 69.0),
    row("dst", 64, 1.0, 1, 72.0, 73.0),
    row("dst", 256, 1.0, 0, 75.0, 75.0),
    row("lora", 64, 0.1, 0, 60.0, 61.0),
]


def test_rates_are_chosen_on_validation_and_reported_on_test():
    found = {(s["method"], s["budget"]): s for s in summary.summarise(ROWS)}
    dst = found["dst", 64]
    assert (dst["learning_rate"], dst["mean"], dst["runs"]) == (1.0, 71.0, 2)
    assert dst["std"] == pytest.approx(8**0.5)
    assert found["majority", None]["mean"] == 50.0


def test_a_method_works_where_it_goes_half_the_way():
    found = summary.summarise(ROWS)
    assert summary.operational_ranges(found, "rte") == {"dst": (64, 256)}  # from 50 to 78: 64
    assert summary.operational_ranges(found[1:], "rte") == {}
    assert "| dst | 64 | 256 |" in summary.markdown(ROWS).splitlines()


def test_a_variant_with_a_budget_of_its_own_is_no_full_fine_tuning():
    variant = row("half free", None, 0.1, 0, 90.0, 98.0) | {"free_params": 257}
    assert summary.operational_ranges(summary.summarise([ROWS[0], variant, *ROWS[2:]]), "rte") == {}
    found = summary.operational_ranges(summary.summarise([*ROWS, variant]), "rte")
    assert found == summary.operational_ranges(summary.summarise(ROWS), "rte")
    half = row("dst", 500, 1.0, 0, 70.0, 70.0)
    assert summary.operational_ranges(summary.summarise([*ROWS, half]), "rte") == {"dst": (64, 500)}


def test_a_rate_with_which_a_run_diverged_is_not_praised():
    rows = [row("full", None, 0.1, 0, 90.0, 90.0), row("seed model", None, None, None, 10.0, 10.0)]
    rows += [row("dst", 9, 0.1, 0, 90.0, 90.0), {**row("dst", 9, 0.1, 1, None, None), "diverged": True}]
    rows += [row("lora", 9, 0.1, seed, 80.0, 80.0) for seed in (0, 1)]
    found = summary.summarise(rows)
    assert "| 90.0 (1 of 2 diverged) |" in (table := summary.markdown(rows))
    assert "| **80.0 ± 0.0** |" in table
    assert list(summary.operational_ranges(found, rows[0]["task"])) == ["lora"]


def test_rates_without_a_common_seed_are_not_compared():
    with pytest.raises(ValueError, match=r"no random seed .* 0.1 with \[0\]; 1.0 with \[1\]"):
        summary.best_rate([ROWS[2], ROWS[4]])


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1.0: [70.0], 2.0: [None]}, 1.0),
        ({1.0: [60.0, 61.0], 2.0: [99.0, None]}, 1.0),
        ({1.0: [60.0, None], 2.0: [99.0, None]}, 2.0),
        ({1.0: [60.0], 2.0: [70.0, None]}, 2.0),  # it diverged after it was chosen
        ({1.0: [60.0, None]}, 1.0),
        ({1.0: [None], 2.0: [None]}, None),
    ],
)
def test_rates_that_diverge_are_not_chosen(scores, best):
    rows = [
        row("dst", 64, rate, i, x, None) for rate, of_seed in scores.items() for i, x in enumerate(of_seed)
    ]
    assert summary.best_rate(rows) == best
    means = [x for x in scores.get(best, ()) if x is not None]
    assert [(s["mean"], s["runs"]) for s in summary.summarise(rows)] == (
        [(np.mean(means), len(means))] if means else []
    )


def test_tables_mark_the_best_of_a_budget():
    lines = summary.markdown(ROWS).splitlines()
    assert "| dst | 64 | 64 | 1 | **71.0 ± 2.8** | 10 |" in lines
    assert "| lora | 64 | 64 | 0.1 | 61.0 | 10 |" in lines
    assert "| majority |  | 0 |  | 50.0 | 0 |" in lines


def test_the_figure_has_a_line_with_a_band_a_method():
    found = summary.summarise(ROWS)
    axes, bars = figures.score_vs_budget(found, "rte", {"dst": (64, 256)}).axes
    assert (axes.get_xscale(), bars.get_xlabel(), axes.get_ylabel()) == ("log", "free parameters", "score")
    assert bars.get_shared_x_axes().joined(axes, bars)
    assert [list(line.get_xdata()) for line in bars.get_lines()] == [[64, 256]]
    assert [t.get_text() for t in bars.get_yticklabels()] == ["dst"]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["majority", "full", "dst", "lora"]
    assert list(lines["dst"].get_xdata()) == [64, 256]
    assert list(lines["dst"].get_ydata()) == [71.0, 75.0]
    assert set(lines["full"].get_ydata()) == {78.0}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == list(lines)
    assert len(axes.collections) == 2  # bands


def test_the_figure_has_a_line_for_every_method_without_a_budget():
    rows = [row(f"variant {i}", None, 0.1, 0, 60.0, 60.0 + i) for i in range(9)]
    axes, _ = figures.score_vs_budget(summary.summarise(rows), "rte", {}).axes
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [60.0 + i for i in range(9)]


@pytest.mark.parametrize(
    ("direction", "step"),
    [(None, [1.0, 1.0]), (optax.scale_by_lion(), [1.0, 1.0]), (optax.trace(0.0), [0.6, 0.8])],
)
def test_decayed_scales_any_direction(direction, step):
    grads, params = {"w": jax.numpy.array([0.6, 0.8])}, {"w": jax.numpy.array([1.0, -2.0])}
    for decay in (0.0, 0.5):
        tx = optimizers.decayed(1e-2, steps=10, warmup=1, direction=direction, weight_decay=decay)
        _, state = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(grads, state, params)
        wanted = -1e-2 * (np.array(step) + decay * np.array([1.0, -2.0]))
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (lambda: optimizers.warmup_constant(1e-3, -5), "warmup: got -5 steps"),
        (lambda: optimizers.warmup_constant(float("nan"), 5), "learning rate is nan"),
        (lambda: optimizers.warmup_constant(0.0, 5), "learning rate is 0.0"),
        (lambda: optimizers.warmup_constant(None, 5), "learning rate is None"),
        (lambda: optimizers.decayed(1e-3, steps=100, warmup=None), "warmup: got None steps"),
        (lambda: optimizers.decayed(1e-3, steps=100, warmup=-3), "warmup: got -3 steps"),
        (lambda: optimizers.decayed(1e-3, steps=30), "warmup: 50 steps, but the run has only 30"),
        (lambda: optimizers.decayed(1e-3, steps=100, delay=-1), "delay: got -1 steps"),
        (lambda: optimizers.decayed(1e-3, steps=100, delay=None), "delay: got None steps"),
        (
            lambda: optimizers.decayed(1e-3, steps=60, delay=10),
            "delay and warmup: 10 and 50 steps, but",
        ),
        (lambda: optimizers.decayed(-1e-3, steps=100), "learning rate is -0.001"),
    ],
)
def test_schedules_that_would_train_nothing_are_refused(schedule, says):
    with pytest.raises(ValueError, match=says):
        schedule()


def test_a_delay_collects_moments_before_anything_moves():
    grads = iter([{"w": jax.numpy.array([0.5, x])} for x in (0.5, -0.5, 0.5, -0.5, 0.5)])
    tx = optimizers.decayed(1e-2, steps=10, warmup=1, delay=3)
    adam = optax.scale_by_adam(b2=0.98)
    params = {"w": jax.numpy.zeros(2)}
    state, reference = tx.init(params), adam.init(params)
    for step, grad in enumerate(grads):
        updates, state = tx.update(grad, state, params)
        direction, reference = adam.update(grad, reference)
        rate = 1e-2 if step == 4 else 0.0  # 3 steps of delay, one of warm-up, which begins at 0
        np.testing.assert_allclose(updates["w"], -rate * direction["w"], rtol=1e-5)


def test_a_grid_of_learning_rates_is_one_program():
    grads = {"w": jax.numpy.ones(3)}

    def lowered(rate):
        tx = optimizers.decayed(rate, steps=10, warmup=1)
        return jax.jit(tx.update).lower(grads, tx.init(grads)).as_text()

    assert lowered(1e-3) == lowered(1e-1)
    tx = optimizers.decayed(1e-2, steps=10, warmup=1)
    _, state = tx.update(grads, tx.init(grads))
    updates, _ = tx.update(grads, state)
    assert float(optax.tree.norm(updates)) == pytest.approx(3**0.5 * 1e-2, rel=1e-3)


def snapshot(directory, step, moved):
    """A subset of two modules of 4 entries each; ``moved`` are positions in both."""
    seed = {
        f"encoder/layers_{i}/attention/{name}/kernel": np.zeros((2, 2), np.float32)
        for i, name in enumerate(("query", "key"))
    }
    tuned = {path: x.copy() for path, x in seed.items()}
    for x, positions in zip(tuned.values(), moved, strict=True):
        x.ravel()[positions] = 1.0
    subset.from_models(seed, tuned).save(directory / "snapshots" / f"{step:08d}" / "subset")


def test_convergence_of_known_subsets(tmp_path):
    snapshot(tmp_path / "rng_0", 5, ([0, 1], []))
    snapshot(tmp_path / "rng_0", 10, ([1, 2], [3]))
    snapshot(tmp_path / "rng_1", 5, ([0, 1], []))
    snapshot(tmp_path / "rng_1", 10, ([0], [3]))
    (tmp_path / "rng_0" / "snapshots" / ".tmp-00000015").mkdir()  # a run was killed there
    for rng in (0, 1):
        line = {"step": 1, "churn": 0.5, "threshold_median": 0.1}
        (tmp_path / f"rng_{rng}" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = subset_convergence.subset_convergence(str(tmp_path))
    first = found["rng"]["rng_0"]
    assert first["overlap_final"] == {5: 1 / 4, 10: 1.0}
    assert first["overlap_previous"] == {10: 1 / 4}
    assert first["logged"] == {"churn": [(1, 0.5)], "threshold_median": [(1, 0.1)]}
    assert found["overlap_seeds"] == {5: 1.0, 10: 1 / 4}
    assert found["places"][10] == {
        "attention/query": {"encoder 0": 0.5},
        "attention/key": {"encoder 1": 0.25},
    }
    share = {"encoder/attention/query/kernel": 2 / 3, "encoder/attention/key/kernel": 1 / 3}
    assert found["share"] == pytest.approx(share)
    written = json.loads((tmp_path / "subset_convergence.json").read_text())
    assert written["overlap_seeds"] == {"5": 1.0, "10": 0.25}

    panels = figures.convergence(found).axes
    assert [a.get_title() for a in panels] == [
        "churn of a step", "thresholds: median, least and most", "snapshots of a run", "random seeds",
    ]  # fmt: skip
    lines = {line.get_label(): list(line.get_ydata()) for line in panels[2].get_lines()}
    assert lines["rng_0, with the last"] == [1 / 4, 1.0]
    *maps, bar = figures.places(found["places"]).axes
    assert [a.get_title() for a in maps] == ["step 5", "step 10"]
    np.testing.assert_array_equal(maps[1].images[0].get_array().filled(-1), [[0.5, -1], [-1, 0.25]])
    assert bar.get_ylabel() == "share of free entries"


def test_places_of_a_decoder():
    seed = {
        "embed_tokens/embedding": np.zeros(4, np.float32),
        "layers_0/self_attn/q_proj/kernel": np.zeros(4, np.float32),
        "layers_10/self_attn/q_proj/kernel": np.zeros(4, np.float32),
        "layers_10/input_layernorm/scale": np.zeros(2, np.float32),
    }
    tuned = {path: x.copy() for path, x in seed.items()}
    for path, free in zip(tuned, (1, 2, 3, 2), strict=True):
        tuned[path][:free] = 1.0
    taken = subset.from_models(seed, tuned)
    assert subset_convergence.places(taken) == {
        "self_attn/q_proj": {"layer 0": 0.5, "layer 10": 0.75},
        "input_layernorm": {"layer 10": 1.0},
    }
    assert subset_convergence.share_by_kind(taken) == {
        "embed_tokens/embedding": 0.125, "self_attn/q_proj/kernel": 0.625, "input_layernorm/scale": 0.25,
    }  # fmt: skip


def test_places_in_stacked_layers_are_those_in_each_layer():
    flat = t5.parameters.shapes(t5.CONFIGS["tiny"])
    random = np.random.default_rng(0)
    seed = {path: np.zeros(shape, np.float32) for path, shape in flat.items()}
    tuned = {path: (random.random(shape) < 0.3).astype(np.float32) for path, shape in flat.items()}
    one = subset.from_models(seed, tuned)
    stacked = subset.from_models(*(t5.stack_layers(unflatten(params)) for params in (seed, tuned)))
    assert len(stacked) < len(one)
    assert subset_convergence.places(stacked) == subset_convergence.places(one)
    assert subset_convergence.share_by_kind(stacked) == subset_convergence.share_by_kind(one)
    assert len(subset_convergence.places(stacked)) > 5


def test_convergence_needs_snapshots(tmp_path):
    with pytest.raises(ValueError, match="snapshot_every"):
        subset_convergence.subset_convergence(str(tmp_path))


@pytest.mark.parametrize("model", [MODEL, DECODER], ids=["t5", "decoder"])
def test_latency_of_a_tiny_model(tmp_path, model):
    rows = serving_latency.serving_latency(
        str(tmp_path), {"tiny": model}, (0.1,), requests=2, input_length=4, target_length=2
    )
    assert [(r["way"], r["fraction"]) for r in rows] == [
        ("none", None), ("full", 1.0), ("subset", 0.1), ("lora", 0.1),
    ]  # fmt: skip
    size = sum(x.size for x in jax.tree.leaves(language_model(model).init(jax.random.key(0))))
    assert rows[1]["entries"] == size
    assert 0.9 * 0.1 * size < rows[2]["entries"] < 1.02 * 0.1 * size
    assert 0.9 * 0.1 * size < rows[3]["entries"] <= 0.1 * size
    for row in rows:
        times = row["request"]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
    assert set(rows[2]) >= {"load", "switch"}
    table = (tmp_path / "serving_latency.md").read_text().splitlines()
    assert len(table) == 2 + len(rows)
    rows[2] |= {"request": {"p50": 1.0, "p95": 2.0, "p99": 3.0}}
    (tmp_path / "serving_latency.json").write_text(json.dumps([*rows[:1], *rows[2:]]))
    again = serving_latency.serving_latency(
        str(tmp_path), {"tiny": model}, (0.1,), requests=2, input_length=4, target_length=2
    )
    assert [*again[:1], *again[2:]] == [*rows[:1], *rows[2:]]  # what was measured is not measured again
    with pytest.raises(ValueError, match=r"'requests': 2.*another run_dir"):
        serving_latency.serving_latency(str(tmp_path), {"tiny": model}, (0.1,), requests=3)
    assert json.loads((tmp_path / "serving_latency.json").read_text()) == again
    (axes,) = figures.latency(rows).axes
    assert [line.get_label() for line in axes.get_lines()] == ["subset", "lora", "full", "none"]
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "tiny")


GAPS = [
    {"method": m, "examples": n, "rng_seed": s, "free_params": f, "train": t, "score": x, "gap": t - x}
    for m, n, s, f, t, x in (
        ("full", 32, 0, 1000, 100.0, 60.0),
        ("full", 32, 1, 1000, 100.0, 64.0),
        ("dst", 32, 0, 10, 80.0, 70.0),
        ("dst", 100, 0, 10, 90.0, 85.0),
    )
]


def test_regularisation_table_and_figure():
    lines = regularisation.markdown(GAPS).splitlines()
    assert lines[2] == "| 32 | full | 1,000 | 100.0 | 62.0 ± 2.8 | 38.0 |"
    gap, score = figures.regularisation(GAPS).axes
    assert {line.get_label(): list(line.get_ydata()) for line in gap.get_lines()} == {
        "32 examples": [10.0, 38.0],
        "100 examples": [5.0],
    }
    assert (gap.get_xscale(), gap.get_ylabel(), score.get_ylabel()) == ("log", "gap", "score on others")


def test_few_examples_of_given_tasks():
    few = regularisation.few(12, DATA, label_noise=0.5)
    assert few.names == DATA.names
    rows, clean = few.source.rows("rte", "train"), regularisation.few(12, DATA).source.rows("rte", "train")
    assert sum(a["label"] != b["label"] for a, b in zip(rows, clean, strict=True)) == 6


def test_regularisation_chooses_no_checkpoint(tmp_path, monkeypatch):
    asked = []

    def run(self, name, method, rng_seed):
        recipe = self.context.recipe
        asked.append((len(self.context.data.source.rows("rte", "train")), self.name, self.rng_seed))
        assert (recipe.eval_every, recipe.patience, recipe.score_train) == (2, None, True)
        return {"free_params": 5, "score": 1.0, "test_score": 40.0, "train_score": 90.0}

    monkeypatch.setattr(trainer.Run, "result", lambda self: run(self, None, None, None))
    data = functools.partial(regularisation.synthetic, vocabulary=DATA.vocabulary, names=("rte",))
    recipe = replace(RECIPE, eval_every=1)
    rows = regularisation.regularisation(
        str(tmp_path), data, MODEL, {"full": Full(optax.sgd(1.0))}, recipe, sizes=(8, 16), rng_seeds=(0, 1)
    )
    assert asked == [(8, "full", 0), (8, "full", 1), (16, "full", 0), (16, "full", 1)]
    assert {row["gap"] for row in rows} == {50.0}
    assert json.loads((tmp_path / "regularisation.json").read_text()) == rows


@pytest.mark.parametrize(
    ("tasks", "patience", "says"),
    [(("rte",), 3, "recipe: patience is 3"), (("rte", "wsc"), None, "the true candidates of WSC only")],
)
def test_what_regularisation_cannot_compare_is_refused(tmp_path, tasks, patience, says):
    data = functools.partial(regularisation.synthetic, vocabulary=DATA.vocabulary, names=tasks)
    with pytest.raises(ValueError, match=says):
        regularisation.regularisation(str(tmp_path), data, MODEL, {}, replace(RECIPE, patience=patience))
    assert not list(tmp_path.iterdir())


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and gathers links."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.seen = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_reports_are_whole_and_need_no_network(tmp_path, capsys):
    run = tmp_path / "a <run>"
    run.mkdir()
    (run / "results.md").write_text(summary.markdown(ROWS))
    (run / "results.json").write_text(json.dumps([row("<b>", 5, 0.1, 0, 60.0, None)]))
    (run / "run.json").write_text(json.dumps({"config": "A = '<script>'", "tasks": ["rte"]}))
    figures.save(figures.score_vs_budget(summary.summarise(ROWS), "rte", {}), run / "score.png")
    out = tmp_path / "report.html"
    assert cli.main(["report", str(run), f"--out={out}"]) == 0
    text = out.read_text()
    page = Page(text)
    assert not page.open
    assert page.seen.count("table") == 3
    assert page.seen.count("img") == len(page.links) == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert "<b>71.0 ± 2.8</b>" in text
    assert "a &lt;run&gt;" in text
    assert cli.main(["report", str(tmp_path / "absent")]) == 2
    assert "neither tables nor figures" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
