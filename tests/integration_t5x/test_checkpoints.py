"""Whose checkpoint a directory is for, and what a restore takes of one."""

import pytest

pytest.importorskip("flax")
pytest.importorskip("tensorflow")

from t5x import utils

from t5x_integration import checkpoints

WANTED = {
    "target": {"a": {"kernel": 0}, "b": {"scale": 0}},
    "state": {
        "step": 0,
        "param_states": {"a": {"v_row": 0}, "b": {"v": 0}},
        "dst": {"seed": {"a": {"kernel": 0}}},
    },
}


def test_a_directory_belongs_to_one_initial_checkpoint(tmp_path):
    run = str(tmp_path / "run")
    for _ in range(2):  # the second time it resumes
        checkpoints.claim(run, "pre/checkpoint_10")
    with pytest.raises(ValueError, match=r"from the checkpoint 'pre/checkpoint_10'.*other/checkpoint_10"):
        checkpoints.claim(run, "other/checkpoint_10")
    with pytest.raises(ValueError, match="MODEL_DIR"):
        checkpoints.claim(run, None)
    checkpoints.claim(run, "pre/checkpoint_10")


def test_checkpoints_without_a_record_are_refused(tmp_path):
    (tmp_path / "checkpoint_3").mkdir()
    with pytest.raises(ValueError, match=r"initial_checkpoint\.json"):
        checkpoints.claim(str(tmp_path), "pre/checkpoint_10")
    assert not (tmp_path / checkpoints.RECORD).exists()


def test_the_data_start_anew_only_when_the_run_does(tmp_path):
    def configure():
        restore = utils.RestoreCheckpointConfig(path="pre/checkpoint_10")
        save = utils.SaveCheckpointConfig()
        checkpoints.CheckpointConfig(save=save, restore=restore, model_dir=str(tmp_path))
        return save.checkpoint_manager_cls, restore.checkpoint_manager_cls

    assert configure() == (checkpoints.InitialCheckpointManager,) * 2
    (tmp_path / "checkpoint_11").mkdir()
    assert checkpoints.InitialCheckpointManager not in configure()


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
    assert checkpoints.keep_model(checkpoint, WANTED, is_resuming=True) is checkpoint
