"""The store switches subsets bit for bit, in place, and stays whole when refused."""

import asyncio
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import bits
from precision import x64

from dst_optax import serving, subset
from dst_optax.subset import SubsetError

SHAPES = {"emb": (50, 8), "scalar": (), "empty": (0, 3), "deep/w": (3, 4, 5), "deep/b": (17,)}


def models(count, dtype=np.float32, share=0.2):
    rng = np.random.default_rng(0)

    def noise(shape):
        words = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), size=shape, dtype=np.uint64)
        return words.astype(f"u{np.dtype(dtype).itemsize}").view(dtype).reshape(shape)

    seed = {p: noise(s) for p, s in SHAPES.items()}
    tuned = [
        {p: np.where(rng.random(x.shape) < share, noise(x.shape), x).astype(dtype) for p, x in seed.items()}
        for _ in range(count)
    ]
    return seed, tuned


def same(a, b):
    return all((bits(np.asarray(a[p])) == bits(np.asarray(b[p]))).all() for p in b)


def filled(count=3, dtype=np.float32, **kwargs):
    seed, tuned = models(count, dtype)
    store = serving.SubsetStore({p: jnp.array(x) for p, x in seed.items()}, **kwargs)
    for i, t in enumerate(tuned):
        store.add(f"s{i}", subset.from_models(seed, t))
    return store, seed, tuned


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_switching_is_exact(dtype):
    store, seed, tuned = filled(dtype=dtype)
    assert store.active is None
    for name in [0, 1, 2, 2, 0, None, 1, None, None, 2, 1, 0] * 5:
        params = store.deactivate() if name is None else store.activate(f"s{name}")
        assert same(params, seed if name is None else tuned[name])
        assert store.active == (None if name is None else f"s{name}")
    store.activate("s1")
    store.unload("s1")
    assert same(store.params, seed)
    assert [x.name for x in store.list()] == ["s2", "s0"]


def test_a_thousand_cycles():
    store, seed, tuned = filled(2)
    for _ in range(1000):
        store.activate("s0")
        store.activate("s1")
        store.activate("s0")
        store.deactivate()
    assert same(store.params, seed)
    assert same(store.activate("s1"), tuned[1])


def test_switching_is_in_place_and_does_not_recompile():
    store, _, _ = filled(2)
    pointer = lambda: store.params["emb"].unsafe_buffer_pointer()  # noqa: E731
    store.activate("s0")
    before, compiled = pointer(), subset.scatter._scatter_donated._cache_size()
    for name in ("s1", "s0", "s1"):
        store.activate(name)
    assert pointer() == before
    assert subset.scatter._scatter_donated._cache_size() <= compiled + 4


def tied(x):
    """One buffer under several paths, as arrays and as what shares an array's buffer."""
    x = jnp.array(x)
    other = jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x.addressable_shards[0].data])
    return {"embed": x, "lm_head": x, "scales": [x, other]}


@pytest.mark.parametrize("touched", [["lm_head"], ["embed"], ["scales/1"], ["embed", "lm_head", "scales/0"]])
def test_leaves_of_one_buffer_are_switched_one_by_one(touched):
    x = np.arange(400, dtype=np.float32)
    names = ["embed", "lm_head", "scales/0", "scales/1"]
    seed = dict.fromkeys(names, x)
    tuned = {
        p: np.where(np.arange(400) % 7 == i, -x - 1, x) if p in touched else x for i, p in enumerate(names)
    }
    store = serving.SubsetStore(tied(x))
    store.add("a", subset.from_models(seed, tuned))
    for _ in range(3):
        assert same(subset.trees.named_leaves(store.activate("a")), tuned)
        assert same(subset.trees.named_leaves(store.deactivate()), seed)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint64])
def test_a_seed_that_jax_would_round_is_refused(dtype):
    seed = {"w": np.ones(3, np.float32), "n": np.arange(3, dtype=dtype)}
    with pytest.raises(SubsetError, match=f"'n' is {np.dtype(dtype)}, which jax would round"):
        serving.SubsetStore(seed)
    with x64():
        assert serving.SubsetStore(seed).params["n"].dtype == dtype


def test_only_what_differs_is_touched():
    seed = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    store = serving.SubsetStore(seed)
    store.add("x", subset.from_models(store.params, {"a": jnp.ones(3), "b": jnp.zeros(3)}))
    untouched = store.params["b"]
    assert store.activate("x")["b"] is untouched


def test_resident_bytes_are_bounded_and_counted():
    store, seed, tuned = filled(3)
    sizes = [x.nbytes for x in store.list()]
    assert store.list()[0].entries == sum((bits(seed[p]) != bits(tuned[0][p])).sum() for p in seed)
    store = serving.SubsetStore({p: jnp.array(x) for p, x in seed.items()}, max_bytes=sizes[0] + sizes[1] + 4)
    found = [subset.from_models(seed, t) for t in tuned]
    store.add("s0", found[0])
    store.add("s1", found[1])
    store.activate("s0")
    store.deactivate()
    store.add("s2", found[2])  # s1 was used least recently
    assert [x.name for x in store.list()] == ["s0", "s2"]
    store.activate("s0")
    store.add("s1", found[1])  # s0 is active and stays
    assert [(x.name, x.active) for x in store.list()] == [("s0", True), ("s1", False)]
    small = serving.SubsetStore({p: jnp.array(x) for p, x in seed.items()}, max_bytes=10)
    with pytest.raises(SubsetError, match="max_bytes is 10"):
        small.add("s0", found[0])


def test_padding_is_small():
    for count in [*range(1000), 10**5 + 1, 10**6 + 1]:
        assert count <= subset.scatter.padded(count) <= count * 1.125 + 15


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\0", "x" * 129, "a\n", 3])
def test_odd_names_are_refused(name, tmp_path):
    store, seed, _ = filled(1)
    with pytest.raises(SubsetError, match="is not allowed"):
        store.load(name, tmp_path)
    with pytest.raises(SubsetError, match="is loaded"):
        store.activate(name)
    assert same(store.params, seed)


def test_wrong_subsets_are_refused(tmp_path):
    store, seed, tuned = filled(2)
    other = {**seed, "emb": np.ones((50, 8), np.float32)}
    subset.from_models(other, tuned[0]).save(tmp_path)
    with pytest.raises(SubsetError, match="'emb' is not the seed's"):
        store.load("new", tmp_path)
    with pytest.raises(SubsetError, match="cannot be read"):
        store.load("new", tmp_path / "missing")
    with pytest.raises(SubsetError, match="'s0' is in use"):
        store.add("s0", subset.from_models(seed, tuned[0]))
    with pytest.raises(SubsetError, match="no subset 'new' is loaded"):
        store.unload("new")
    assert [x.name for x in store.list()] == ["s0", "s1"]
    subset.from_models(seed, tuned[0]).save(tmp_path)
    store.activate("s1")
    store.load("new", tmp_path)  # checked against the seed, whatever is active
    assert same(store.activate("new"), tuned[0])


def test_a_failed_switch_is_undone(monkeypatch):
    store, seed, tuned = filled(2)
    store.activate("s0")
    real, calls = subset.scatter.gather, []

    def failing(x, entries):
        calls.append(x)
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return real(x, entries)

    monkeypatch.setattr(subset.scatter, "gather", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        store.activate("s1")
    monkeypatch.undo()
    assert same(store.params, tuned[0] if store.active else seed)
    assert same(store.activate("s1"), tuned[1])


def test_threads_see_whole_models():
    store, seed, tuned = filled(3)
    wrong = []

    def serve(i):
        for _ in range(40):
            with store.use(f"s{i}" if i < 3 else None) as params:
                if not same(params, tuned[i] if i < 3 else seed):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("at", [1, 5])
def test_a_batch_that_fails_leaves_the_model_of_before(monkeypatch, at):
    store, _, tuned = filled(3)
    store.activate("s2")
    real, calls = jnp.copy, []

    def failing(x):
        calls.append(x)
        if len(calls) == at:
            raise RuntimeError("out of memory")
        return real(x)

    monkeypatch.setattr(jnp, "copy", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        store.stack(["s0", "s1"])
    monkeypatch.undo()
    assert store.active == "s2"
    assert same(store.params, tuned[2])


def test_what_uses_the_model_is_compiled_once():
    store, *_ = filled(1)
    f = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params))
    for name in (None, "s0", None):
        with store.use(name) as params:
            f(params)
    assert f._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_several_subsets_in_one_batch(dtype):
    store, seed, tuned = filled(3, dtype)
    store.activate("s2")
    params, axes = store.stack(["s0", "s1", "s0"])
    got = np.asarray(jax.vmap(lambda p: p["emb"], (axes,))(params))  # slices in jax round NaNs
    for i, expected in enumerate((tuned[0], tuned[1], tuned[0])):
        assert same({"emb": got[i]}, {"emb": expected["emb"]})
    assert axes["empty"] is None
    assert store.active == "s2"
    params, axes = store.stack([None, "s1", None])  # the seed in a mixed batch
    got = np.asarray(jax.vmap(lambda p: p["emb"], (axes,))(params))
    for i, expected in enumerate((seed, tuned[1], seed)):
        assert same({"emb": got[i]}, {"emb": expected["emb"]})
    params, axes = store.stack([None])
    assert set(axes.values()) == {None}
    with pytest.raises(SubsetError, match="would be shared"):
        store.stack(["s0"], "emb")
    for names in (["nope"], []):
        with pytest.raises(SubsetError):
            store.stack(names)


def test_a_block_that_uses_a_model_is_left_before_the_next():
    store, seed, tuned = filled(2)

    async def serve(name, index):
        with store.use(name) as params:
            await asyncio.sleep(0)
            return same(params, tuned[index])

    async def main():
        return await asyncio.gather(serve("s0", 0), serve("s1", 1), return_exceptions=True)

    first, second = asyncio.run(main())
    assert first is True
    assert isinstance(second, SubsetError)
    with store.use("s0") as params:
        with store.use("s0"):
            pass
        for switch in (store.deactivate, lambda: store.unload("s0"), lambda: store.stack(["s1"])):
            with pytest.raises(SubsetError, match="is not left yet"):
                switch()
        assert same(params, tuned[0])
    assert same(store.deactivate(), seed)
