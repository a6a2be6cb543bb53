"""Doctests of modules that need what is not installed are passed over."""

import importlib.util

_NEED_TORCH = [f"dst_optax/serving/{name}.py" for name in ("in_place", "routing", "torch")]
collect_ignore = [] if importlib.util.find_spec("torch") else _NEED_TORCH
