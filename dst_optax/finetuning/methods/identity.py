"""What a method is, as text: by it a run that goes on notices that its method has changed."""

import dataclasses
import functools
import hashlib
import types
from typing import Any

import jax
import numpy as np


def describe(x: Any) -> str:
    """A method, an optimizer or any part of one, as text that is the same in every process.

    Functions are described by their names, what they enclose and, where they are not of a library, their
    constants; so are optax's optimizers, which are functions. Other objects are described by what they hold.

    Args:
      x: anything.

    Returns:
      The text. Equal ones do not prove that the methods are equal; different ones prove that they are not.

    Example:
      >>> import optax
      >>> [describe(optax.sgd(0.1)) == describe(optax.sgd(rate)) for rate in (0.1, 1.0)]
      [True, False]
    """
    return _describe(x, ())


def _describe(x: Any, within: tuple[int, ...]) -> str:
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return repr(x)
    if id(x) in within:  # a function may enclose itself
        return "..."
    within = (*within, id(x))

    def all_of(parts: Any) -> str:
        return ", ".join(_describe(part, within) for part in parts)

    def named(parts: Any) -> str:
        return ", ".join(f"{name}={_describe(part, within)}" for name, part in parts)

    if isinstance(x, np.ndarray | np.generic | jax.Array):
        shape = f"{x.dtype}{x.shape}"
        known = getattr(x, "is_fully_addressable", True)
        return shape + (hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:16] if known else "")
    if isinstance(x, type | types.ModuleType):
        return x.__name__
    kind = type(x).__qualname__
    if dataclasses.is_dataclass(x):
        return f"{kind}({named((f.name, getattr(x, f.name)) for f in dataclasses.fields(x))})"
    if isinstance(x, dict):
        return f"{kind}({named(x.items())})"
    if isinstance(x, tuple | list):
        return f"{kind}({all_of(x)})"
    if isinstance(x, set | frozenset):
        return f"{kind}({', '.join(sorted(_describe(part, within) for part in x))})"
    if isinstance(x, functools.partial):
        return f"partial({_describe(x.func, within)}, {all_of(x.args)}, {named(x.keywords.items())})"
    if isinstance(x, types.MethodType):
        return f"{_describe(x.__self__, within)}.{x.__name__}"
    if isinstance(x, types.FunctionType):
        constants = [] if _is_installed(x) else x.__code__.co_consts
        constants = [c for c in constants if not isinstance(c, types.CodeType) and c != x.__doc__]
        enclosed = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        return f"{x.__qualname__}({all_of([constants, x.__defaults__, x.__kwdefaults__, enclosed])})"
    if hasattr(x, "__wrapped__"):
        return _describe(x.__wrapped__, within)
    return f"{kind}({named(vars(x).items())})" if hasattr(x, "__dict__") else kind


def _is_installed(function: types.FunctionType) -> bool:
    """Whether a function is a library's, whose constants may change with its version."""
    return function.__module__.startswith("dst_optax.") or "site-packages" in function.__code__.co_filename
