"""Makes T5X importable, and runs its programs, with today's packages."""

import importlib.util
import runpy
import sys
import types

import jax
import jax.experimental.pjit

from dst_optax.finetuning import gin_files

AIRIO = ("Task", "Mixture", "DatasetProviderBase", "AirIODatasetIterator")


def make_importable() -> None:
    """Puts in place what T5X imports and no package index has.

    T5X asks ``airio`` only whether an object is one of its kind, and jestimator looks for
    ``PartitionSpec`` where jax no longer keeps it.

    Example:
      >>> make_importable()
      >>> import airio.core
    """
    if not hasattr(jax.experimental.pjit, "PartitionSpec"):
        jax.experimental.pjit.PartitionSpec = jax.sharding.PartitionSpec  # type: ignore[attr-defined]
    if "airio" not in sys.modules and importlib.util.find_spec("airio") is None:
        airio, core = types.ModuleType("airio"), types.ModuleType("airio.core")
        for name in AIRIO:
            setattr(core, name, type(name, (), {}))
        airio.core = core  # type: ignore[attr-defined]
        sys.modules |= {"airio": airio, "airio.core": core}


def run(program: str) -> None:
    """Runs one of T5X's programs as the main module, as its gin files expect it.

    Our gin files are found from anywhere, and settings without effect are refused.

    Args:
      program: "train", "eval" or "infer"; flags come from the command line.
    """
    from t5x import gin_utils  # pyright: ignore[reportMissingImports]

    from t5x_integration import gin_flags  # imports T5X, which make_importable() comes before

    gin_files.add_search_paths()
    gin_utils.parse_gin_flags = gin_flags.checking(gin_utils.parse_gin_flags)
    runpy.run_module(f"t5x.{program}", run_name="__main__", alter_sys=True)
