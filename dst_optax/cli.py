"""The command ``dst-optax``."""

import importlib
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

FINETUNE_USAGE = """usage: dst-optax finetune --gin_file=FILE [--gin.NAME=VALUE ...] [--gin_search_paths=DIR]

Fine-tunes T5 as gin files say; later files and --gin.NAME=VALUE override earlier ones, e.g.
  dst-optax finetune --gin_file=superglue/synthetic.gin --gin.RUN_DIR=\\"/tmp/run\\" --gin.FRACTION=0.01
  --free_params=N is a budget that every method with one meets: DST, LoRA (by its ranks), prompts.
Files are looked for here, in the search paths and among the configs of this package. The head of each
file says what it needs and how long it takes.
"""
EXPERIMENTS = ("score_vs_budget", "subset_convergence", "serving_latency", "regularisation")
EXPERIMENT_USAGE = f"""usage: dst-optax experiment NAME --gin_file=FILE [--gin.NAME=VALUE ...]

Repeats an experiment of the paper: {", ".join(EXPERIMENTS)}. Each has a gin file under
configs/experiments/ whose head says what it needs and how long it takes. A killed command goes on.
"""
CONFIGS = Path(__file__).resolve().parent / "finetuning" / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: of the command line, without the program's name; None takes the process's.

    Returns:
      Exit status: 0, 2 for bad input, 130 for an interrupted run that can go on.

    Example:
      >>> main(["--help"])
      usage: dst-optax finetune | plan | experiment | report | subset ...
      0
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    print(f"usage: dst-optax {' | '.join(COMMANDS)} ...")
    return 0 if arguments in (["--help"], ["-h"]) else 2


def finetune(arguments: Sequence[str]) -> int:
    """Runs ``dst-optax finetune``; see FINETUNE_USAGE."""
    return _configured("finetune", "dst_optax.finetuning.trainer", arguments, FINETUNE_USAGE)


def experiment(arguments: Sequence[str]) -> int:
    """Runs ``dst-optax experiment``; see EXPERIMENT_USAGE."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name not in EXPERIMENTS:
        print(EXPERIMENT_USAGE)
        return 0 if name in ("--help", "-h") else 2
    return _configured(name, f"dst_optax.finetuning.experiments.{name}", rest, EXPERIMENT_USAGE)


def _configured(name: str, module: str, arguments: Sequence[str], usage: str) -> int:
    """Runs a function as gin files say."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(usage)
        return 0 if arguments else 2
    try:
        files, bindings, paths = gin_flags(arguments)
        return _run(getattr(importlib.import_module(module), name), files, bindings, paths)
    except ValueError as error:
        print(f"dst-optax {name}: {error}", file=sys.stderr)
        return 2


def gin_flags(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Parses T5X's flags.

    Args:
      arguments: ``--gin_file=F``, ``--gin.NAME=VALUE`` (or ``--gin_bindings=NAME=VALUE``) and
        ``--gin_search_paths=A,B`` and ``--free_params=N``, in any order and number.

    Returns:
      Files, bindings and search paths.

    Raises:
      ValueError: another argument.

    Example:
      >>> gin_flags(["--gin_file=a.gin", "--gin.STEPS=5"])
      (['a.gin'], ['STEPS=5'], [])
    """
    files, bindings, paths = [], [], []
    for argument in arguments:
        if found := re.fullmatch(r"--gin_file=(.+)", argument, re.DOTALL):
            files.append(found[1])
        elif found := re.fullmatch(r"--gin(?:\.|_bindings=)([^=]+=.+)", argument, re.DOTALL):
            bindings.append(found[1])
        elif found := re.fullmatch(r"--free_params=(\d+)", argument):
            bindings += [f"NUM_FREE_PARAMS={found[1]}", "FRACTION=0.1"]  # the default: not given
            bindings.append('TIES="fill"')
        elif found := re.fullmatch(r"--gin_search_paths=(.+)", argument):
            paths += found[1].split(",")
        else:
            raise ValueError(f"unknown argument {argument!r}.\n{FINETUNE_USAGE}")
    if not files:
        raise ValueError(f"no --gin_file.\n{FINETUNE_USAGE}")
    return files, bindings, paths


def _run(function: Callable[..., Any], files: list[str], bindings: list[str], paths: list[str]) -> int:
    import gin  # pyright: ignore[reportMissingImports]
    from absl import logging as absl_logging

    from dst_optax.finetuning import trainer

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger().addFilter(lambda record: "Path not found" not in record.msg)  # gin's search
    for path in [str(CONFIGS), *paths]:
        gin.add_config_file_search_path(path)
    try:
        gin.parse_config_files_and_bindings(files, bindings)
        gin.get_configurable(function)(config=_identity(gin.config_str()))
    except OSError as error:
        if "Unable to open file" in str(error):
            raise ValueError(f"{error}. Looked in {', '.join(['.', *paths, str(CONFIGS)])}.") from error
        raise
    except trainer.Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def _identity(config: str) -> str:
    """The part of a configuration that a resumed command must repeat: it may ask for more runs."""
    free = r".*\.run_dir|RUN_DIR|RNG_SEEDS|BUDGETS|LEARNING_RATES"
    return re.sub(rf"^(?:{free}) = .*\n(?:[ \t]+.*\n)*", "", config + "\n", flags=re.MULTILINE)


def plan(arguments: Sequence[str]) -> int:
    """Runs ``dst-optax plan``, see :mod:`dst_optax.finetuning.tpu_plan`."""
    from dst_optax.finetuning import tpu_plan

    try:
        return tpu_plan.main(arguments)
    except ValueError as error:
        print(f"dst-optax plan: {error}", file=sys.stderr)
        return 2


def report(arguments: Sequence[str]) -> int:
    """Runs ``dst-optax report RUN... [--out=FILE]``."""
    runs = [argument for argument in arguments if not argument.startswith("-")]
    flags = [argument for argument in arguments if argument.startswith("-")]
    out = next((flag.removeprefix("--out=") for flag in flags if flag.startswith("--out=")), "report.html")
    if not runs or any(not flag.startswith("--out=") for flag in flags):
        print("usage: dst-optax report RUN... [--out=report.html]")
        return 0 if flags in (["--help"], ["-h"]) else 2
    from dst_optax.finetuning.experiments.report import report

    try:
        print(report(runs, out))
    except ValueError as error:
        print(f"dst-optax report: {error}", file=sys.stderr)
        return 2
    return 0


def subset(arguments: Sequence[str]) -> int:
    """Runs ``dst-optax subset``; needs the extra ``cli``."""
    from dst_optax.subset.cli import app

    app(list(arguments), prog_name="dst-optax subset")
    return 0


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "finetune": finetune,
    "plan": plan,
    "experiment": experiment,
    "report": report,
    "subset": subset,
}
