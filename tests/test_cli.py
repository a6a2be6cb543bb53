"""The command line: flags as T5X's, errors as one line and a status."""

import pytest

from dst_optax import cli


def test_flags_in_any_order():
    got = cli.gin_flags(
        [
            "--gin.A=1",
            "--gin_file=x.gin",
            "--gin_bindings=b.C='='",
            "--gin_search_paths=p,q",
            "--gin_file=y.gin",
        ]
    )
    assert got == (["x.gin", "y.gin"], ["A=1", "b.C='='"], ["p", "q"])


def test_a_budget_is_a_binding():
    got = cli.gin_flags(["--gin_file=x.gin", "--free_params=1000"])
    assert got[1] == ["NUM_FREE_PARAMS=1000", "FRACTION=0.1", 'TIES="fill"']


def test_a_resumed_command_may_ask_for_more_runs():
    config = (
        "A = 1\nBUDGETS = \\\n    [1,\n     2]\nB.run_dir = %RUN_DIR\nRUN_DIR = 'x'\nRNG_SEEDS = [0]\nC = 2"
    )
    assert cli._identity(config) == "A = 1\nC = 2\n"


def test_experiments_are_named(capsys):
    assert cli.main(["experiment", "absent"]) == 2
    assert "score_vs_budget, subset_convergence" in capsys.readouterr().out
    assert cli.main(["experiment", "score_vs_budget", "--gin_fil=x"]) == 2
    assert "unknown argument '--gin_fil=x'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--gin_fil=x"], ["x.gin"], ["--gin.A"], ["--gin.A=1"]])
def test_bad_flags(flags, capsys):
    assert cli.main(["finetune", *flags]) == 2
    assert "usage: dst-optax finetune" in capsys.readouterr().err


def test_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["finetune", "--help"]) == 0
    assert "--gin_file" in capsys.readouterr().out


CONFIGS = sorted(
    str(p.relative_to(cli.CONFIGS)) for p in cli.CONFIGS.rglob("*.gin") if p.parent.name != "t5x"
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses_and_tells_what_it_is(name):
    gin = pytest.importorskip("gin")
    pytest.importorskip("seqio")
    path = cli.CONFIGS / name
    assert path.read_text().startswith("# ")
    gin.clear_config()
    gin.add_config_file_search_path(str(cli.CONFIGS))
    try:
        gin.parse_config_file(str(path))
        if "MODEL = " in gin.config_str():
            assert gin.query_parameter("%MODEL").scoped_configurable_fn().vocab_size >= 259
    finally:
        gin.clear_config()
