"""Subsets: what tuning leaves behind, in memory and in files."""

from dst_optax.subset.core import Entries, Subset, collisions, compose
from dst_optax.subset.errors import SubsetError
from dst_optax.subset.extraction import extract, from_models
from dst_optax.subset.fingerprint import fingerprint, fingerprints

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
