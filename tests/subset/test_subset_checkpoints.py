"""T5X and Orbax checkpoints as seeds: paths, dtypes, one tensor at a time, clear refusals."""

import json
import shutil
import time
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import serialization
from oracle import bits
from typer.testing import CliRunner

from dst_optax import subset
from dst_optax.subset import SubsetError, checkpoints, models
from dst_optax.subset_cli import app

ocp = pytest.importorskip("orbax.checkpoint")
ts = pytest.importorskip("tensorstore")
msgpack = pytest.importorskip("msgpack")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of orbax, where no OCDBT is used


def weights():
    rng = np.random.default_rng(0)
    shapes = {"encoder": {"mlp": {"wi": (40, 3, 8)}, "norm": (8,)}, "decoder": [(3, 5), ()], "half": (30, 7)}
    tree = jax.tree.map(
        lambda s: np.asarray(rng.normal(size=s).astype(np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return tree | {"half": tree["half"].astype(ml_dtypes.bfloat16)}


PATHS = ["decoder/0", "decoder/1", "encoder/mlp/wi", "encoder/norm", "half"]
REST = {"state": {"step": np.int32(7), "param_states": {"x": np.ones(3, np.float32), "y": None}}}


def write_orbax(path, params, key="target", ocdbt=True):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    ocp.Checkpointer(handler).save(path, args=ocp.args.PyTreeSave({key: params, **REST}))


def write_legacy(directory, params, as_uint16=False, placeholder=False):
    """As T5X did: small arrays within the msgpack file, for the others the specification of a zarr."""
    directory.mkdir(parents=True)

    def packed(x):
        content = (list(x.shape), x.dtype.name, x.tobytes())
        return msgpack.ExtType(1 if x.shape else 3, msgpack.packb(content))

    def leaf(key_path, x):
        if x.ndim < 2:
            return packed(x)
        if as_uint16 and x.dtype == ml_dtypes.bfloat16:
            x = x.view(np.uint16)
        where = f"target.{jax.tree_util.keystr(key_path, simple=True, separator='.')}"
        metadata = {"shape": x.shape, "chunks": [-(-d // 2) for d in x.shape], "compressor": {"id": "gzip"}}
        spec = {"driver": "zarr", "dtype": x.dtype.name, "metadata": metadata}
        file = {"driver": "file", "path": f"{directory / where}/"}
        ts.open(spec | {"kvstore": file}, create=True).result().write(x).result()
        if placeholder:
            return f"PLACEHOLDER://{where}"
        return spec | {"kvstore": {"driver": "gfile", "path": str(directory / where)}}  # where it was written

    tree = jax.tree_util.tree_map_with_path(leaf, params)
    if "decoder" in tree:  # msgpack of Flax has no lists
        tree["decoder"] = dict(zip("01", tree["decoder"], strict=True))
    state = {"step": packed(np.int32(7)), "param_states": {}}
    content = {"version": 3, "optimizer": {"target": tree, "state": state}}
    (directory / "checkpoint").write_bytes(msgpack.packb(content))


WRITERS = {
    "orbax": write_orbax,
    "orbax params": lambda p, x: write_orbax(p, x, "params"),
    "orbax without ocdbt": lambda p, x: write_orbax(p, x, ocdbt=False),
    "t5x": lambda p, x: write_orbax(p / "state", x),
    "t5x legacy": write_legacy,
    "t5x legacy of 2021": lambda p, x: write_legacy(p, x, as_uint16=True),
    "t5x legacy placeholders": lambda p, x: write_legacy(p, x, placeholder=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_checkpoints_are_models(tmp_path, kind):
    params = weights()
    WRITERS[kind](tmp_path / "first", params)
    found = models.open_model(shutil.move(tmp_path / "first", tmp_path / "moved"))
    assert sorted(found) == PATHS
    for path, x in zip(PATHS, jax.tree.leaves(params), strict=True):
        assert (found[path].shape, found[path].dtype) == (x.shape, x.dtype)
        assert (bits(np.asarray(found[path])) == bits(x)).all()


@pytest.mark.parametrize("kind", ["orbax", "t5x legacy"])
def test_the_command_line_takes_checkpoints(tmp_path, kind):
    seed = weights()
    rng = np.random.default_rng(1)
    tuned = jax.tree.map(lambda x: np.where(rng.random(x.shape) < 0.3, -x, x), seed)
    WRITERS[kind](tmp_path / "seed", seed)
    WRITERS[kind](tmp_path / "tuned", tuned)

    def call(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    seed_and_tuned = ("--seed", tmp_path / "seed", "--tuned", tmp_path / "tuned")
    made = call("extract", *seed_and_tuned, "--out", tmp_path / "subset")
    assert made["entries"] == subset.from_models(seed, tuned).count
    assert call("verify", tmp_path / "subset", "--seed", tmp_path / "seed")["tensors_compared"] == len(PATHS)
    call("apply", "--seed", tmp_path / "seed", "--subset", tmp_path / "subset", "--out", tmp_path / "out")
    written = safetensors.numpy.load_file(tmp_path / "out" / "params.safetensors")
    expected = dict(zip(PATHS, jax.tree.leaves(tuned), strict=True))
    assert sorted(written) == PATHS
    assert all((bits(x) == bits(expected[p])).all() for p, x in written.items())


HELD = 1 if jax.__version_info__ >= (0, 8) else 3  # jax 0.7 lets go of arrays that programs have read later


@pytest.mark.parametrize(("kind", "held"), [("orbax", 4), ("t5x legacy", HELD)])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, kind, held, monkeypatch):
    """But for those that Orbax's threads hold until their next work."""
    params = {f"w{i}": np.full((300, 200), i, np.float32) for i in range(12)}
    tuned = jax.tree.map(lambda x: x + 1, params)
    for name, tree in (("seed", params), ("tuned", tuned)):
        WRITERS[kind](tmp_path / name, tree)
    alive, most = [], []
    read = checkpoints.StoredArray.__array__

    def counted(self, dtype=None, copy=None):
        for _ in range(100):  # a thread that has just worked on an array lets go of it a moment later
            alive[:] = [r for r in alive if r() is not None]
            if len(alive) <= held:
                break
            time.sleep(0.01)
        most.append(len(alive))
        x = read(self, dtype)
        alive.append(weakref.ref(x))
        return x

    monkeypatch.setattr(checkpoints.StoredArray, "__array__", counted)
    seed = models.open_model(tmp_path / "seed")
    found = subset.from_models(seed, models.open_model(tmp_path / "tuned"), 0.01)
    found.save(tmp_path / "subset")
    models.apply_to_files(found, tmp_path / "seed", tmp_path / "out")
    assert len(most) == 5 * 12
    assert max(most) <= held


P = {"dense": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}}
ADAM = jax.tree.map(np.asarray, optax.adam(1e-3).init(P))
SGD = jax.tree.map(np.asarray, optax.sgd(1e-3, momentum=0.9).init(P))
STATS = {"mean": np.zeros(3, np.float32)}


def write_flax(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


@pytest.mark.parametrize("write", [lambda p, x: save_orbax(p, x), write_flax])
@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"params": P, "optimizer": ADAM, "step": 1}, ["dense/w"]),
        ({"params": P, "opt_state": SGD, "step": 1}, ["dense/w"]),
        ({"model": P, "optimizer": ADAM}, ["dense/w"]),
        ({"model": P, "opt_state": SGD, "step": 1}, ["dense/w"]),
        ({"target": P, "state": {"step": 1}}, ["dense/w"]),
        ({"online": P, "target": P}, ["online/dense/w", "target/dense/w"]),  # networks, not T5X's target
        ({"model": P, "lm_head": P}, ["lm_head/dense/w", "model/dense/w"]),  # modules
        (P, ["dense/w"]),
    ],
)
def test_the_parameters_are_told_from_what_training_keeps(tmp_path, write, tree, paths):
    write(tmp_path / "checkpoint", tree)
    found = models.open_model(tmp_path / "checkpoint")
    assert sorted(found) == paths
    assert all((np.asarray(x) == P["dense"]["w"]).all() for x in found.values())


@pytest.mark.parametrize("write", [lambda p, x: save_orbax(p, x), write_flax])
@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"optimizer": ADAM, "step": np.int32(1)}, "optimizer/"),
        ({"weights": P, "opt_state": SGD}, "opt_state/"),
        ({"state": {"params": P, "opt_state": ADAM}, "data": P}, "state/opt_state/"),
        ({"0": P, "1": {"mu": P, "nu": P}}, "1/mu/dense/w"),  # a pair of parameters and Adam's state
    ],
)
def test_an_optimizers_state_is_no_model(tmp_path, write, tree, named):
    write(tmp_path / "checkpoint", tree)
    with pytest.raises(SubsetError, match=named):
        models.open_model(tmp_path / "checkpoint")


def save_orbax(path, tree):
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(path, args=ocp.args.PyTreeSave(tree))


@pytest.mark.parametrize(
    ("variables", "tree"),
    [
        ({"params": P}, {"params": P}),
        ({"params": P, "batch_stats": STATS}, {"params": P, "batch_stats": STATS}),
        ({"params": P}, {"params": {"params": P}, "opt_state": ADAM, "step": np.int32(3)}),
        (P, {"params": {"params": P}, "opt_state": ADAM, "step": np.int32(3)}),
    ],
)
def test_a_subset_of_linens_variables_fits_its_own_seed(tmp_path, variables, tree):
    tuned = jax.tree.map(lambda x: x + 1, variables)
    found = subset.from_models(variables, tuned)
    save_orbax(tmp_path / "seed", tree)
    models.apply_to_files(found, tmp_path / "seed", tmp_path / "out")
    written = safetensors.numpy.load_file(tmp_path / "out" / "params.safetensors")
    expected = subset.trees.named_leaves(tuned)
    assert sorted(written) == sorted(expected)
    assert all((written[path] == x).all() for path, x in expected.items())


def test_flax_variables_have_their_own_paths(tmp_path):
    boxed = {"dense": {"w": {"value": P["dense"]["w"]}, "value": {"kernel": {"value": STATS["mean"]}}}}
    save_orbax(tmp_path / "nnx", boxed)
    assert sorted(models.open_model(tmp_path / "nnx")) == ["dense/value/kernel", "dense/w"]
    plain = {"dense": {"value": STATS["mean"], "w": P["dense"]["w"]}}  # a leaf that is called so
    save_orbax(tmp_path / "linen", plain)
    assert sorted(models.open_model(tmp_path / "linen")) == ["dense/value", "dense/w"]
    save_orbax(tmp_path / "alone", {"dense": {"value": STATS["mean"]}})
    for names, found in ((None, "dense"), (["dense/value"], "dense/value")):
        ((name, x),) = models.open_model(tmp_path / "alone", names).items()
        assert name == found
        assert (np.asarray(x) == STATS["mean"]).all()


def test_a_step_of_a_checkpoint_manager_is_a_model(tmp_path):
    with ocp.CheckpointManager(tmp_path / "default") as manager:
        manager.save(3, args=ocp.args.StandardSave(P))
        manager.save(4, args=ocp.args.StandardSave(P))
    with ocp.CheckpointManager(tmp_path / "items") as manager:
        items = {"weights": ocp.args.StandardSave(P), "opt_state": ocp.args.StandardSave(SGD[0]._asdict())}
        manager.save(3, args=ocp.args.Composite(**items))
        manager.save(4, args=ocp.args.Composite(**items, ema=ocp.args.StandardSave(P)))
    for where in ("default/3", "default/3/default", "items/3", "items/3/weights"):
        assert sorted(models.open_model(tmp_path / where)) == ["dense/w"]
    with pytest.raises(SubsetError, match="holds the checkpoints 3, 4; name one"):
        models.open_model(tmp_path / "default")
    with pytest.raises(SubsetError, match="several trees, ema, weights; name one"):
        models.open_model(tmp_path / "items" / "4")


def test_arrays_that_flax_cut_in_chunks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    x = np.arange(300, dtype=np.float32).reshape(3, 100)
    write_flax(tmp_path / "flax_model.msgpack", {"dense": {"w": x, "b": jnp.ones(3)}})
    assert b"__msgpack_chunked_array__" in (tmp_path / "flax_model.msgpack").read_bytes()
    found = models.open_model(tmp_path / "flax_model.msgpack")
    assert sorted(found) == ["dense/b", "dense/w"]
    assert (np.asarray(found["dense/w"]) == x).all()


def test_damaged_checkpoints_are_refused(tmp_path):
    write_legacy(tmp_path / "legacy", weights())
    write_orbax(tmp_path / "orbax", weights())
    content = (tmp_path / "legacy" / "checkpoint").read_bytes()
    for wrong in (content[:-20], b"", b"\xff" * 20, content.replace(b"float32", b"float99")):
        (tmp_path / "legacy" / "checkpoint").write_bytes(wrong)
        with pytest.raises(SubsetError, match="checkpoint"):
            models.open_model(tmp_path / "legacy")
    (tmp_path / "legacy" / "checkpoint").write_bytes(content)
    shutil.rmtree(tmp_path / "legacy" / "target.half")
    with pytest.raises(SubsetError, match="half cannot be read from"):
        models.open_model(tmp_path / "legacy")
    opened = models.open_model(tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "d")
    shutil.rmtree(tmp_path / "orbax" / "ocdbt.process_0")
    with pytest.raises(SubsetError, match="orbax: half cannot be read"):
        np.asarray(opened["half"])
    (tmp_path / "orbax" / "_METADATA").write_text("{")
    with pytest.raises(SubsetError, match="orbax cannot be read"):
        models.open_model(tmp_path / "orbax")
    with pytest.raises(SubsetError, match="no safetensors"):
        models.open_model(tmp_path / "missing")
