"""Starting from a pre-trained checkpoint, and never from another one in the same directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import tensorflow as tf  # pyright: ignore[reportMissingImports]
from t5x import checkpoints, state_utils, utils  # pyright: ignore[reportMissingImports]

from dst_optax.subset import Subset

RECORD = "initial_checkpoint.json"


def keep_model(checkpoint: Mapping[str, Any], wanted: Mapping[str, Any], *, is_resuming: bool = False) -> Any:
    """Of a checkpoint the whole model, and of the optimizer's state what both have.

    For ``RestoreCheckpointConfig.state_transformation_fns`` with ``fallback_to_scratch = True``, which
    alone would also make up parameters that a checkpoint lacks. What is left out of the optimizer's
    state starts anew; a run that resumes takes its own checkpoint as it is.

    Args:
      checkpoint: T5X's state dict of the checkpoint.
      wanted: T5X's state dict of the model and the optimizer.
      is_resuming: whether the checkpoint is of this very run.

    Returns:
      The part of the checkpoint to restore.

    Raises:
      ValueError: the checkpoint lacks parameters of the model.
    """
    if is_resuming:
        return checkpoint
    have = state_utils.flatten_state_dict(checkpoint)
    missing = [
        name
        for name in state_utils.flatten_state_dict(wanted)
        if name not in have and (name.startswith("target/") or name == "state/step")
    ]
    if missing:
        raise ValueError(
            f"the initial checkpoint lacks {len(missing)} of the parameters, {missing[0]!r} for one; it "
            f"has {', '.join(list(have)[:4])}, ... Give a checkpoint of this model."
        )
    return state_utils.intersect_state(checkpoint, wanted)


class InitialCheckpointManager(checkpoints.OrbaxCheckpointManagerInterface):
    """T5X's checkpoint manager, for a restore that starts the data anew.

    T5X looks for a position in the data wherever it will save one, and an initial checkpoint has none,
    or that of the pre-training.
    """

    def restore(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class."""
        writes, self._should_write_dataset_ckpt = self._should_write_dataset_ckpt, False
        try:
            return super().restore(*args, **kwargs)
        finally:
            self._should_write_dataset_ckpt = writes


class SubsetCheckpointManager(checkpoints.OrbaxCheckpointManagerInterface):
    """T5X's checkpoint manager that puts a subset onto the seed that it restores.

    Bind it as ``RestoreCheckpointConfig.checkpoint_manager_cls`` of ``evaluate`` or ``infer``.

    Args:
      subset: directory that :meth:`dst_optax.subset.Subset.save` or :mod:`t5x_integration.export` wrote.
    """

    def __init__(self, *args: Any, subset: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._subset = Subset.load(subset)

    def restore(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class; a checkpoint that is not the subset's seed is an error."""
        state = super().restore(*args, **kwargs)
        return state.replace_params(self._subset.apply(state.params))


@dataclass
class CheckpointConfig(utils.CheckpointConfig):
    """T5X's CheckpointConfig that claims the model directory for one initial checkpoint.

    T5X resumes from whatever it finds in the directory and then ignores the initial checkpoint.

    Attributes:
      model_dir: where the run saves its checkpoints.
    """

    model_dir: str = ""

    def __post_init__(self) -> None:
        if not self.model_dir:
            raise ValueError("CheckpointConfig.model_dir is not set; bind it to %MODEL_DIR.")
        claim(self.model_dir, self.restore.path if self.restore else None)
        if self.restore and self.save and not checkpoints.all_steps(self.model_dir):
            self.restore.checkpoint_manager_cls = InitialCheckpointManager
            self.save.checkpoint_manager_cls = InitialCheckpointManager


def claim(model_dir: str, initial_checkpoint: Any) -> None:
    """Writes down the initial checkpoint, or raises if the directory belongs to another one.

    Args:
      model_dir: local or ``gs://`` directory.
      initial_checkpoint: path, or None or empty for a run from scratch.

    Raises:
      ValueError: the directory holds a run from another checkpoint, or checkpoints without a record.
    """
    gfile = tf.io.gfile
    record = gfile.join(model_dir, RECORD)
    if gfile.exists(record):
        with gfile.GFile(record) as file:
            other = json.load(file)["initial_checkpoint"]
        if other != (initial_checkpoint or None):
            raise ValueError(
                f"{model_dir} holds a run from the checkpoint {other!r}, this one starts from "
                f"{initial_checkpoint!r}. Give another MODEL_DIR, or that INITIAL_CHECKPOINT_PATH to resume."
            )
        return
    if checkpoints.all_steps(model_dir):
        raise ValueError(
            f"{model_dir} holds checkpoints of a run that did not write {RECORD}; give another MODEL_DIR."
        )
    if jax.process_index() != 0:
        return
    gfile.makedirs(model_dir)
    with gfile.GFile(record + ".tmp", "w") as file:
        json.dump({"initial_checkpoint": initial_checkpoint or None}, file)
    gfile.rename(record + ".tmp", record, overwrite=True)
