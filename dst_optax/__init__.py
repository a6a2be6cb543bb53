"""Dynamic Subset Tuning for optax (arXiv 2411.08610)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst_optax import diagnostics, distances, project, serving, silos, subset
    from dst_optax.state import DynamicSubsetTuningState
    from dst_optax.transform import (
        apply_updates,
        dynamic_subset_tuning,
        finalize,
        reseed,
        subset_mask,
        wrap,
    )

__all__ = [
    "DynamicSubsetTuningState",
    "apply_updates",
    "diagnostics",
    "distances",
    "dynamic_subset_tuning",
    "finalize",
    "project",
    "reseed",
    "serving",
    "silos",
    "subset",
    "subset_mask",
    "wrap",
]

_MODULES = ("diagnostics", "distances", "project", "serving", "silos", "subset")


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that a serving host can read subset files without jax."""
    if name in _MODULES:
        return importlib.import_module(f"dst_optax.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'dst_optax' has no attribute {name!r}")
    owner = "state" if name == "DynamicSubsetTuningState" else "transform"
    return getattr(importlib.import_module(f"dst_optax.{owner}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
