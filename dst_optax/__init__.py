"""Dynamic Subset Tuning for optax (arXiv 2411.08610)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dst_optax import diagnostics, distances, serving, silos, subset
    from dst_optax.transform import (
        DynamicSubsetTuningState,
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
    "reseed",
    "serving",
    "silos",
    "subset",
    "subset_mask",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in ("diagnostics", "distances", "serving", "silos", "subset"):
        return importlib.import_module(f"dst_optax.{name}")
    if name in __all__:
        return getattr(importlib.import_module("dst_optax.transform"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
