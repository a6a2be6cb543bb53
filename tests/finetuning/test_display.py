"""What a run says while it runs."""

import json

import pytest

for needed in ("clu", "rich", "tensorboard"):
    pytest.importorskip(needed)

from dst_optax.finetuning import display  # noqa: E402

VALUES = {"loss": 1.0, "free_params": 5.0}


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_speed_and_eta_do_not_count_compiling(tmp_path, capsys, monkeypatch):
    clock = iter((100.0, 110.0, 130.0))  # after the first, second and third line
    with display.Log(tmp_path, "dst", 0, 9) as log:
        monkeypatch.setattr(display.time, "perf_counter", lambda: next(clock))
        for step in (1, 3, 7):
            log.count(40)
            log.training(step, VALUES)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "eta" not in first
    assert "tokens/s" not in first
    assert "eta 30s" in second
    assert "eta 10s" in third
    assert [line.get("tokens_per_second") for line in lines(tmp_path)] == [None, 4.0, 2.0]


def test_lines_are_not_wrapped_where_there_is_no_terminal(tmp_path, capsys):
    with display.Log(tmp_path, "a name of a method " * 10, 0, 9) as log:
        log.training(1, VALUES)
    assert len(capsys.readouterr().out.splitlines()) == 1
    row = {"method": "m" * 100, "score": 1, "free_params": 1, "seconds": 1}
    display.make_console().print(display.results_table([row], 9))
    assert "m" * 100 in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with display.Log(tmp_path, "dst", 0, 9) as log, pytest.raises(ValueError, match="loss is nan at step 3"):
        log.training(3, {**VALUES, "loss": float("nan")})
    assert lines(tmp_path) == []


def test_lines_of_steps_that_are_repeated_go(tmp_path):
    text = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"st'
    (tmp_path / "metrics.jsonl").write_text(text)
    with display.Log(tmp_path, "dst", 2, 9):
        pass
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
