"""The contract as a table: every optimizer, kind of silo, fraction and dtype against numpy.

A new row joins by one line. Optimizers and dtypes meet in all pairs; silos, fractions and tie rules
take turns over them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from precision import x64

import dst_optax
from dst_optax import silos

EPS = 1e-4  # a smaller one overflows in float16
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, eps=EPS),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8, eps=EPS),
    "lion": lambda: optax.lion(1e-2),
    "sgd_momentum": lambda: optax.sgd(1e-1, momentum=0.9),
    "muon": lambda: optax.contrib.muon(1e-2, eps=EPS),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SHAPES = {
    "head/bias": (31,),
    "head/kernel": (24, 10),
    "one": (1,),
    "stack": (6, 3, 7),
}
EACH = {name: name for name in SHAPES}
SLICES = EACH | {"stack": ["stack[0]", "stack[1]", "stack[2]"]}
# the rule, and the silo of each tensor or of each slice along axis 1
SILOS = {
    "tensor": (silos.per_tensor(), EACH),
    "stacked": (silos.per_tensor(stacked=[("^stack$", 1)]), SLICES),
    "layer": (silos.per_layer("^(head)"), EACH | {n: n.split("/")[0] for n in SHAPES}),
    "group": (silos.per_group([("kernel$", "k"), ("", "x")]), {n: "kx"["kernel" not in n] for n in SHAPES}),
    "model": (silos.whole_model(), dict.fromkeys(SHAPES, "model")),
}
FRACTIONS = {
    "tenth": 0.1,
    "half": 0.5,
    "few": 1e-5,
    "none": 0.0,
    "all": 1.0,
    "schedule": optax.linear_schedule(0.5, 0.125, 3),
    "traced": jnp.float32(0.3),
}
TIES = ("strict", "fill", "strict")
STEPS = 3
PAIRS = list(itertools.product(OPTIMIZERS, DTYPES))
TURNS = zip(PAIRS, itertools.cycle(SILOS), itertools.cycle(FRACTIONS), itertools.cycle(TIES))
CASES = [(*pair, silo, fraction, ties) for pair, silo, fraction, ties in TURNS]


def draw(step, dtype, scale):
    rng = np.random.default_rng(step)
    return {n: jnp.asarray(scale * rng.normal(size=s), dtype) for n, s in SHAPES.items()}


def parts(tree, labels):
    """The entries of every silo, in path order."""
    found = {}
    for name, x in sorted(tree.items()):
        if isinstance(labels[name], str):
            found.setdefault(labels[name], []).append(np.asarray(x).reshape(-1))
        else:
            for i, label in enumerate(labels[name]):
                found.setdefault(label, []).append(np.asarray(x)[:, i].reshape(-1))
    return {label: np.concatenate(x) for label, x in found.items()}


def check_step(labels, fraction, ties, seed, before, u, after):
    """Every entry is the proposal or the seed, as sorting decides; the number of kept ones."""
    seed, before, u, after = (parts(tree, labels) for tree in (seed, before, u, after))
    free = 0
    for label, s in seed.items():
        delta, odd = oracle.distance_keys(s, before[label], u[label])
        m = oracle.rank(fraction, s.size)
        kept = oracle.keep(delta, m, ties)
        assert not odd.any()
        expected = np.where(kept, oracle.flush((before[label] + u[label]).astype(s.dtype)), s)
        np.testing.assert_array_equal(oracle.bits(after[label]), oracle.bits(expected), err_msg=label)
        free += kept.sum()
    return free


@pytest.mark.parametrize(("optimizer", "dtype", "silo", "fraction", "ties"), CASES)
def test_contract(optimizer, dtype, silo, fraction, ties):
    rule, labels = SILOS[silo]
    value = FRACTIONS[fraction]
    with x64(dtype == "float64"):
        inner = OPTIMIZERS[optimizer]()
        tx = dst_optax.dynamic_subset_tuning(value, silos=rule, ties=ties)

        @jax.jit
        def choose(u, state, params):
            updates, state = tx.update(u, state, params)
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, u)
            return dst_optax.apply_updates(params, updates, state), state

        params = seed = draw(0, dtype, 1)
        inner_state, state = jax.jit(inner.init)(params), jax.jit(tx.init)(params)
        propose = jax.jit(inner.update)
        for step in range(STEPS):
            before = params
            u, inner_state = propose(draw(step + 1, dtype, 0.1), inner_state, params)
            params, state = choose(u, state, params)
            now = float(str(value(step) if callable(value) else value))  # the shortest decimal
            free = check_step(labels, now, ties, seed, before, u, params)
            assert int(state.memory.diagnostics.num_free) == free
        assert choose._cache_size() == 1
