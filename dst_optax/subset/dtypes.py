"""The dtypes that subsets hold, with their names in safetensors files."""

from typing import Any

import ml_dtypes
import numpy as np

from dst_optax.subset.errors import SubsetError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}


def is_float(dtype: Any) -> bool:
    """Whether entries are floating-point numbers, narrow ones of ml_dtypes too."""
    return np.dtype(dtype).name.startswith(("float", "bfloat"))


def checked(dtype: Any, path: str) -> np.dtype:
    """The dtype of a tensor, if subsets hold it.

    Args:
      dtype: an array's ``dtype``.
      path: of the tensor, for the error.

    Returns:
      The same as numpy has it.

    Raises:
      SubsetError: it is that of random keys, or entries are complex or narrower than a byte.

    Example:
      >>> checked("int64", "embeddings/position_ids")
      dtype('int64')
    """
    try:
        dtype = np.dtype(dtype)
    except TypeError as e:
        raise SubsetError(
            f"{path!r} has the dtype {dtype}, which numpy does not have: convert tensors of other libraries "
            "to arrays, and leave random keys out, with nnx for one by nnx.state(model, nnx.Param)."
        ) from e
    if dtype.name not in BY_NAME:
        raise SubsetError(
            f"{path!r} has the dtype {dtype.name}, which subsets cannot hold; convert the model to one of "
            f"{', '.join(BY_NAME)}."
        )
    if not dtype.isnative:
        raise SubsetError(
            f"{path!r} is {dtype}, of the other byte order; convert it with astype({dtype.name!r})."
        )
    return dtype
