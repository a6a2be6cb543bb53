"""Directories that are whole or absent, and what a checkpoint refuses."""

import errno
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint")

from dst_optax.finetuning import storage


def checkpoints(tmp_path, seed="abc"):
    return storage.Checkpoints(tmp_path / "checkpoints", seed)


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    made = checkpoints(tmp_path)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        made.save(step, lambda path: (path / "x").write_text("x"), {"best_step": best})
    assert made.steps() == [3, 4]
    assert made.progress(4) == {"best_step": 3}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, number):
    made = checkpoints(tmp_path)
    made.save(1, lambda path: (path / "x").write_text("x"), {"best_step": 1})

    def fail(path):
        (path / "x").write_text("half")
        raise OSError(number, "full")

    with pytest.raises(ValueError, match=r"00000002: the disk is full .* earlier checkpoints are untouched"):
        made.save(2, fail, {"best_step": 2})
    assert made.steps() == [1]
    assert (made.path(1) / "x").read_text() == "x"
    assert [p.name for p in made.directory.iterdir()] == ["00000001"]


def test_a_full_disk_under_orbax(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as the disk does, writes begin to fail
    noise = np.random.default_rng(0).standard_normal(100_000)
    made = checkpoints(tmp_path)
    try:
        with pytest.raises(ValueError, match="the disk is full"):
            made.save(1, lambda p: storage.save_tree(p / "t", {"x": noise}), {"best_step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert made.steps() == []


def test_what_a_kill_left_is_cleared(tmp_path):
    left = tmp_path / "checkpoints" / ".tmp-00000005"
    left.mkdir(parents=True)
    (left / "x").write_text("half")
    assert checkpoints(tmp_path).steps() == []
    assert not left.exists()


def test_another_seed_is_refused_with_both_named(tmp_path):
    checkpoints(tmp_path, "aaa").save(1, lambda path: None, {"best_step": 1})
    with pytest.raises(ValueError, match=r"made from the seed model aaa, .* is bbb"):
        checkpoints(tmp_path, "bbb").progress(1)


def test_trees_come_back_with_types_dtypes_and_values(tmp_path):
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    tree = (optax.adamw(1e-3).init(params), {"n": jnp.uint32(7), "flag": jnp.bool_(True)})
    storage.save_tree(tmp_path / "t", tree)
    found = storage.load_tree(tmp_path / "t", jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_tree_without_arrays_comes_back(tmp_path):
    tree = optax.sgd(0.1).init({"w": jnp.zeros(3)})
    storage.save_tree(tmp_path / "t", tree)
    assert storage.load_tree(tmp_path / "t", tree) == tree


def test_a_damaged_tree_is_named(tmp_path):
    storage.save_tree(tmp_path / "t", {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match="cannot be read, or belongs to another model"):
        storage.load_tree(tmp_path / "t", {"a": jnp.zeros(3), "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match="cannot be read"):
        storage.load_tree(tmp_path / "absent", {"a": jnp.zeros(3)})


def test_models(tmp_path):
    model = {"l": {"k": np.arange(6, dtype=np.float32).reshape(2, 3).T, "s": np.float32([1])}}
    storage.save_model(tmp_path / "m", model)
    found = storage.load_model(tmp_path / "m", model)
    np.testing.assert_array_equal(found["l"]["k"], model["l"]["k"])
    with pytest.raises(ValueError, match="holds another model"):
        storage.load_model(tmp_path / "m", {"l": {"k": np.zeros((2, 3)), "s": np.zeros(1)}})
    with pytest.raises(ValueError, match=r"holds another model.*bfloat16\[1\]"):
        storage.load_model(tmp_path / "m", {"l": {**model["l"], "s": np.zeros(1, jnp.bfloat16)}})
    content = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(content[:-5])
    with pytest.raises(ValueError, match="truncated or damaged"):
        storage.load_model(tmp_path / "m", model)
    with pytest.raises(ValueError, match="does not exist"):
        storage.load_model(tmp_path / "n", model)


def test_fingerprints_tell_names_and_bits():
    x = np.arange(4, dtype=np.float32)
    prints = {
        storage.fingerprint({"a": x}),
        storage.fingerprint({"b": x}),
        storage.fingerprint({"a": x + np.float32(1e-7)}),
        storage.fingerprint({"a": x.reshape(2, 2)}),
    }
    assert len(prints) == 4
    assert storage.fingerprint({"a": jnp.asarray(x)}) == storage.fingerprint({"a": x})
