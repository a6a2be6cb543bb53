"""Dynamic Subset Tuning for optax (arXiv 2411.08610)."""

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
