"""Methods: nothing is tuned at the start, budgets are met, and what a checkpoint holds is all there is."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint")
nn = pytest.importorskip("flax.linen")

import dst_optax  # noqa: E402
from dst_optax.finetuning import storage  # noqa: E402
from dst_optax.finetuning.methods import lora  # noqa: E402
from dst_optax.finetuning.methods.dst import DST  # noqa: E402
from dst_optax.finetuning.methods.fixed_subset import FixedSubset  # noqa: E402
from dst_optax.finetuning.methods.full import Full  # noqa: E402
from dst_optax.finetuning.methods.lora import LoRA  # noqa: E402
from dst_optax.finetuning.methods.prompt import Prompt  # noqa: E402
from dst_optax.finetuning.methods.random_subset import RandomSubset  # noqa: E402
from dst_optax.finetuning.models import t5  # noqa: E402

MODEL = t5.T5Config(
    vocab_size=40,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    num_encoder_layers=2,
    num_decoder_layers=1,
    mlp_dim=12,
    dropout_rate=0.0,
)
ADAM = optax.adam(1e-2)
BUDGET = {"num_free_params": 100, "ties": "fill"}
METHODS = {
    "full": Full(ADAM),
    "dst": DST(ADAM, **BUDGET),
    "fixed": FixedSubset(ADAM, **BUDGET),
    "random": RandomSubset(ADAM, **BUDGET),
    "lora": LoRA(ADAM, num_free_params=100),
    "prompt": Prompt(ADAM, num_free_params=100),
}
INPUTS = np.array([[5, 6, 7, 1, 0], [9, 1, 0, 0, 0]])
TARGETS = np.array([[8, 3, 1], [4, 1, 0]])


@functools.cache
def seed_of(config=MODEL):
    tokens = jnp.ones((1, 1), jnp.int32)
    return jax.jit(t5.Transformer(config).init)(jax.random.key(1), tokens, tokens, tokens)["params"]


def small():
    """A tree with something for every method, quickly compiled."""
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    kernels = {"query": {"kernel": draw(8, 12)}, "key": {"kernel": draw(8, 8)}}
    return {"token_embedder": {"embedding": draw(40, 8)}, "layers_0": {"attention": kernels}}


def logits(params, config=MODEL):
    network = t5.Transformer(config)
    return network.apply({"params": params}, INPUTS, TARGETS, TARGETS, enable_dropout=False)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def differing(a, b):
    return sum(int(np.sum(np.asarray(x) != np.asarray(y))) for x, y in leaf_pairs(a, b))


def leaf_pairs(a, b):
    return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


@functools.cache
def trained_by(name):
    return Trained(METHODS[name])


class Trained:
    """A few steps of one method, with gradients that do not depend on it."""

    def __init__(self, method, steps=4):
        self.method, self.seed = method, small()
        self.frozen, self.tuned = method.split(self.seed, jax.random.key(0), t5.T5(MODEL))
        self.slots = method.init(self.seed, self.tuned)
        self.tunes, self.free = [self.tuned], []
        step = jax.jit(self._step)
        for i in range(steps):
            self.tuned, self.slots, free = step(self.tuned, self.slots, i)
            self.tunes.append(self.tuned)
            self.free.append(int(free))

    def _step(self, tuned, slots, i):
        key = jax.random.fold_in(jax.random.key(7), i)
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, x.size), x.shape), tuned)
        moved, after = self.method.update(grads, slots, tuned)
        found = self.method.metrics(moved, after, self.method.mark(tuned, slots))
        return moved, after, found["free_params"]


ENTIRELY_FREE = {
    "dst, all free": DST(ADAM, fraction_of_free_params=1.0),
    "dst, a tensor free": DST(ADAM, fraction_of_free_params=[("query", 1.0), ("key", 0.0), (".*", 0.1)]),
    "dst, more than all": DST(ADAM, num_free_params=10**6),
    "fixed, all free": FixedSubset(ADAM, fraction_of_free_params=1.0),
    "random, a tensor free": RandomSubset(ADAM, fraction_of_free_params=[("query", 1.0), (".*", 0.1)]),
}


@pytest.mark.parametrize("name", METHODS | ENTIRELY_FREE)
def test_what_is_saved_is_all_there_is(name, tmp_path):
    trained = Trained(ENTIRELY_FREE[name]) if name in ENTIRELY_FREE else trained_by(name)
    trained.method.save(tmp_path, trained.seed, trained.tuned, trained.slots)
    like, empty = trained.tunes[0], trained.method.init(trained.seed, trained.tunes[0])
    tuned, slots = trained.method.load(tmp_path, trained.seed, like, empty)
    for mine, restored in leaf_pairs((trained.tuned, trained.slots), (tuned, slots)):
        np.testing.assert_array_equal(mine, restored)


@pytest.mark.parametrize("method", [DST, FixedSubset, RandomSubset])
def test_a_budget_of_another_type_is_bad_input(method):
    with pytest.raises(ValueError, match="fraction_of_free_params: got True"):
        method(ADAM, fraction_of_free_params=True).init(small(), small())


@pytest.mark.parametrize("name", METHODS)
def test_free_parameters_are_counted_as_they_are(name):
    trained = trained_by(name)
    if name in ("dst", "fixed", "random"):
        assert trained.free[-1] == differing(trained.seed, trained.tuned) == 100
    else:
        assert trained.free[-1] == count(trained.tuned)
        assert differing(trained.tunes[0], trained.tuned) > 0.9 * trained.free[-1]


@pytest.mark.parametrize("scan", [False, True])
def test_lora_whose_product_is_zero_is_the_seed_bit_for_bit(scan):
    config = dataclasses.replace(MODEL, scan_layers=scan)
    seed, method = seed_of(config), LoRA(ADAM, rank=3)
    merged = method.merge(*method.split(seed, jax.random.key(0), t5.T5(MODEL)))
    assert jax.tree.structure(merged) == jax.tree.structure(seed)
    assert differing(merged, seed) == 0


def test_lora_of_stacked_layers_is_that_of_each_layer():
    config = dataclasses.replace(MODEL, scan_layers=True)
    seed, method = seed_of(config), LoRA(ADAM, rank=2, alpha=3.0)
    frozen, tuned = method.split(seed, jax.random.key(0), t5.T5(MODEL))
    tuned = jax.tree.map(lambda x: x + 0.1, tuned)
    path = "encoder/encoder/mlp/wo/kernel"
    a, b = np.asarray(tuned[path]["a"], np.float64), np.asarray(tuned[path]["b"], np.float64)
    w = seed["encoder"]["encoder"]["mlp"]["wo"]["kernel"]
    merged = method.merge(frozen, tuned)["encoder"]["encoder"]["mlp"]["wo"]["kernel"]
    for layer in range(2):
        want = w[:, layer] + 1.5 * a[:, layer] @ b[layer]
        np.testing.assert_allclose(merged[:, layer], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True])
def test_ranks_and_lengths_are_counts(rank):
    with pytest.raises(ValueError, match=r"LoRA: rank is"):
        LoRA(ADAM, rank=rank)
    with pytest.raises(ValueError, match=r"prompt: length is"):
        Prompt(ADAM, length=rank)


def test_an_empty_prompt_is_the_seed():
    seed = seed_of()
    merged = Prompt(ADAM).merge(seed, {"prompt": seed["token_embedder"]["embedding"][:0]})
    np.testing.assert_array_equal(logits(merged), logits(seed))


def test_a_prompt_of_embeddings_is_these_tokens_before_the_inputs():
    seed = seed_of()
    prompt = seed["token_embedder"]["embedding"][jnp.array([11, 12])]
    network = t5.Transformer(MODEL)
    longer = np.concatenate([np.tile([11, 12], (2, 1)), INPUTS], axis=1)
    want = network.apply({"params": seed}, longer, TARGETS, TARGETS, enable_dropout=False)
    prompted = {**seed, "prompt": prompt}
    np.testing.assert_allclose(logits(prompted), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        t5.decode(network, prompted, INPUTS, max_length=4), t5.decode(network, seed, longer, max_length=4)
    )
    with pytest.raises(ValueError, match="packed inputs"):
        network.apply({"params": prompted}, INPUTS, TARGETS, TARGETS, INPUTS > 0, enable_dropout=False)


def test_prompts_start_as_distinct_pieces_of_the_vocabulary():
    seed = seed_of()
    _, tuned = Prompt(ADAM, length=30).split(seed, jax.random.key(3), t5.T5(MODEL))
    table = {bytes(np.asarray(x)) for x in seed["token_embedder"]["embedding"][1:]}
    rows = {bytes(np.asarray(x)) for x in tuned["prompt"]}
    assert len(rows) == 30
    assert rows <= table


@pytest.mark.parametrize("budget", [*range(16, 60, 4), 97, 300, 1000, 12345])
def test_lora_ranks_leave_as_little_as_possible(budget):
    shapes = {"q/query/kernel": (8, 8), "m/wi_0/kernel": (8, 3, 4), "m/wo/kernel": (5, 9)}
    costs = {"q/query/kernel": 16, "m/wi_0/kernel": 36, "m/wo/kernel": 14}
    found = lora.ranks(shapes, budget)
    spent = sum(costs[path] * rank for path, rank in found.items())
    everywhere = budget // 66
    best = max(
        total
        for some in itertools.product((0, 1), repeat=3)
        if (total := sum((everywhere + x) * c for x, c in zip(some, costs.values(), strict=True))) <= budget
    )
    assert spent == best
    tuned = LoRA(ADAM, num_free_params=budget).split(
        {"q": {"query": {"kernel": jnp.ones((8, 8))}}}, jax.random.key(0), t5.T5(MODEL)
    )[1]
    assert count(tuned) == budget // 16 * 16


def test_budgets_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="smallest matrix takes 16 at rank 1"):
        LoRA(ADAM, num_free_params=15).split(seed_of(), jax.random.key(0), t5.T5(MODEL))
    with pytest.raises(ValueError, match="an embedding takes 8"):
        Prompt(ADAM, num_free_params=7).split(seed_of(), jax.random.key(0), t5.T5(MODEL))


def masks(trained):
    return [[np.asarray(x != s) for x, s in leaf_pairs(t, trained.seed)] for t in trained.tunes[1:]]


@pytest.mark.parametrize("name", ["fixed", "random"])
def test_a_fixed_subset_stays_and_moves_as_the_optimizer_says(name):
    trained, plain = trained_by(name), Trained(Full(optax.sgd(0.1)))
    first, *later = masks(trained)
    for mask in later:
        assert all((a == b).all() for a, b in zip(first, mask, strict=True))
    sgd = type(METHODS[name])(optax.sgd(0.1), **BUDGET)
    moved = Trained(sgd)
    for got, want, seed in zip(*map(jax.tree.leaves, (moved.tuned, plain.tuned, moved.seed)), strict=True):
        kept = np.asarray(got != seed)
        np.testing.assert_allclose(np.asarray(got)[kept], np.asarray(want)[kept], rtol=1e-6, atol=1e-7)


def test_a_fixed_subset_is_chosen_as_dst_chooses_it():
    fixed = Trained(FixedSubset(ADAM, **BUDGET, dynamic_steps=3))
    moving = trained_by("dst")
    for i, (a, b) in enumerate(zip(masks(fixed), masks(moving), strict=True)):
        assert all((x == y).all() for x, y in zip(a, b, strict=True)) == (i < 3)


def test_a_fixed_subset_waits_for_the_learning_rate():
    method = FixedSubset(optax.adam(optax.linear_schedule(0.0, 1e-2, 10)), **BUDGET)
    assert Trained(method).free == [0, 100, 100, 100]


def test_random_subsets_differ_by_their_seed_and_share_silos_alike():
    a, b = (masks(Trained(RandomSubset(ADAM, **BUDGET, subset_seed=s)))[-1] for s in (0, 1))
    assert [x.sum() for x in a] == [x.sum() for x in b]
    assert not all((x == y).all() for x, y in zip(a, b, strict=True))


def test_a_state_starts_from_the_seed_and_not_from_where_training_starts():
    seed = small()
    moved = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1.0), seed)
    state = METHODS["dst"].init(seed, moved)
    mask = dst_optax.subset_mask(moved, state)
    assert count(jax.tree.map(lambda x: x[x], mask)) == len(jax.tree.leaves(seed))


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_exports_hold_what_was_tuned(name, tmp_path):
    trained = trained_by(name)
    trained.method.export(tmp_path, trained.seed, trained.tuned, trained.slots, None)
    back = storage.load_model(tmp_path / f"{name}.safetensors", trained.tuned)
    assert differing(back, trained.tuned) == 0
