"""Whose checkpoint a directory is for, and what a restore takes of one."""

import shutil

import pytest
from object_store import bucket  # noqa: F401

for needed in ("flax", "seqio", "tensorflow"):
    pytest.importorskip(needed)

from flax import traverse_util  # noqa: E402
from t5x import utils  # noqa: E402

from dst_optax.paths import as_path  # noqa: E402
from t5x_integration import checkpoints  # noqa: E402

WANTED = {
    "target": {"a": {"kernel": 0}, "b": {"scale": 0}},
    "state": {
        "step": 0,
        "param_states": {"a": {"v_row": 0}, "b": {"v": 0}},
        "dst": {"seed": {"a": {"kernel": 0}}},
    },
}


@pytest.fixture(params=["local", "store"])
def directory(request, tmp_path, bucket):  # noqa: F811
    return str(tmp_path) if request.param == "local" else bucket


def save(directory, step, kind="state"):
    """As much of a checkpoint as T5X looks for."""
    place = as_path(directory) / f"checkpoint_{step}"
    file = place / "state" / "_METADATA" if kind == "state" else place / "checkpoint"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"{}")
    return str(place)


def configure(run, initial, mode="specific"):
    restore = utils.RestoreCheckpointConfig(path=initial, mode=mode)
    save_config = utils.SaveCheckpointConfig()
    checkpoints.CheckpointConfig(save=save_config, restore=restore, model_dir=str(run))
    return save_config.checkpoint_manager_cls, restore.checkpoint_manager_cls


def test_a_directory_belongs_to_one_initial_checkpoint(directory):
    run = f"{directory}/run"
    checkpoints.claim(run, "pre/checkpoint_10")
    save(run, 10)
    checkpoints.claim(run, "pre/checkpoint_10/")  # it resumes
    with pytest.raises(ValueError, match=r"from the checkpoint 'pre/checkpoint_10'.*other/checkpoint_10"):
        checkpoints.claim(run, "other/checkpoint_10")
    with pytest.raises(ValueError, match="MODEL_DIR"):
        checkpoints.claim(run, None)
    checkpoints.claim(run, "pre/checkpoint_10")


def test_checkpoints_without_a_record_are_refused(directory):
    save(directory, 3)
    with pytest.raises(ValueError, match=r"initial_checkpoint\.json"):
        checkpoints.claim(directory, "pre/checkpoint_10")
    assert not (as_path(directory) / checkpoints.RECORD).exists()


def test_a_directory_without_checkpoints_belongs_to_nobody(directory):
    """A first command that failed, whatever for, does not stand in the way of the corrected one."""
    run = f"{directory}/run"
    for name in ("wrong", "right"):
        checkpoints.claim(run, f"{name}/checkpoint_10")
    save(run, 10)
    checkpoints.claim(run, "right/checkpoint_10")


@pytest.mark.parametrize("kind", ["state", "checkpoint"])
@pytest.mark.parametrize("mode", ["specific", "latest"])
def test_what_is_found_is_claimed(directory, kind, mode):
    initial = save(f"{directory}/pre", 10, kind)
    configure(f"{directory}/run", initial if mode == "specific" else f"{directory}/pre", mode)
    assert (as_path(directory) / "run" / checkpoints.RECORD).exists()


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("pre/checkpoint_61", "specific", "pre/checkpoint_61 is no checkpoint.*pre lies checkpoint_10"),
        ("pre", "specific", "pre is no checkpoint.*pre lies checkpoint_10"),
        ("pre/checkpoint_10/state", "specific", "state is no checkpoint"),
        ("nowhere/checkpoint_10", "specific", "nowhere lies no checkpoint"),
        ("bare/checkpoint_9", "specific", "'state' .Orbax. or 'checkpoint'"),
        ("empty", "latest", "empty holds no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named_and_claims_nothing(directory, name, mode, words):
    save(f"{directory}/pre", 10)
    (as_path(directory) / "bare" / "checkpoint_9").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        configure(f"{directory}/run", f"{directory}/{name}", mode)
    assert not (as_path(directory) / "run" / checkpoints.RECORD).exists()


def test_a_run_resumes_without_its_initial_checkpoint(directory):
    initial = save(f"{directory}/pre", 10)
    configure(f"{directory}/run", initial)
    save(f"{directory}/run", 12)
    shutil.rmtree(f"{directory}/pre", ignore_errors=True)
    configure(f"{directory}/run", initial)


def test_the_data_start_anew_only_when_the_run_does(tmp_path):
    initial, run = save(tmp_path / "pre", 10), tmp_path / "run"
    assert configure(run, initial) == (checkpoints.InitialCheckpointManager,) * 2
    save(run, 11)
    assert checkpoints.InitialCheckpointManager not in configure(run, initial)


@pytest.mark.parametrize(("kind", "dtype"), [("state", None), ("checkpoint", "bfloat16")])
def test_a_resumption_does_not_round_what_orbax_saved(directory, kind, dtype):
    run, initial = f"{directory}/run", save(f"{directory}/pre", 10)
    for expected in ("bfloat16", dtype):
        config = checkpoints.CheckpointConfig(
            save=utils.SaveCheckpointConfig(dtype="bfloat16"),
            restore=utils.RestoreCheckpointConfig(path=initial, mode="specific"),
            model_dir=run,
        )
        assert config.save.dtype == expected
        save(run, 11, kind)


def test_a_config_without_a_directory_is_refused():
    with pytest.raises(ValueError, match="MODEL_DIR"):
        checkpoints.CheckpointConfig()


def test_the_optimizers_state_may_be_missing_and_is_kept_where_it_is_there():
    checkpoint = {
        "target": {"a": {"kernel": 1}, "b": {"scale": 2}, "c": {"other": 9}},
        "state": {"step": 3, "param_states": {"a": {"v_row": 4}, "b": {"mu": 5}}},
    }
    assert checkpoints.keep_model(checkpoint, WANTED) == {
        "target": {"a": {"kernel": 1}, "b": {"scale": 2}},
        "state": {"step": 3, "param_states": {"a": {"v_row": 4}}},
    }


@pytest.mark.parametrize("lost", [("target", "b"), ("state", "step")])
def test_the_model_may_not_be_missing(lost):
    checkpoint = {**WANTED, lost[0]: {k: v for k, v in WANTED[lost[0]].items() if k != lost[1]}}
    with pytest.raises(ValueError, match="/".join(lost)):
        checkpoints.keep_model(checkpoint, WANTED)


def test_a_run_that_resumes_takes_everything():
    checkpoint = {"target": {"odd": 1}}
    assert checkpoints.keep_model(checkpoint, {"target": {"even": 1}}, is_resuming=True) is checkpoint


STATES = {
    "none": {"param_states": {"a": {"v": 0}}},
    "wrapper": {"param_states": {"a": {"v": 0}}, "dst": {"captured": 0, "seed": {"a": 0}}},
    "chain": {"param_states": {"0": {"count": 0}, "1": {"captured": 0}}},
}


@pytest.mark.parametrize("wanted", STATES)
@pytest.mark.parametrize("written", STATES)
def test_a_run_from_a_tuned_model_takes_nothing_of_its_seed(written, wanted):
    """Its own seed is the model in the checkpoint, whatever that was tuned from."""
    model = {"target": {"a": 1}}
    written, wanted = ({**model, "state": {"step": 3, **STATES[x]}} for x in (written, wanted))
    kept = checkpoints.keep_model(written, wanted)
    assert kept["target"] == model["target"]
    assert kept["state"]["step"] == 3
    names = traverse_util.flatten_dict(kept, sep="/")
    assert checkpoints.dst_states(names) == []
    assert not [name for name in names if name.startswith(("state/dst", "state/param_states/1"))]


@pytest.mark.parametrize("wanted", STATES)
@pytest.mark.parametrize("written", STATES)
def test_a_run_resumes_with_the_optimizer_that_it_was_started_with(written, wanted):
    checkpoint = {"state": STATES[written]}
    if written == wanted:
        assert checkpoints.keep_model(checkpoint, checkpoint, is_resuming=True) is checkpoint
        return
    with pytest.raises(ValueError, match="gin files that the run was started with"):
        checkpoints.keep_model(checkpoint, {"state": STATES[wanted]}, is_resuming=True)
