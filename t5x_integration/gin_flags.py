"""T5X's gin flags, checked before a program starts: gin itself ignores what nothing reads.

Settings that have no effect are how a run quietly tunes something else than was asked for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gin  # pyright: ignore[reportMissingImports]

from dst_optax.finetuning import gin_files
from dst_optax.paths import as_path
from t5x_integration import checkpoints, optimizers
from t5x_integration.checkpoints import CheckpointConfig

LAST = (
    "give configs/t5x/dst.gin after the files of the model and the run, and what replaces its settings last."
)
OPTIMIZERS = {optimizers.dynamic_subset_tuning, optimizers.chain}


def checking(parse: Callable[..., None]) -> Callable[..., None]:
    """T5X's ``parse_gin_flags``, followed by :func:`check`.

    Args:
      parse: takes search paths, files, bindings, and more.

    Returns:
      A function of the same arguments.
    """

    @functools.wraps(parse)
    def parse_and_check(
        paths: Sequence[str], files: Sequence[str], bindings: Sequence[str], **more: Any
    ) -> None:
        parse(paths, files, bindings, **more)
        check(bindings)

    return parse_and_check


def check(bindings: Sequence[str]) -> None:
    """Refuses settings without effect, and to resume a run of DST without it.

    Args:
      bindings: ``NAME=VALUE``, already parsed.

    Raises:
      ValueError: nothing reads one of them; a file after ``dst.gin`` takes its place; or MODEL_DIR holds a
        run of DST and the gin files do not.
    """
    gin_files.check(bindings)
    configured, used = gin_files.configured(), gin_files.used()
    has_dst = CheckpointConfig in used
    if CheckpointConfig in configured and not has_dst:
        raise ValueError(f"another file binds train.checkpoint_cfg after configs/t5x/dst.gin; {LAST}")
    if configured & OPTIMIZERS and not used & OPTIMIZERS:
        raise ValueError(
            f"another file binds OPTIMIZER after configs/t5x/dst.gin: all would be tuned; {LAST}"
        )
    if not has_dst and (model_dir := _model_dir()):
        check_is_not_of_dst(model_dir)


def check_is_not_of_dst(model_dir: str) -> None:
    """Raises where a run of DST would go on without it.

    Args:
      model_dir: local or ``gs://`` directory.

    Raises:
      ValueError: it holds checkpoints, and the record that our ``CheckpointConfig`` writes.
    """
    if checkpoints.steps(model_dir) and (as_path(model_dir) / checkpoints.RECORD).exists():
        raise ValueError(
            f"{model_dir} holds a run of Dynamic Subset Tuning, and the gin files of this command tune all "
            "parameters; add --gin_file=configs/t5x/dst.gin to resume it, or give another MODEL_DIR."
        )


def _model_dir() -> str | None:
    """Where training saves its checkpoints; None for T5X's other programs."""
    try:
        value = gin.query_parameter("train.model_dir")
    except ValueError:
        return None
    return value if isinstance(value, str) else value.scoped_configurable_fn()  # %MODEL_DIR
