"""A sweep of T5X runs as one table."""

import json

import numpy as np
import pytest

for needed in ("flax", "tensorflow", "matplotlib"):
    pytest.importorskip(needed)

from t5x_integration import collect, export  # noqa: E402

SIZE = 70_000
RATE = "utils.create_learning_rate_scheduler.base_learning_rate"


def tensors(run):
    model = {"target/a/kernel": np.zeros((SIZE // 2, 2)), "state/step": np.int32(9)}
    free = {"0.01": 699, "1.0": SIZE}.get(run.parts[-2])
    if free is None:
        return model
    state = {"captured": np.array(True), "memory/diagnostics/num_free": np.float32(free)}
    return model | {f"state/dst/{name}": x for name, x in state.items()}


def add_run(sweep, task, fraction, seed, *evaluations):
    run = sweep / task / fraction / str(seed)
    (run / "inference_eval").mkdir(parents=True)
    (run / "config.gin").write_text(f"# of a sweep\n{RATE} = 0.001\n")
    lines = [json.dumps({"step": i, **metrics}) for i, metrics in enumerate(evaluations)]
    if lines:
        (run / "inference_eval" / f"superglue_{task}-metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def test_a_sweep_is_gathered(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "tensors", tensors)
    sweep = tmp_path / "sweep"
    best, worse = {"accuracy": 80.0, "f1": 70.0}, {"accuracy": 90.0, "f1": 10.0}
    add_run(sweep, "cb", "full", 0, worse, best)
    run = add_run(sweep, "cb", "0.01", 0, worse, best)
    with (run / "inference_eval" / "superglue_cb-metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "accu')  # T5X is writing
    add_run(sweep, "cb", "0.01", 1, best, worse)  # the last one is exported, not the best
    add_run(sweep, "rte", "1.0", 0, {"accuracy": 55.0})
    add_run(sweep, "rte", "0.01", 0)
    collect.main(str(sweep), str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "rte/0.01/0 is not evaluated yet." in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    shown = [(r["task"], r["method"], r["budget"], r["rng_seed"], r["free_params"], r["score"]) for r in rows]
    assert shown == [
        ("cb", "dst", 700, 0, 699, 75.0),
        ("cb", "dst", 700, 1, 699, 50.0),
        ("cb", "full", None, 0, SIZE, 75.0),
        ("rte", "dst", SIZE, 0, SIZE, 55.0),
    ]
    assert {r["learning_rate"] for r in rows} == {0.001}
    table = (tmp_path / "out" / "results.md").read_text()
    assert table in said
    assert "| dst | 700 | 699 | 0.001 | 62.5 ± 17.7 |" in table
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "score_vs_budget_cb.png",
        "score_vs_budget_rte.png",
    }


def test_a_rate_that_is_no_number_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "tensors", tensors)
    run = add_run(tmp_path / "sweep", "cb", "0.01", 0, {"accuracy": 55.0})
    (run / "config.gin").write_text(f"{RATE} = %LR\n")
    with pytest.raises(ValueError, match=r"cb/0\.01/0/config\.gin: base_learning_rate is %LR"):
        collect.collect(tmp_path / "sweep", tmp_path / "out")


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no evaluated run <task>/<fraction>/<seed>"):
        collect.collect(tmp_path, tmp_path / "out")


def test_figures_are_not_written_into_a_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="gs://bucket/out lies in an object store"):
        collect.main(str(tmp_path), "gs://bucket/out")
    assert not list(tmp_path.iterdir())


def test_a_run_without_its_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "tensors", tensors)
    (add_run(tmp_path, "cb", "0.01", 0, {"accuracy": 1.0}) / "config.gin").unlink()
    add_run(tmp_path, "cb", "0.001", 0, {"accuracy": 1.0})
    with pytest.raises(ValueError, match=rf"0\.01/0/config\.gin names no {RATE}"):
        collect.collect(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
