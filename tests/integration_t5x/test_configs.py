"""The gin files: every one parses, every name in it exists, and what is bound arrives."""

import sys
from pathlib import Path

import numpy as np
import pytest

gin = pytest.importorskip("gin")
for needed in ("flax", "seqio", "tensorflow"):
    pytest.importorskip(needed)

import t5x  # noqa: E402

from t5x_integration import checkpoints, gin_flags, optimizers  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZES = ("small", "base", "large", "xl", "xxl")
CHAIN = "tests/integration_t5x/chain.gin"
STUB = not hasattr(t5x, "__file__")
MODEL = """
from __gin__ import dynamic_registration
from t5x import adafactor
VOCABULARY = %DROPOUT_RATE
OPTIMIZER = @adafactor.Adafactor()
"""
FINETUNE = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils
MODEL_DIR = None
train_script.train:
  model_dir = %MODEL_DIR
  total_steps = %TRAIN_STEPS
  checkpoint_cfg = @utils.CheckpointConfig()
  train_dataset_cfg = @train/utils.DatasetConfig()
utils.CheckpointConfig:
  restore = @utils.RestoreCheckpointConfig()
  save = @utils.SaveCheckpointConfig()
utils.RestoreCheckpointConfig:
  path = %INITIAL_CHECKPOINT_PATH
  mode = 'specific'
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
            (tmp_path / "t5x" / name).write_text(MODEL)
        (tmp_path / "t5x" / "configs" / "runs" / "finetune.gin").write_text(FINETUNE)
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(gin.config, "_LOCATION_PREFIXES", [""])
    for path in (ROOT, tmp_path if STUB else Path(t5x.__file__).parents[1]):
        gin.add_config_file_search_path(str(path))
    yield
    with gin.unlock_config():
        gin.clear_config()


def parse(*files, **macros):
    """As T5X's programs do under our launcher."""
    from t5x import gin_utils

    with gin.unlock_config():
        gin.clear_config()
        gin_flags.checking(gin_utils.parse_gin_flags)(
            [],
            [f if "/" in f else f"configs/t5x/{f}.gin" for f in files],
            [f"{name} = {value!r}" for name, value in macros.items()],
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
    initial = tmp_path / "checkpoint_10"
    (initial / "state").mkdir(parents=True)
    macros = {"MODEL_DIR": str(tmp_path / "run"), "INITIAL_CHECKPOINT_PATH": str(initial)}
    parse("t5_1_1_small", "dst", FRACTION=0.03, **macros)
    optimizer = gin.query_parameter("%OPTIMIZER").scoped_configurable_fn()
    assert isinstance(optimizer, optimizers.DynamicSubsetTuning)
    assert optimizer.plan({"w": np.ones(101, np.float32)}).budgets == (3,)
    found = gin.query_parameter("train.checkpoint_cfg").scoped_configurable_fn()
    assert isinstance(found, checkpoints.CheckpointConfig)
    assert found.restore.fallback_to_scratch
    assert found.save.save_dataset
    assert (tmp_path / "run" / checkpoints.RECORD).exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FRACTON", "nothing reads FRACTON; did you mean FRACTION"),
        ("TRAINSTEPS", "did you mean TRAIN_STEPS"),
        ("trian/utils.DatasetConfig.seed", "nothing has the scope of trian/.*did you mean train"),
        ("Q", "nothing reads Q"),
    ],
)
def test_settings_that_nothing_reads_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        parse("t5_1_1_small", "dst", MODEL_DIR="run", **{name: 0})


def test_a_chain_may_stand_in_for_the_wrapper():
    parse("t5_1_1_small", "dst", CHAIN, MODEL_DIR="run", **{"train/utils.DatasetConfig.seed": 1})


@pytest.mark.parametrize(
    ("files", "overridden"),
    [
        (("dst", "t5_1_1_small"), "checkpoint_cfg"),
        (("t5x/examples/t5/t5_1_1/small.gin", "dst", "superglue"), "checkpoint_cfg"),
        (("t5_1_1_small", "dst", "t5x/examples/t5/t5_1_1/small.gin"), "OPTIMIZER"),
        (("t5_1_1_small", "dst", CHAIN, "t5x/examples/t5/t5_1_1/small.gin"), "OPTIMIZER"),
    ],
)
def test_files_that_take_back_what_dst_sets_are_refused(files, overridden):
    with pytest.raises(ValueError, match=rf"{overridden} after .*dst\.gin"):
        parse(*files, MODEL_DIR="run", INITIAL_CHECKPOINT_PATH="pre", TRAIN_STEPS=1, DROPOUT_RATE=0.1)


def test_a_run_of_dst_is_not_resumed_without_it(tmp_path):
    run = str(tmp_path / "run")
    checkpoints.claim(run, "pre/checkpoint_10")
    parse("t5_1_1_small", MODEL_DIR=run)  # nothing was trained yet
    (tmp_path / "run" / "checkpoint_12").mkdir()
    with pytest.raises(ValueError, match=r"run holds a run of Dynamic Subset Tuning.*dst\.gin"):
        parse("t5_1_1_small", MODEL_DIR=run)
    parse("t5_1_1_small", "dst", MODEL_DIR=run)
    (tmp_path / "run" / checkpoints.RECORD).unlink()
    parse("t5_1_1_small", MODEL_DIR=run)  # the run of somebody else


def test_a_subset_is_put_onto_what_is_restored():
    parse("subset", SUBSET="runs/cb")
    bound = gin.query_parameter("RestoreCheckpointConfig.checkpoint_manager_cls")
    assert "SubsetCheckpointManager" in str(bound)
    assert gin.query_parameter("RestoreCheckpointConfig.dtype") is None
