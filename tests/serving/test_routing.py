"""Positions of a checkpoint go where a model's own loader puts them; every other loader is refused.

The model is a small one that packs weights as engines do: one matrix for query, key and value, a slice for
each of several processes, replicated heads, a padded vocabulary. The oracle is its loader, run on the tuned
checkpoint.
"""

import ml_dtypes
import numpy as np
import pytest
from oracle import bits

torch = pytest.importorskip("torch")

from dst_optax import subset  # noqa: E402
from dst_optax.serving import in_place, routing  # noqa: E402
from dst_optax.serving.routing import RoutedStore  # noqa: E402
from dst_optax.subset import SubsetError  # noqa: E402

HEADS, HEAD, WIDTH, HIDDEN, VOCABULARY, PADDED = 4, 2, 6, 10, 13, 16
DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16}


def tensor(x, dtype=torch.float32):
    return torch.from_numpy(np.array(bits(x)).view(f"i{x.itemsize}")).view(dtype).reshape(x.shape)


class Packed(torch.nn.Module):
    """The part of a model that one of several processes holds."""

    def __init__(self, rank=0, world=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.world = rank, world
        shapes = {
            "embed": (PADDED // world, WIDTH),
            "qkv": ((HEADS // world + 2) * HEAD, WIDTH),  # one head of keys and values, on every process
            "gate_up": (2 * HIDDEN // world, WIDTH),
            "down": (WIDTH, HIDDEN // world),
            "turned": (WIDTH, 3),
            "norm": (WIDTH,),
        }
        for name, shape in shapes.items():
            self.register_parameter(
                name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            )
        self.head = self.embed

    def load_weights(self, weights):
        for name, x in weights:
            self.load(name.removesuffix(".weight"), x)

    def load(self, name, x):
        q, h, part = HEADS // self.world * HEAD, HIDDEN // self.world, self.rank
        if name == "embed":
            rows = PADDED // self.world
            x = x[rows * part : rows * (part + 1)]
            self.embed[: len(x)].data.copy_(x)
            self.embed[len(x) :].data.fill_(0)
        elif name == "turned":
            self.turned.data.copy_(x.t())
        elif name == "norm":
            self.norm.data.copy_(x)
        elif name in ("q", "k", "v"):
            start, rows = {"q": (0, q), "k": (q, HEAD), "v": (q + HEAD, HEAD)}[name]
            self.qkv.data.narrow(0, start, rows).copy_(x.narrow(0, q * part, q) if name == "q" else x)
        elif name in ("gate", "up"):
            self.gate_up.data[h * (name == "up") :][:h].copy_(x[h * part : h * (part + 1)])
        elif name == "down":
            self.down.data.copy_(x.narrow(1, h * part, h))


def checkpoint(rng, dtype=np.float32):
    shapes = {
        "embed": (VOCABULARY, WIDTH), "q": (HEADS * HEAD, WIDTH), "k": (HEAD, WIDTH), "v": (HEAD, WIDTH),
        "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN), "turned": (3, WIDTH),
        "norm": (WIDTH,),
    }  # fmt: skip
    words = f"u{np.dtype(dtype).itemsize}"
    return {
        f"{name}.weight": rng.integers(0, np.iinfo(words).max, shape, words, endpoint=True).view(dtype)
        for name, shape in shapes.items()
    }


def tuned_of(rng, seed, share=0.3):
    other = checkpoint(rng, seed["norm.weight"].dtype)
    return {p: np.where(rng.random(x.shape) < share, other[p], x) for p, x in seed.items()}


def loaded(tensors, rank=0, world=1, dtype=torch.float32):
    model = Packed(rank, world, dtype)
    model.load_weights((name, tensor(x, dtype)) for name, x in tensors.items())
    return model


def memory_of(model):
    return {
        n: x.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        for n, x in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_model_is_that_which_the_loader_makes(dtype, world):
    rng = np.random.default_rng(0)
    seed = checkpoint(rng, DTYPES[dtype])
    tuned = [tuned_of(rng, seed) for _ in range(3)]
    found = [subset.from_models(seed, t) for t in tuned]
    everywhere = []
    for rank in range(world):
        model = loaded(seed, rank, world, dtype)
        store = RoutedStore(model, seed)
        for i, s in enumerate(found):
            store.add(f"s{i}", s)
        for name in [0, 2, 1, None, 1, 0, None]:
            store.deactivate() if name is None else store.activate(f"s{name}")
            wanted = loaded(seed if name is None else tuned[name], rank, world, dtype)
            assert memory_of(model) == memory_of(wanted)
        everywhere.append(store.missed(found[0]))
    for name in seed:  # every entry has a place somewhere
        assert not np.all([m.get(name, np.zeros(1, bool)) for m in everywhere], axis=0).any()
    assert (world == 1) == (not any(everywhere))


def test_a_trace_changes_nothing_and_reads_no_values():
    rng = np.random.default_rng(0)
    model = loaded(checkpoint(rng))
    with torch.no_grad():
        model.embed[VOCABULARY:] = 7  # the loader would fill it with zeros
    before, pointers = memory_of(model), [x.data_ptr() for x in model.parameters()]
    routes = routing.trace(model, checkpoint(rng) | {"unknown": np.zeros((2, 3), np.float32)})
    assert memory_of(model) == before
    assert [x.data_ptr() for x in model.parameters()] == pointers
    assert routes["unknown"] == []
    assert len(routes["q.weight"]) == 1


def test_a_subset_is_checked_while_another_one_is_active():
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    a, b = tuned_of(rng, seed), tuned_of(rng, seed)
    store = RoutedStore(model := loaded(seed), seed)
    store.add("a", subset.from_models(seed, a))
    store.activate("a")
    store.add("b", subset.from_models(seed, b))
    store.activate("b")
    assert memory_of(model) == memory_of(loaded(b))


def test_an_engine_that_holds_other_values_is_refused():
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    model = loaded(seed)
    model.gate_up.data.copy_(model.gate_up.data.flip(0))  # packed in the same shape
    before = memory_of(model)
    store = RoutedStore(model, seed)
    with pytest.raises(
        SubsetError, match=r"'(gate|up).weight': at \d+ of \d+ positions the engine holds other values"
    ):
        store.add("x", subset.from_models(seed, tuned_of(rng, seed)))
    assert store.list() == []
    assert memory_of(model) == before


def test_wrong_subsets_are_refused():
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    store = RoutedStore(model := loaded(seed), seed)
    before = memory_of(model)
    other = seed | {"norm.weight": np.ones(WIDTH, np.float32)}
    halves = {p: np.zeros(x.shape, np.float16) for p, x in seed.items()}
    less = {p: x for p, x in seed.items() if p != "q.weight"}
    for message, base in [("is not the seed's", other), ("is float32", halves), ("the subset lacks", less)]:
        with pytest.raises(SubsetError, match=message):
            store.add("x", subset.from_models(base, base))
    assert memory_of(model) == before


@pytest.mark.parametrize("active", [True, False])
def test_weights_that_the_engine_loaded_again_are_noticed(active):
    """The seed would be served under the subset's name, or another seed with the subset's values in it."""
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    store = RoutedStore(model := loaded(seed), seed)
    store.add("x", subset.from_models(seed, tuned_of(rng, seed)))
    if active:
        store.activate("x")
    store.check("x")
    again = seed if active else tuned_of(rng, seed)
    model.load_weights((name, tensor(x)) for name, x in again.items())
    with pytest.raises(SubsetError, match=r"positions the engine holds other values than the"):
        store.check("x")


def test_a_buffer_that_the_loader_replaces_is_refused_and_given_back():
    model, seed = Packed(), checkpoint(np.random.default_rng(0))
    model.register_buffer("scale", torch.ones(3))
    before, load = model.scale, model.load_weights

    def replacing(weights):
        model.scale = torch.empty(3, device="meta")
        load(weights)

    model.load_weights = replacing
    with pytest.raises(SubsetError, match="replaces the tensors \\['scale'\\]"):
        RoutedStore(model, seed)
    assert model.scale is before


def test_the_copy_of_a_tied_tensor_that_the_loader_passes_over():
    class Tied(Packed):
        def load(self, name, x):
            if name != "head":
                super().load(name, x)

    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    seed["head.weight"] = seed["embed.weight"]
    tuned = tuned_of(rng, {name: x for name, x in seed.items() if name != "head.weight"})
    tuned["head.weight"] = tuned["embed.weight"]
    model = Tied()
    model.load_weights((name, tensor(x)) for name, x in seed.items())
    store = RoutedStore(model, seed)
    both = subset.from_models(seed, tuned)
    assert store.missed(both) == {}
    other = both.leaves | {"head.weight": both["head.weight"].take(slice(1))}
    assert set(store.missed(subset.Subset(other))) == {"head.weight"}
    store.add("x", both)
    store.activate("x")
    wanted = Tied()
    wanted.load_weights((name, tensor(x)) for name, x in tuned.items())
    assert memory_of(model) == memory_of(wanted)


def test_a_sibling_that_the_loader_passes_over_is_no_copy():
    class First(Packed):
        def load(self, name, x):
            if name != "expert.1":
                super().load(name.replace("expert.0", "embed"), x)

    seed = checkpoint(np.random.default_rng(0))
    embed = seed.pop("embed.weight")
    seed |= {"expert.0.weight": embed, "expert.1.weight": embed}
    tuned = seed | {name: embed + 1 for name in ("expert.0.weight", "expert.1.weight")}
    store = RoutedStore(First(), seed)
    assert set(store.missed(subset.from_models(seed, tuned))) == {"expert.1.weight"}


def test_weights_that_the_engine_replaced_are_left_alone():
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    store = RoutedStore(model := loaded(seed), seed)
    store.add("x", subset.from_models(seed, tuned_of(rng, seed)))
    model.down = torch.nn.Parameter(model.down.detach().clone(), requires_grad=False)
    before = memory_of(model)
    with pytest.raises(SubsetError, match=r"'down.weight' was moved or replaced"):
        store.activate("x")
    assert memory_of(model) == before


class Odd(Packed):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def load(self, name, x):
        if name == "norm":
            self.how(self, x)
        else:
            super().load(name, x)


ODD = {
    "computed": lambda m, x: m.norm.data.copy_(x + 1),
    "scaled in place": lambda m, x: m.norm.data.copy_(x.mul_(2)),
    "another dtype": lambda m, x: m.norm.data.copy_(x.to(torch.float64)),
    "added": lambda m, x: m.norm.data.add_(x),
    "values": lambda m, x: m.norm.data.fill_(x[0].item()),
    "filled": lambda m, x: m.norm.data.fill_(x[0]),
    "broadcast": lambda m, x: m.norm.data.copy_(x[:1]),
    "expanded": lambda m, x: m.norm.data.copy_(x[:1].expand(WIDTH)),
    "own copy": lambda m, x: m.norm.data.copy_(torch.empty(WIDTH).copy_(x)),
    "constant": lambda m, x: m.norm.data.copy_(torch.ones(WIDTH)),
    "indexed": lambda m, x: m.norm.data.index_copy_(0, torch.arange(WIDTH), x),
    "replaced": lambda m, x: setattr(m, "norm", torch.nn.Parameter(x, requires_grad=False)),
    "replaced attribute": lambda m, x: setattr(m, "norm_scale", x),
    "written through out": lambda m, x: torch.full((WIDTH,), 7.0, out=m.norm.data),
    "twice": lambda m, x: (m.norm.data.copy_(x), m.down.data[0, :WIDTH].copy_(x)),
}  # fmt: skip


@pytest.mark.parametrize("how", ODD)
def test_loaders_that_do_more_than_copy_are_refused(how):
    rng = np.random.default_rng(0)
    seed = checkpoint(rng)
    model = Odd(ODD[how])
    before, pointers = memory_of(model), [x.data_ptr() for x in model.parameters()]
    with pytest.raises(SubsetError, match=r"norm|down"):
        RoutedStore(model, seed)
    assert memory_of(model) == before
    assert [x.data_ptr() for x in model.parameters()] == pointers


def test_another_dtype_of_the_model_is_refused():
    seed = checkpoint(np.random.default_rng(0))
    with pytest.raises(
        SubsetError, match=r"is torch.float32 in the checkpoint and torch.bfloat16 in the model"
    ):
        RoutedStore(Packed(dtype=torch.bfloat16), seed)


def test_positions_through_any_view():
    rng = np.random.default_rng(3)
    whole = torch.arange(5 * 7 * 4).reshape(5, 7, 4)
    for view in (
        whole[1:4, 2:, 1:3],
        whole.permute(2, 0, 1)[1],
        whole[:, 3].t(),
        whole.reshape(35, 4)[::2, 1],
        whole,
    ):
        target = torch.zeros(2, *view.shape).transpose(1, -1).contiguous().transpose(1, -1)[1]
        route = routing.Route(target, view.storage_offset(), view.stride(), ({}, ""))
        positions = np.sort(rng.choice(whole.numel(), 60, replace=False))
        chosen, offsets = route.follow(positions)
        memory = in_place.memory(target)
        memory[torch.from_numpy(offsets)] = torch.ones(len(offsets), dtype=memory.dtype)
        assert set(positions[chosen]) == set(positions) & set(view.reshape(-1).tolist())
        assert set(view[target.view(memory.dtype) == 1].tolist()) == set(positions[chosen])
