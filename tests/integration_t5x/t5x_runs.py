"""Runs T5X in this process or another, and looks into its checkpoints."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gin
import numpy as np

from dst_optax import budget
from t5x_integration import export, gin_flags

ROOT = Path(__file__).parents[2]
TINY = "tests/integration_t5x/tiny.gin"
DST = "configs/t5x/dst.gin"
FRACTION = 0.05


def flags(model_dir, steps, *bindings, files=(DST,), initial=None):
    initial = "[]" if initial is None else f'"{initial}"'
    given = [f'MODEL_DIR="{model_dir}"', f"TRAIN_STEPS={steps}", f"INITIAL_CHECKPOINT_PATH={initial}"]
    quiet = ["train.train_eval_dataset_cfg=None", "train.infer_eval_dataset_cfg=None", "EVAL_PERIOD=0"]
    if DST in files:
        given.append(f"FRACTION={FRACTION}")
    return [TINY, *files], [*given, *quiet, *bindings]


def train(model_dir, steps, *bindings, files=(DST,), initial=None):
    """T5X's training in this process."""
    return call("train", *flags(model_dir, steps, *bindings, files=files, initial=initial))


def call(program, files, bindings):
    """What T5X's program does with gin files, without starting Python anew."""
    import t5x
    from t5x import gin_utils

    module = importlib.import_module(f"t5x.{program}")
    paths = [str(ROOT), str(Path(t5x.__file__).parents[1])]
    main = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        with gin.unlock_config():
            gin.clear_config()
            gin_flags.checking(gin_utils.parse_gin_flags)(paths, files, bindings)
        return gin.get_configurable(getattr(module, {"train": "train", "eval": "evaluate"}[program]))()
    finally:
        sys.modules["__main__"] = main


def start(program, files, bindings, log, devices=1):
    """One of our programs, as a user starts it."""
    arguments = [f"--gin_file={f}" for f in files] + [f"--gin.{b}" for b in bindings]
    flags = f"--xla_force_host_platform_device_count={devices}"
    with open(log, "w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", f"t5x_integration.{program}", *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def arrays(checkpoint):
    """Everything in a checkpoint, by T5X's names."""
    return {name: np.asarray(x) for name, x in export.tensors(checkpoint).items()}


def model(found):
    return {name.removeprefix("target/"): x for name, x in found.items() if name.startswith("target/")}


def bits(x):
    return np.ascontiguousarray(x).view(np.dtype(f"u{x.dtype.itemsize}"))


def check_budget(seed, tuned, fraction=FRACTION):
    """Entries that differ, after checking that no tensor has more than its budget."""
    total = 0
    assert list(seed) == list(tuned)
    for name, x in seed.items():
        y = tuned[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        count = int((bits(x) != bits(y)).sum())
        assert count <= budget.rank(fraction, x.size), name
        total += count
    return total


def assert_same(a, b):
    assert list(a) == list(b)
    for name, x in a.items():
        assert (x.shape, x.dtype) == (b[name].shape, b[name].dtype), name
        np.testing.assert_array_equal(bits(x), bits(b[name]), err_msg=name)


def shardings(checkpoint):
    """PartitionSpec of each array, as Orbax wrote it down."""
    import base64

    found = json.loads((Path(checkpoint) / "state" / "_sharding").read_text())
    names = {base64.b64decode(name).decode().replace(".", "/"): json.loads(x) for name, x in found.items()}
    return {name: x.get("partition_spec") for name, x in names.items()}
