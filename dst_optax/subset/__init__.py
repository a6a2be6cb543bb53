"""Subsets: what tuning leaves behind, in memory and in files.

Reading, inspecting and applying them takes numpy and safetensors; jax is imported by what makes them.
"""

from typing import TYPE_CHECKING, Any

from dst_optax.subset.core import Subset, collisions, compose
from dst_optax.subset.entries import Entries
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.fingerprint import fingerprint, fingerprints

if TYPE_CHECKING:
    from dst_optax.subset.extraction import extract, from_models

__all__ = [
    "Entries",
    "Subset",
    "SubsetError",
    "collisions",
    "compose",
    "extract",
    "fingerprint",
    "fingerprints",
    "from_models",
]


def __getattr__(name: str) -> Any:
    if name in ("extract", "from_models"):
        from dst_optax.subset import extraction

        return getattr(extraction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
