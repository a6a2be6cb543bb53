"""A module's tensors are switched in place, bit for bit, and stay as they are when a subset is refused."""

import threading

import ml_dtypes
import numpy as np
import pytest
from oracle import bits

torch = pytest.importorskip("torch")

from dst_optax import subset  # noqa: E402
from dst_optax.serving import in_place  # noqa: E402
from dst_optax.serving.torch import SubsetStore  # noqa: E402
from dst_optax.subset import SubsetError  # noqa: E402

DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
DTYPES |= {torch.float64: np.float64, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
SHAPES = {"emb": (50, 8), "scalar": (), "empty": (0, 3), "deep.w": (3, 4, 5), "deep.b": (17,)}


def noise(rng, shape, dtype):
    words = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), size=shape, dtype=np.uint64)
    return words.astype(f"u{np.dtype(dtype).itemsize}").view(dtype).reshape(shape)


def arrays(count, dtype=np.float32, share=0.2):
    rng = np.random.default_rng(0)
    seed = {p: noise(rng, s, dtype) for p, s in SHAPES.items()}
    tuned = [
        {
            p: np.where(rng.random(x.shape) < share, noise(rng, x.shape, dtype), x).astype(dtype)
            for p, x in seed.items()
        }
        for _ in range(count)
    ]
    return seed, tuned


def tensor(x, dtype=torch.float32):
    return torch.from_numpy(np.array(bits(x)).view(f"i{x.itemsize}")).view(dtype).reshape(x.shape)


def module(seed, dtype=torch.float32):
    model = torch.nn.Module()
    model.deep = torch.nn.Module()
    for path, x in seed.items():
        owner = model.deep if path.startswith("deep.") else model
        owner.register_parameter(
            path.split(".")[-1], torch.nn.Parameter(tensor(x, dtype), requires_grad=False)
        )
    return model


def values(model):
    """The module's tensors as numpy arrays of bits, read without the store's own code."""
    return {
        p: x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy()
        for p, x in model.state_dict().items()
    }


def same(model, expected):
    found = values(model)
    return set(found) == set(expected) and all(found[p].tobytes() == x.tobytes() for p, x in expected.items())


def filled(count=3, dtype=torch.float32, **kwargs):
    seed, tuned = arrays(count, DTYPES[dtype])
    store = SubsetStore(module(seed, dtype), **kwargs)
    for i, t in enumerate(tuned):
        store.add(f"s{i}", subset.from_models(seed, t))
    return store, seed, tuned


@pytest.mark.parametrize("dtype", DTYPES)
def test_switching_is_exact(dtype):
    store, seed, tuned = filled(dtype=dtype)
    assert store.active is None
    pointers = [x.data_ptr() for x in store.deactivate().parameters()]
    for name in [0, 1, 2, 2, 0, None, 1, None, None, 2, 1, 0] * 5:
        model = store.deactivate() if name is None else store.activate(f"s{name}")
        assert same(model, seed if name is None else tuned[name])
        assert store.active == (None if name is None else f"s{name}")
    assert [x.data_ptr() for x in model.parameters()] == pointers
    store.activate("s1")
    store.unload("s1")
    assert same(model, seed)
    assert [(x.name, x.active) for x in store.list()] == [("s2", False), ("s0", False)]


def test_tensors_of_any_strides():
    rng = np.random.default_rng(1)
    seed = {"t": rng.random((6, 5), np.float32), "image": rng.random((2, 3, 4, 5), np.float32)}
    tuned = {p: np.where(rng.random(x.shape) < 0.5, x + 1, x) for p, x in seed.items()}
    model = torch.nn.Module()
    model.t = torch.nn.Parameter(torch.zeros(10, 12)[::2, ::2].T)
    model.image = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    with torch.no_grad():
        for name, x in model.named_parameters():
            assert not x.is_contiguous()
            x.copy_(torch.from_numpy(seed[name]))
    store = SubsetStore(model)
    store.add("x", subset.from_models(seed, tuned))
    assert same(store.activate("x"), tuned)
    assert same(store.deactivate(), seed)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.head(self.embed(x))


def changed(x, index, value):
    new = np.array(x)
    new.reshape(-1)[index] = value
    return new


@pytest.mark.parametrize("names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_weights_are_written_once(names):
    model = Tied()
    before = model.embed.weight.detach().numpy().copy()
    store = SubsetStore(model)
    tuned = changed(before, 5, 9.0)
    store.add("x", subset.from_models(dict.fromkeys(names, before), dict.fromkeys(names, tuned)))
    store.activate("x")
    assert model.head.weight.detach().numpy().tobytes() == tuned.tobytes()
    store.deactivate()
    assert model.embed.weight.detach().numpy().tobytes() == before.tobytes()


def test_tied_weights_with_two_values_are_refused():
    model = Tied()
    before = model.embed.weight.detach().numpy().copy()
    seed = {"embed.weight": before, "head.weight": before}
    store = SubsetStore(model)
    for tuned in ({"embed.weight": changed(before, 5, 9.0)}, {"head.weight": changed(before, 5, 9.0)}):
        with pytest.raises(SubsetError, match=r"'embed.weight' and 'head.weight' are one tensor"):
            store.add("x", subset.from_models(seed, seed | tuned))


def test_both_names_of_a_tied_tensor_must_be_of_this_seed():
    model = Tied()
    before = model.embed.weight.detach().numpy().copy()
    seed = {"embed.weight": before, "head.weight": before + 1}
    tuned = {name: changed(x, 5, 9.0) for name, x in seed.items()}
    with pytest.raises(SubsetError, match=r"head\.weight"):
        SubsetStore(model).add("x", subset.from_models(seed, tuned))


def test_buffers_of_the_checkpoint_may_be_in_a_subset():
    model = Tied()
    seed = {"embed.weight": model.embed.weight.detach().numpy(), "scale": np.ones(3, np.float32)}
    store = SubsetStore(model)
    store.add("x", subset.from_models(seed, seed | {"scale": np.array([1, 2, 1], np.float32)}))
    store.activate("x")
    assert model.scale.tolist() == [1, 2, 1]
    with pytest.raises(SubsetError, match="the model lacks 'cache'"):
        store.add(
            "y", subset.from_models(seed | {"cache": seed["scale"]}, seed | {"cache": seed["scale"] + 1})
        )


@pytest.mark.parametrize("where", ["whole", "inner"])
def test_compiled_modules_see_the_new_values(where):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False))
    seed = {"0.weight": model[0].weight.detach().numpy().copy()}
    tuned = {"0.weight": changed(seed["0.weight"], [1, 7], [2.0, 3.0])}
    if where == "whole":
        model = torch.compile(model, backend="aot_eager")
    else:
        model[0] = torch.compile(model[0], backend="aot_eager")
    x = torch.randn(2, 4)
    store = SubsetStore(model)
    store.add("x", subset.from_models(seed, tuned))
    for name, weights in [(None, seed), ("x", tuned), (None, seed)]:
        with store.use(name) as m:
            torch.testing.assert_close(m(x), x @ torch.from_numpy(weights["0.weight"]).T)


def test_autocast_does_not_keep_the_old_values():
    model = torch.nn.Linear(2, 1, bias=False)
    seed = {"weight": np.zeros((1, 2), np.float32)}
    model.weight.data.zero_()
    store = SubsetStore(model)
    store.add("x", subset.from_models(seed, {"weight": np.ones((1, 2), np.float32)}))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(2)).tolist() == [0]
        store.activate("x")
        assert model(torch.ones(2)).tolist() == [2]


def test_weights_made_in_inference_mode_are_switched():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 1, bias=False)
        model.weight.zero_()
    store = SubsetStore(model)
    store.add(
        "x",
        subset.from_models({"weight": np.zeros((1, 2), np.float32)}, {"weight": np.ones((1, 2), np.float32)}),
    )
    assert store.activate("x").weight.tolist() == [[1, 1]]


def test_wrong_subsets_are_refused(tmp_path):
    store, seed, tuned = filled(2)
    before = store.list()

    def refused(message, seed, tuned):
        subset.from_models(seed, tuned).save(tmp_path)
        with pytest.raises(SubsetError, match=message):
            store.load("new", tmp_path)

    refused("'emb' is not the seed's", seed | {"emb": np.ones((50, 8), np.float32)}, tuned[0])
    refused("the model lacks 'other'", seed | {"other": seed["emb"]}, tuned[0] | {"other": tuned[0]["emb"]})
    without = {p: x for p, x in seed.items() if p != "deep.b"}
    refused("the subset lacks 'deep.b'", without, {p: tuned[0][p] for p in without})
    half = {p: np.zeros(x.shape, np.float16) for p, x in seed.items()}
    refused(r"is float32.*float16", half, half)
    refused("'emb' is", seed | {"emb": seed["emb"].T}, tuned[0] | {"emb": tuned[0]["emb"].T})
    subset.from_models(seed, tuned[0]).save(tmp_path)
    (tmp_path / "subset.safetensors").write_bytes((tmp_path / "subset.safetensors").read_bytes()[:-1])
    with pytest.raises(SubsetError):
        store.load("new", tmp_path)
    with pytest.raises(SubsetError, match="'s0' is in use"):
        store.add("s0", subset.from_models(seed, tuned[0]))
    with pytest.raises(SubsetError, match="no subset 'new' is loaded"):
        store.activate("new")
    with pytest.raises(SubsetError, match="is not allowed"):
        store.load("../x", tmp_path)
    assert store.list() == before
    assert same(store.deactivate(), seed)
    store.activate("s1")
    subset.from_models(seed, tuned[0]).save(tmp_path)
    store.load("new", tmp_path)  # checked against the seed, whatever is active
    assert same(store.activate("new"), tuned[0])


def test_a_module_that_was_moved_is_left_alone():
    store, _, _ = filled(1)
    model = store.deactivate()
    model.double()
    before = values(model)
    with pytest.raises(SubsetError, match=r"'deep.b' was moved or converted"):
        store.activate("s0")
    assert all((values(model)[p] == x).all() for p, x in before.items())
    assert store.active is None


@pytest.mark.parametrize("active", [None, "s0"])
def test_a_module_that_others_wrote_to_is_left_alone(active):
    """A subset's values in the midst of another seed's would be a model that nobody made."""
    store, seed, tuned = filled(1)
    model = store.deactivate() if active is None else store.activate(active)
    model.load_state_dict({p: x + 1 for p, x in model.state_dict().items()})
    before = values(model)
    with pytest.raises(SubsetError, match="was written to by others"):
        store.activate("s0") if active is None else store.deactivate()
    with pytest.raises(SubsetError, match="was written to by others"):
        store.add("s1", subset.from_models(seed, tuned[0]))
    assert all((values(model)[p] == x).all() for p, x in before.items())


def test_only_one_store_may_write_to_a_module():
    store, seed, tuned = filled(2)
    other = SubsetStore(store.deactivate())
    other.add("s0", subset.from_models(seed, tuned[0]))
    other.activate("s0")
    with pytest.raises(SubsetError, match="was written to by others"):
        store.activate("s1")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_inside_data_parallel(compiled):
    seed, (tuned,) = arrays(1)
    parallel = torch.nn.DataParallel(inner := module(seed))
    store = SubsetStore(torch.compile(parallel) if compiled else parallel)
    store.add("s0", subset.from_models(seed, tuned))
    store.activate("s0")
    assert all((x == bits(tuned[p]).reshape(-1).view(np.uint8)).all() for p, x in values(inner).items())


def test_tensors_that_share_one_buffer_are_switched_one_by_one():
    buffer, model = torch.zeros(6, 4), torch.nn.Module()
    for name, x in zip("qk", buffer.chunk(2), strict=True):
        model.register_parameter(name, torch.nn.Parameter(x, requires_grad=False))
    seed = {name: np.zeros((3, 4), np.float32) for name in "qk"}
    store = SubsetStore(model)
    for name in "qk":
        store.add(name, subset.from_models(seed, seed | {name: np.ones((3, 4), np.float32)}))
    for name in "qkq":
        store.activate(name)
        assert [int(x.sum()) for x in (model.q, model.k)] == [12 * (name == "q"), 12 * (name == "k")]


def test_a_lazy_module_is_refused():
    with pytest.raises(SubsetError, match="'weight' has no shape yet"):
        SubsetStore(torch.nn.LazyLinear(3))


def test_the_seed_as_a_reference_within_a_block():
    store, _, _ = filled(2)
    with store.use("s0") as model:
        tuned_bits = values(model)
        with store.disable_adapter():
            assert store.active is None
        assert store.active == "s0"
        assert all((values(model)[p] == x).all() for p, x in tuned_bits.items())
        with pytest.raises(SubsetError, match="is not left yet"):
            store.activate("s1")


@pytest.mark.parametrize("after_writing", [False, True])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_a_failed_switch_is_undone(monkeypatch, after_writing, at):
    store, seed, tuned = filled(2)
    store.activate("s0")
    real, calls = in_place.scatter, []

    def failing(*args):
        calls.append(args)
        if after_writing or len(calls) != at:
            real(*args)
        if len(calls) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(in_place, "scatter", failing)
    with pytest.raises(KeyboardInterrupt):
        store.activate("s1")
    monkeypatch.undo()
    assert store.active == "s0"
    assert same(store.activate("s0"), tuned[0])
    assert same(store.deactivate(), seed)
    assert same(store.activate("s1"), tuned[1])
    assert same(store.deactivate(), seed)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.empty(2, 3, device="meta"), "meta device"),
        (torch.zeros(3, 1).expand(3, 4), "several entries in one place"),
        (torch.zeros(8).as_strided((3, 4), (2, 1)), "several entries in one place"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 2).to_sparse(), "only plain tensors"),
    ],
)
def test_tensors_that_cannot_be_switched_are_refused(x, message):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(x, requires_grad=False)
    with pytest.raises(SubsetError, match=message):
        SubsetStore(model)


def test_overlapping_tensors_are_refused():
    model = torch.nn.Module()
    whole = torch.zeros(6)
    model.whole, model.part = torch.nn.Parameter(whole), torch.nn.Parameter(whole[2:])
    with pytest.raises(SubsetError, match="'whole' and 'part' overlap"):
        SubsetStore(model)


def test_resident_bytes_are_bounded():
    store, seed, tuned = filled(3)
    sizes = [x.nbytes for x in store.list()]
    store = SubsetStore(module(seed), max_bytes=sizes[1] + sizes[2])
    for i in range(3):
        store.add(f"s{i}", subset.from_models(seed, tuned[i]))
    assert [x.name for x in store.list()] == ["s1", "s2"]
    with pytest.raises(SubsetError, match="max_bytes is 10"):
        SubsetStore(module(seed), max_bytes=10).add("s0", subset.from_models(seed, tuned[0]))


def test_threads_see_whole_models():
    store, seed, tuned = filled(3)
    wrong = []

    def serve(i):
        for _ in range(30):
            with store.use(f"s{i}" if i < 3 else None) as model:
                if not same(model, tuned[i] if i < 3 else seed):
                    wrong.append(i)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_pefts_verbs(tmp_path):
    store, seed, tuned = filled(2)
    subset.from_models(seed, tuned[1]).save(tmp_path)
    store.load_adapter(tmp_path, adapter_name="boolq")
    store.set_adapter("boolq")
    with store.disable_adapter() as model:
        assert same(model, seed)
    assert same(model, tuned[1])
    store.deactivate()
    with store.disable_adapter() as model:
        assert same(model, seed)
        store.set_adapter("boolq")
        assert same(model, tuned[1])
    assert same(model, seed)
    assert store.active is None


def test_a_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    from dst_optax.subset import models

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "seed")
    with torch.no_grad():
        for p in model.parameters():
            p += (torch.rand(p.shape) < 0.1) * torch.randn(p.shape).to(p.dtype)
    model.save_pretrained(tmp_path / "tuned")
    found = subset.from_models(models.open_model(tmp_path / "seed"), models.open_model(tmp_path / "tuned"))
    found.save(tmp_path / "subset")
    tokens, load = torch.arange(12)[None], transformers.LlamaForCausalLM.from_pretrained
    served = load(tmp_path / "seed", dtype=torch.bfloat16)
    before, expected = served(tokens).logits, load(tmp_path / "tuned", dtype=torch.bfloat16)(tokens).logits
    store = SubsetStore(served)
    store.load("x", tmp_path / "subset")
    with store.use("x") as m:
        assert torch.equal(m(tokens).logits, expected)
    with store.use(None) as m:
        assert torch.equal(m(tokens).logits, before)
    assert not torch.equal(before, expected)
