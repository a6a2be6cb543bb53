"""Doctests of modules that need what is not installed are passed over."""

import importlib.util

_NEEDS = {"dst_optax/serving/torch.py": "torch"}
collect_ignore = [file for file, package in _NEEDS.items() if importlib.util.find_spec(package) is None]
