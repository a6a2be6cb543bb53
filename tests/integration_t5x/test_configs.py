"""The gin files: every one parses, every name in it exists, and what is bound arrives."""

import sys
from pathlib import Path

import numpy as np
import pytest

gin = pytest.importorskip("gin")
for needed in ("flax", "seqio", "tensorflow"):
    pytest.importorskip(needed)

import t5x  # noqa: E402

from t5x_integration import checkpoints, optimizers  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZES = ("small", "base", "large", "xl", "xxl")
STUB = not hasattr(t5x, "__file__")
FINETUNE = """
from __gin__ import dynamic_registration
from t5x import utils
MODEL_DIR = None
utils.RestoreCheckpointConfig.path = %INITIAL_CHECKPOINT_PATH
"""


@pytest.fixture(autouse=True)
def configured(monkeypatch, tmp_path):
    """T5X's programs and files; where it is not installed, files with the macros that ours need."""
    from t5x import train as program

    with gin.unlock_config():
        gin.clear_config()
    if STUB:
        for name in ("examples/t5/t5_1_1", "configs/runs"):
            (tmp_path / "t5x" / name).mkdir(parents=True)
        for name in [f"examples/t5/t5_1_1/{size}.gin" for size in SIZES]:
            (tmp_path / "t5x" / name).write_text("VOCABULARY = None")
        (tmp_path / "t5x" / "configs" / "runs" / "finetune.gin").write_text(FINETUNE)
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    for path in (ROOT, tmp_path if STUB else Path(t5x.__file__).parents[1]):
        gin.add_config_file_search_path(str(path))
    yield
    with gin.unlock_config():
        gin.clear_config()


def parse(*files, **macros):
    with gin.unlock_config():
        gin.parse_config_files_and_bindings(
            [f"configs/t5x/{f}.gin" for f in files], [f"{k} = {v!r}" for k, v in macros.items()]
        )


@pytest.mark.parametrize("size", SIZES)
def test_every_size_starts_from_its_own_checkpoint(size):
    parse(f"t5_1_1_{size}", "dst", MODEL_DIR="run")
    assert f"/t5_1_1_{size}/" in gin.query_parameter("%INITIAL_CHECKPOINT_PATH")
    assert gin.query_parameter("%TRAIN_STEPS") == 1_020_000
    assert "dynamic_subset_tuning" in str(gin.query_parameter("%OPTIMIZER"))


def test_without_dst_everything_is_tuned():
    parse("t5_1_1_small", MODEL_DIR="run")
    if not STUB:
        assert "Adafactor" in str(gin.query_parameter("%OPTIMIZER"))
    assert gin.query_parameter("SaveCheckpointConfig.save_dataset") is True


def test_dst_binds_the_optimizer_and_claims_the_directory(tmp_path):
    parse("t5_1_1_small", "dst", FRACTION=0.03, MODEL_DIR=str(tmp_path / "run"))
    optimizer = gin.query_parameter("%OPTIMIZER").scoped_configurable_fn()
    assert isinstance(optimizer, optimizers.DynamicSubsetTuning)
    assert optimizer.plan({"w": np.ones(101, np.float32)}).budgets == (3,)
    found = gin.query_parameter("train.checkpoint_cfg").scoped_configurable_fn()
    assert isinstance(found, checkpoints.CheckpointConfig)
    assert found.restore.fallback_to_scratch
    assert found.save.save_dataset
    assert (tmp_path / "run" / checkpoints.RECORD).exists()


def test_a_subset_is_put_onto_what_is_restored():
    parse("subset", SUBSET="runs/cb")
    bound = gin.query_parameter("RestoreCheckpointConfig.checkpoint_manager_cls")
    assert "SubsetCheckpointManager" in str(bound)
    assert gin.query_parameter("RestoreCheckpointConfig.dtype") is None
