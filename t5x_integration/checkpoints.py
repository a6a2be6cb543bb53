"""Starting from a pre-trained checkpoint, and never from another one in the same directory."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from t5x import checkpoints, state_utils, utils  # pyright: ignore[reportMissingImports]

from dst_optax.paths import as_path, write_files
from dst_optax.subset import Subset

RECORD = "initial_checkpoint.json"
STEP = re.compile(r"checkpoint_(\d+)")
STATE = re.compile(r"state/(?:dst|param_states/.+?)(?=/captured$)")


def dst_states(names: Iterable[str]) -> list[str]:
    """Where the states of DST lie in a checkpoint, under the wrapper or in a chain.

    Args:
      names: T5X's names of a checkpoint's arrays.

    Returns:
      The names without what follows a state's own.

    Example:
      >>> dst_states(["state/step", "state/param_states/1/captured", "state/param_states/1/step"])
      ['state/param_states/1']
    """
    return [match[0] for name in names if (match := STATE.match(name))]


def keep_model(checkpoint: Mapping[str, Any], wanted: Mapping[str, Any], *, is_resuming: bool = False) -> Any:
    """Of a checkpoint the whole model, and of the optimizer's state what both have.

    For ``RestoreCheckpointConfig.state_transformation_fns`` with ``fallback_to_scratch = True``, which
    alone would also make up parameters that a checkpoint lacks. What is left out of the optimizer's
    state starts anew, and so does the state of DST: the seed is the model in the checkpoint, not what that
    was tuned from. A run that resumes takes its own checkpoint as it is.

    Args:
      checkpoint: T5X's state dict of the checkpoint.
      wanted: T5X's state dict of the model and the optimizer.
      is_resuming: whether the checkpoint is of this very run.

    Returns:
      The part of the checkpoint to restore.

    Raises:
      ValueError: the checkpoint lacks parameters of the model, or one to resume from was written by
        another optimizer, with DST or without.
    """
    have = state_utils.flatten_state_dict(checkpoint)
    names = state_utils.flatten_state_dict(wanted)
    if is_resuming:
        if dst_states(have) != dst_states(names):
            raise ValueError(
                f"the run in MODEL_DIR keeps the state of Dynamic Subset Tuning in {dst_states(have)}, the "
                f"optimizer of this command in {dst_states(names)}; resume with the gin files that the run "
                "was started with."
            )
        return checkpoint
    missing = [
        name for name in names if name not in have and (name.startswith("target/") or name == "state/step")
    ]
    if missing:
        raise ValueError(
            f"the initial checkpoint lacks {len(missing)} of the parameters, {missing[0]!r} for one; it "
            f"has {', '.join(list(have)[:4])}, ... Give a checkpoint of this model."
        )
    of_dst = tuple(f"{state}/" for state in (*dst_states(have), *dst_states(names)))
    rest = {name: x for name, x in names.items() if not name.startswith(of_dst)}
    return state_utils.intersect_state(checkpoint, rest)


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
        if path := kwargs.get("path"):
            check_is_checkpoint(path)
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
        saved = steps(self.model_dir)
        initial = self.restore.path if self.restore else None
        if not saved and initial:
            check_is_checkpoint(initial, self.restore.mode)  # pyright: ignore[reportOptionalMemberAccess]
        claim(self.model_dir, initial)
        if not saved and self.restore and self.save:
            self.restore.checkpoint_manager_cls = InitialCheckpointManager
            self.save.checkpoint_manager_cls = InitialCheckpointManager
        if saved and self.save and _is_orbax(as_path(self.model_dir) / f"checkpoint_{saved[-1]}"):
            # whatever dtype says, T5X saves with Orbax in the dtype of training; only restoring would round
            self.save.dtype = None


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of the checkpoints in a directory, ascending.

    Args:
      directory: local or ``gs://``; it need not exist.
    """
    matches = (STEP.fullmatch(path.name) for path in as_path(directory).glob("checkpoint_*"))
    return sorted(int(match[1]) for match in matches if match)


def check_is_checkpoint(path: str, mode: str = "specific") -> None:
    """Raises where T5X would find no checkpoint.

    Args:
      path: a directory ``checkpoint_<step>``, of Orbax or T5X's own format.
      mode: T5X's; "latest" for a directory of such.

    Raises:
      ValueError: names the path and what it lacks.
    """
    place = as_path(path)
    inside = steps(place)
    if mode != "specific":
        if inside:
            return
    elif STEP.fullmatch(place.name) and (_is_orbax(place) or (place / "checkpoint").is_file()):
        return
    where = place if inside or mode != "specific" else place.parent
    there = ", ".join(f"checkpoint_{step}" for step in steps(where)[-3:]) or "no checkpoint_<step>"
    what = "is no checkpoint" if mode == "specific" else "holds no checkpoint"
    raise ValueError(
        f"{path} {what} of T5X: a directory checkpoint_<step> with 'state' (Orbax) or 'checkpoint' (T5X's "
        f"own format). In {where} lies {there}."
    )


def _is_orbax(checkpoint: pathlib.Path) -> bool:
    return (checkpoint / "state").is_dir()


def claim(model_dir: str, initial_checkpoint: Any) -> None:
    """Writes down the initial checkpoint, or raises if the directory belongs to another one.

    A directory without checkpoints belongs to nobody yet.

    Args:
      model_dir: local or ``gs://`` directory.
      initial_checkpoint: path, or None or empty for a run from scratch.

    Raises:
      ValueError: the directory holds a run from another checkpoint, or checkpoints without a record.
    """
    record = as_path(model_dir) / RECORD
    initial = str(as_path(initial_checkpoint)) if initial_checkpoint else None
    if steps(model_dir):
        if not record.exists():
            raise ValueError(
                f"{model_dir} holds checkpoints of a run that did not write {RECORD}; give another MODEL_DIR."
            )
        other = json.loads(record.read_text())["initial_checkpoint"]
        if initial != (other and str(as_path(other))):
            raise ValueError(
                f"{model_dir} holds a run from the checkpoint {other!r}, this one starts from "
                f"{initial_checkpoint!r}. Give another MODEL_DIR, or that INITIAL_CHECKPOINT_PATH to resume."
            )
    elif jax.process_index() == 0:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_files(record.parent, {record.name: json.dumps({"initial_checkpoint": initial}).encode()})
