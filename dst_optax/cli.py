"""The command ``dst-optax``."""

import enum
import importlib
import inspect
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:
    sys.exit("dst-optax: the command line needs more packages: pip install 'dst-optax[cli]'")

from dst_optax import subset_cli
from dst_optax._version import __version__

app = typer.Typer(
    help="Dynamic Subset Tuning: fine-tune, compare, and look into what tuning leaves behind.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(subset_cli.app, name="subset")

GIN_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of commands that take T5X's ``--gin.NAME=VALUE`` beside what typer parses."""

GinFiles = Annotated[
    list[str],
    typer.Option("--gin_file", help="Looked for here, in the search paths and among the package's configs."),
]
GinBindings = Annotated[
    list[str], typer.Option("--gin_bindings", help="NAME=VALUE; the same as --gin.NAME=VALUE.")
]
GinSearchPaths = Annotated[
    str, typer.Option("--gin_search_paths", help="Directories to look for gin files in, separated by commas.")
]


BANNER = re.compile(r"WARNING: All log messages before absl|[IW]\d{4} \d\d:\d\d:")
"""Lines that TensorFlow's libraries write about the machine."""


class Experiment(enum.StrEnum):
    """Experiments of the paper; each has a gin file under ``configs/experiments``."""

    SCORE_VS_BUDGET = "score_vs_budget"
    SUBSET_CONVERGENCE = "subset_convergence"
    SERVING_LATENCY = "serving_latency"
    REGULARISATION = "regularisation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: of the command line, without the program's name; None takes the process's.

    Returns:
      Exit status: 0, 2 for bad input, files that cannot be used and a full disk, 130 for an interrupted run
      that can be resumed.

    Example:
      >>> main(["plan"])
      2
    """
    try:
        app(arguments, prog_name="dst-optax")
    except SystemExit as done:
        return int(done.code or 0)
    except ValueError as error:
        said, *_ = str(error).partition("\n  In call to configurable")  # gin's trace of its calls
        print(f"dst-optax: {said}", file=sys.stderr)
        return 2
    except (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        print(f"dst-optax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        from dst_optax.finetuning.storage import FULL

        if error.errno not in FULL:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"dst-optax: {where}the disk is full; what was finished before is untouched. Make room and rerun "
            "the command.",
            file=sys.stderr,
        )
        return 2
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dst-optax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings=GIN_SETTINGS)
def finetune(
    context: typer.Context,
    gin_file: GinFiles,
    gin_bindings: GinBindings = [],  # noqa: B006
    gin_search_paths: GinSearchPaths = "",
    free_params: Annotated[
        int | None,
        typer.Option(
            "--free_params",
            min=1,
            help="A budget that every method with one meets: DST, LoRA (by its ranks), prompts.",
        ),
    ] = None,
) -> None:
    r"""Fine-tunes as gin files say; later files and --gin.NAME=VALUE override earlier ones.

    dst-optax finetune --gin_file=superglue/synthetic.gin --gin.RUN_DIR=\"runs/rte\" --gin.FRACTION=0.01

    The head of each file says what it needs and how long it takes. Rerun a stopped command to resume it.
    """
    bindings = [*gin_bindings, *_gin_settings(context)]
    budget = []
    if free_params is not None:
        bindings.append(f"NUM_FREE_PARAMS={free_params}")
        budget = ["FRACTION=None", 'TIES="fill"']
    _run("dst_optax.finetuning.trainer", "finetune", gin_file, bindings, gin_search_paths, budget)


@app.command(context_settings=GIN_SETTINGS)
def experiment(
    context: typer.Context,
    name: Experiment,
    gin_file: GinFiles,
    gin_bindings: GinBindings = [],  # noqa: B006
    gin_search_paths: GinSearchPaths = "",
) -> None:
    """Repeats an experiment of the paper.

    Each has a gin file under configs/experiments whose head says what it needs and how long it takes. Rerun
    a stopped command to resume it.
    """
    bindings = [*gin_bindings, *_gin_settings(context)]
    _run(f"dst_optax.finetuning.experiments.{name}", name, gin_file, bindings, gin_search_paths)


def _gin_settings(context: typer.Context) -> list[str]:
    for argument in context.args:
        if not argument.startswith("--gin.") or "=" not in argument:
            raise ValueError(f"unknown argument {argument!r}; settings are --gin.NAME=VALUE.")
    return [argument.removeprefix("--gin.") for argument in context.args]


def _run(
    module: str,
    name: str,
    files: Sequence[str],
    bindings: Sequence[str],
    search_paths: str,
    defaults: Sequence[str] = (),
) -> None:
    """Calls a function as gin files say.

    Args:
      module: of the function.
      name: of the function.
      files: gin files.
      bindings: settings that the function must read.
      search_paths: directories, separated by commas.
      defaults: settings that the function need not read.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow looks for a GPU that it does not need
    with _without_banners():
        function = getattr(importlib.import_module(module), name)
    import gin  # pyright: ignore[reportMissingImports]
    from absl import logging as absl_logging

    from dst_optax.finetuning import gin_files
    from dst_optax.finetuning.interrupts import Interrupted

    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger().addFilter(lambda record: "Path not found" not in str(record.msg))  # gin's search
    gin_files.add_search_paths(*filter(None, search_paths.split(",")))
    gin.clear_config()
    gin_files.configure(files, [*defaults, *bindings])
    gin_files.check(bindings, function)
    takes_config = "config" in inspect.signature(function).parameters
    config = {"config": gin_files.identity(gin.config_str())} if takes_config else {}
    try:
        gin.get_configurable(function)(**config)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from stopped
    except KeyboardInterrupt as stopped:  # before or between runs, which have their own way to stop
        print("stopped; what is done is kept. Rerun the command to resume.", file=sys.stderr)
        raise typer.Exit(130) from stopped


@contextmanager
def _without_banners() -> Iterator[None]:
    """Drops what TensorFlow's libraries write of themselves when they are imported, and nothing else."""
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                if not BANNER.match(line):
                    print(line, file=sys.stderr)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="For example t5_1_1_xxl.")],
    topology: Annotated[str, typer.Option(help="For example v5e:16x16.")],
    fraction: Annotated[float, typer.Option(help="Of free parameters.")] = 0.01,
    optimizer: Annotated[str, typer.Option(help="adafactor or adamw.")] = "adafactor",
    batch_size: Annotated[int, typer.Option("--batch_size", help="Examples a step, on all chips.")] = 128,
    inputs: Annotated[int, typer.Option(help="Tokens of an input.")] = 512,
    targets: Annotated[int, typer.Option(help="Tokens of a target.")] = 62,
    mesh: Annotated[str | None, typer.Option(help="Data x model, for example 32x8.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compiles a training step for a TPU without having one, and reports its memory; 1 if it does not fit."""
    from dst_optax.finetuning import tpu_plan

    shape = None if mesh is None else tpu_plan.parse_mesh(mesh)
    job = tpu_plan.Job(model, topology, fraction, optimizer, batch_size, inputs, targets, shape)
    result = tpu_plan.plan(job)
    print(json.dumps(result, indent=1) if as_json else tpu_plan.table(result))
    raise typer.Exit(0 if result["verdict"]["fits"] else 1)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Directories of runs or experiments.")],
    out: Annotated[str, typer.Option(help="The HTML file to write.")] = "report.html",
) -> None:
    """Makes one HTML page of tables, figures and configurations that needs no network."""
    from dst_optax.finetuning.experiments.report import report

    print(report(runs, out))
