"""Checkpoints of T5X as subset files."""

import jax.numpy as jnp
import numpy as np
import pytest
from object_store import bucket  # noqa: F401

for needed in ("flax", "seqio", "tensorflow"):
    pytest.importorskip(needed)

from flax import serialization  # noqa: E402

from dst_optax.paths import as_path, write_files  # noqa: E402
from dst_optax.subset import Subset  # noqa: E402
from t5x_integration import export  # noqa: E402

SEED = {"a": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}}
TUNED = SEED["a"]["kernel"] + np.float32(0.5) * (np.arange(12).reshape(3, 4) == 5)


def save(directory, step, kernel, captured=True):
    """A checkpoint in T5X's format of arrays in one file."""
    dst = {"captured": np.array(captured), "seed": SEED, "step": np.int32(step)}
    state = {"step": np.int32(step), "param_states": {"a": {"kernel": {"v": np.zeros(3)}}}, "dst": dst}
    content = {"version": 3, "optimizer": {"target": {"a": {"kernel": kernel}}, "state": state}}
    place = as_path(directory) / f"checkpoint_{step}"
    place.mkdir(parents=True, exist_ok=True)
    write_files(place, {"checkpoint": serialization.msgpack_serialize(content)})
    return place


@pytest.fixture(params=["local", "store"])
def directory(request, tmp_path, bucket):  # noqa: F811
    return str(tmp_path) if request.param == "local" else bucket


def test_the_last_checkpoint_of_a_directory_is_exported(directory):
    save(f"{directory}/run", 9, SEED["a"]["kernel"])
    save(f"{directory}/run", 10, TUNED)
    export.export(f"{directory}/run", f"{directory}/subset")
    found = Subset.load(f"{directory}/subset")
    assert found["a/kernel"].positions.tolist() == [5]
    np.testing.assert_array_equal(found.apply(SEED)["a"]["kernel"], TUNED)


def test_parameters_in_fewer_bits_are_compared_with_the_seed_in_as_few(tmp_path):
    rounded = TUNED.astype(jnp.bfloat16)
    found = export.export(save(tmp_path, 10, rounded), tmp_path / "subset")
    want = SEED["a"]["kernel"].copy()
    want[1, 1] = rounded[1, 1]
    assert found["a/kernel"].positions.tolist() == [5]
    np.testing.assert_array_equal(found.apply(SEED)["a"]["kernel"], want)


def test_without_a_seed_one_is_asked_for(tmp_path):
    before = save(tmp_path / "pre", 9, SEED["a"]["kernel"], captured=False)
    run = save(tmp_path / "run", 10, TUNED, captured=False)
    with pytest.raises(ValueError, match="give the checkpoint that the run started from"):
        export.export(run, tmp_path / "subset")
    assert export.export(run, tmp_path / "subset", before).count == 1


def test_another_seed_than_the_runs_own_is_refused(tmp_path):
    run = save(tmp_path / "run", 10, TUNED)
    other = save(tmp_path / "other", 9, SEED["a"]["kernel"] + np.float32(1))
    with pytest.raises(ValueError, match="'a/kernel' is another one than in the seed that DST keeps"):
        export.export(run, tmp_path / "subset", other)
    assert not (tmp_path / "subset").exists()
    for dtype in (np.float32, jnp.bfloat16):  # T5X may have saved it in fewer bits
        same = save(tmp_path / f"pre_{np.dtype(dtype)}", 9, SEED["a"]["kernel"].astype(dtype))
        assert len(export.export(run, tmp_path / "subset", same)) == 1


def test_what_is_no_checkpoint_is_named(directory):
    with pytest.raises(ValueError, match=f"{directory}/nothing is no checkpoint of T5X"):
        export.export(f"{directory}/nothing", f"{directory}/subset")
    with pytest.raises(SystemExit, match="is no checkpoint of T5X"):
        export.main(f"{directory}/nothing", f"{directory}/subset")
