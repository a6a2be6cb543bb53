"""Real SuperGLUE and T5's vocabulary: in the directory that DST_OPTAX_DATA names, or not at hand."""

import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("DST_OPTAX_DATA", "no-data"))
needs_data = pytest.mark.skipif(
    not (REAL_DATA / "superglue" / "CB").is_dir(),
    reason="DST_OPTAX_DATA names no directory with superglue/ and t5_vocab/",
)
