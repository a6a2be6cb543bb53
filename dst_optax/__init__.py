"""Dynamic Subset Tuning for optax (arXiv 2411.08610)."""

from dst_optax import diagnostics, distances, silos
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
    "silos",
    "subset_mask",
    "wrap",
]
