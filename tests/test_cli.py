"""The command line: typer's and T5X's flags, errors as one line and a status."""

import errno
import os

import pytest

pytest.importorskip("typer")

import dst_optax._version
from dst_optax import cli

SYNTHETIC = "--gin_file=superglue/synthetic.gin"


def test_usage(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("finetune", "experiment", "plan", "report", "subset"))
    assert cli.main([]) == 2
    assert cli.main(["finetune", "--help"]) == 0
    assert "--gin_file" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dst-optax {dst_optax._version.__version__}\n"


@pytest.fixture
def called(monkeypatch):
    """What reaches the trainer, which goes no further."""
    pytest.importorskip("gin")
    trainer = pytest.importorskip("dst_optax.finetuning.trainer", reason="needs the extra finetuning")
    calls = []

    def stop(run_dir, data, model, recipe, **settings):
        calls.append({"run_dir": run_dir, "data": data, "model": model, "recipe": recipe, **settings})
        raise trainer.Interrupted("stopped")

    monkeypatch.setattr(trainer, "RunContext", stop)
    return calls


def test_files_and_settings_in_any_order(called, tmp_path):
    (tmp_path / "mine.gin").write_text("STEPS = 7\nRUN_DIR = 'a'\n")
    flags = ["--gin.BATCH_SIZE=4", SYNTHETIC, "--gin_bindings=RUN_DIR='b'", "--gin_file=mine.gin"]
    assert cli.main(["finetune", *flags, f"--gin_search_paths=/absent,{tmp_path}"]) == 130
    (call,) = called
    assert (call["run_dir"], call["recipe"].steps, call["recipe"].batch_size) == ("b", 7, 4)
    assert "STEPS = 7" in call["config"]
    assert "RUN_DIR" not in call["config"]


def test_one_task_may_be_a_name(called):
    assert cli.main(["finetune", SYNTHETIC, "--gin.RUN_DIR='b'", "--gin.TASKS='cb'"]) == 130
    assert called[0]["data"].names == ("cb",)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gin.FRACTON=0.1"], "nothing reads FRACTON; did you mean FRACTION?"),
        (["--gin.LEARNINGRATE=0.1"], "did you mean LEARNING_RATE?"),
        (["--gin.train/FRACTION=0.1"], "nothing has the scope of train/FRACTION"),
        (["--gin_file=quickstart.gin", "--gin.tent/dst.DST.ties='fill'"], "did you mean tenth?"),
        (["--gin_file=quickstart.gin", "--gin.LEARNING_RATE=0.1"], "nothing reads LEARNING_RATE here"),
        (["--gin_file=full.gin", "--free_params=1024"], "nothing reads NUM_FREE_PARAMS here"),
        (["--gin_file=lora.gin", "--gin.dst.DST.ties='fill'"], "nothing reads dst.DST.ties here"),
        (["--gin.RUN_DIR=/tmp/x"], "Strings need quotes"),
        (["--gin.TASKS=[rte]"], "Strings need quotes"),
        (["--gin.FRACTION='0.1'"], "FRACTION is '0.1' here and 0.01 in the gin files; leave out the quotes"),
        (["--gin.TIES=1"], "put it in quotes"),
        (["--gin.trainer.Recipe.steps='5'"], "steps is '5'; it must be an integer"),
        (["--gin.dst.DTS.ties='fill'"], "dst.DTS"),
        (["--gin_file=absent.gin"], "absent.gin"),
        (["--gin.ACCUMULATE=3"], "no multiple of accumulate 3"),
        (["--gin.A"], "unknown argument '--gin.A'"),
        (["x.gin"], "unknown argument 'x.gin'"),
        (["--gin_fil=x"], "unknown argument '--gin_fil=x'"),
    ],
)
def test_settings_that_would_be_ignored_or_misread(called, capsys, flags, words):
    assert cli.main(["finetune", SYNTHETIC, "--gin.RUN_DIR='x'", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not called


def test_a_setting_without_a_value(called, capsys):
    assert cli.main(["finetune", SYNTHETIC]) == 2
    assert "RUN_DIR has no value" in capsys.readouterr().err


def test_a_misspelt_setting_in_a_file(called, capsys, tmp_path):
    (tmp_path / "mine.gin").write_text("include 'superglue/synthetic.gin'\nLEARNINGRATE = 0.1\n")
    assert cli.main(["finetune", f"--gin_file={tmp_path}/mine.gin", "--gin.RUN_DIR='x'"]) == 2
    assert "nothing reads LEARNINGRATE; did you mean LEARNING_RATE?" in capsys.readouterr().err


def test_banners_are_dropped_and_nothing_else(capfd):
    with pytest.raises(KeyError), cli._without_banners():  # noqa: PT012
        os.write(
            2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
        )
        os.write(2, b"I0000 00:00:1795646731.437189    7000 port.cc:153] oneDNN custom operations are on.\n")
        os.write(2, b"E0000 00:00:1795646731.437189    7000 x.cc:1] something is wrong\n")
        raise KeyError
    assert capfd.readouterr().err == "E0000 00:00:1795646731.437189    7000 x.cc:1] something is wrong\n"


def test_a_full_disk_and_files_that_cannot_be_used(monkeypatch, capsys):
    def fail(number):
        def write(*_, **__):
            raise OSError(number, "full", "run/metrics.jsonl")

        monkeypatch.setattr(cli, "app", write)

    fail(errno.ENOSPC)
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "dst-optax: run/metrics.jsonl: the disk is full; what was finished"
    )
    fail(errno.EACCES)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == "dst-optax: [Errno 13] full: 'run/metrics.jsonl'\n"
    fail(errno.EIO)
    with pytest.raises(OSError, match="full"):
        cli.main([])


def test_experiments_are_named_and_checked(capsys):
    assert cli.main(["experiment", "absent", "--gin_file=x"]) == 2
    assert "subset_convergence" in capsys.readouterr().err
    pytest.importorskip("dst_optax.finetuning.trainer", reason="needs the extra finetuning")
    flags = ["--gin_file=experiments/score_vs_budget.gin", "--gin.RUN_DIR='x'", "--gin.TUNING_SEED=2"]
    assert cli.main(["experiment", "score_vs_budget", *flags]) == 2
    assert "did you mean TUNING_SEEDS?" in capsys.readouterr().err


def test_no_gin_file(capsys):
    assert cli.main(["finetune", "--gin.A=1"]) == 2
    assert "--gin_file" in capsys.readouterr().err


@pytest.fixture
def gin_files():
    gin = pytest.importorskip("gin")
    pytest.importorskip("seqio")
    from dst_optax.finetuning import gin_files

    gin.clear_config()
    gin_files.add_search_paths()
    yield gin_files
    gin.clear_config()


def test_every_config_parses_and_tells_what_it_is(gin_files):
    import gin

    names = [p for p in gin_files.CONFIGS.rglob("*.gin") if p.parent.name != "t5x"]
    assert len(names) > 15
    for path in names:
        assert path.read_text().startswith("# ")
        gin.clear_config()
        gin.parse_config_file(str(path))


RUNS = [
    ("finetune", "quickstart_seed.gin"),
    ("finetune", "quickstart.gin"),
    ("finetune", "superglue/synthetic.gin"),
    ("finetune", "superglue/synthetic.gin", "lora.gin"),
    ("finetune", "superglue/synthetic.gin", "prompt.gin"),
    ("finetune", "superglue/synthetic.gin", "fixed_subset.gin"),
    ("finetune", "superglue/synthetic.gin", "random_subset.gin"),
    ("finetune", "superglue/scratch.gin"),
    ("finetune", "superglue/tfds.gin"),
    ("finetune", "superglue/jsonl.gin"),
    ("finetune", "superglue/jsonl.gin", "superglue/bytes.gin"),
    ("finetune", "superglue/jsonl.gin", "models/smollm2_135m.gin"),
    ("finetune", "tasks/jsonl.gin", "models/smollm2_135m.gin"),
    ("finetune", "tasks/jsonl.gin", "models/sentencepiece.gin"),
    ("finetune", "tasks/gsm8k.gin", "models/smollm2_135m.gin"),
    ("finetune", "tasks/gsm8k.gin", "models/sentencepiece.gin"),
    ("score_vs_budget", "experiments/score_vs_budget.gin"),
    ("score_vs_budget", "experiments/score_vs_budget_cb.gin"),
    ("score_vs_budget", "experiments/score_vs_budget_smollm2.gin"),
    ("score_vs_budget", "experiments/score_vs_budget_smollm2.gin", "experiments/recipe_smollm2.gin"),
    ("score_vs_budget", "experiments/score_vs_budget_smollm2.gin", "experiments/score_vs_budget_jsonl.gin"),
    ("regularisation", "experiments/regularisation.gin"),
    ("regularisation", "experiments/regularisation_smollm2.gin"),
    ("serving_latency", "experiments/serving_latency.gin"),
    ("subset_convergence", "experiments/subset_convergence.gin"),
]
GIVEN = {"RUN_DIR": "'x'", "MODEL": "'t5_small'", "VOCAB": "'v'", "DATA_DIR": "'d'", "TASKS": "['cb']"}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run))
def test_every_config_has_a_value_for_all_that_it_reads(run, gin_files):
    """Of the settings that a user gives, none is refused; what is not given has a value."""
    import importlib

    name, *files = run
    module = "trainer" if name == "finetune" else f"experiments.{name}"
    function = getattr(importlib.import_module(f"dst_optax.finetuning.{module}"), name)
    gin_files.configure(files, [f"{k}={v}" for k, v in GIVEN.items()])
    gin_files.check(["RUN_DIR='x'"], function)


def test_a_directory_on_the_path_is_not_taken_for_a_package(gin_files, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()  # what superglue/synthetic.gin includes is models/tiny.gin
    monkeypatch.syspath_prepend(tmp_path)
    gin_files.configure(["superglue/synthetic.gin"], ["WARMUP=0"])


def test_without_warmup_the_rate_is_constant(gin_files):
    import gin

    from dst_optax.finetuning import optimizers

    gin_files.configure(["superglue/synthetic.gin"], ["WARMUP=0", "LEARNING_RATE=0.5"])
    rate = gin.get_configurable(optimizers.warmup_constant)()
    assert [float(rate(step)) for step in (0, 1, 100)] == [0.5] * 3


def test_a_resumed_command_may_ask_for_more_runs(gin_files):
    config = (
        "A = 1\nBUDGETS = \\\n    [1,\n     2]\nB.run_dir = %RUN_DIR\nRUN_DIR = 'x'\nRNG_SEEDS = [0]\nC = 2"
    )
    assert gin_files.identity(config) == "A = 1\nC = 2\n"
