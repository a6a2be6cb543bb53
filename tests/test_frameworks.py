"""Trainers and checkpoints of other libraries: budget and exactness hold in each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import dst_optax
from dst_optax import subset

FRACTION = 0.1


def check(seed, params, least=1):
    """Per tensor within the budget, by their bits; some entry moved."""
    moved = 0
    pairs = zip(jax.tree.leaves(seed), jax.tree.leaves(params), strict=True)
    for old, new in pairs:
        old, new = np.asarray(old), np.asarray(new)
        differ = int((oracle.bits(old) != oracle.bits(new)).sum())
        assert differ <= oracle.rank(FRACTION, old.size)
        moved += differ
    assert moved >= least


def batches(n=5):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(16, 8)), jnp.float32) for _ in range(n)]


def copied(tree):
    return jax.tree.map(np.array, tree)


def test_linen_train_state_with_donation():
    nn = pytest.importorskip("flax.linen", reason="needs flax")
    train_state = pytest.importorskip("flax.training.train_state", reason="needs flax")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.relu(nn.Dense(32)(x)))

    model = Model()
    params = model.init(jax.random.key(0), batches()[0])["params"]
    seed = copied(params)
    tx = dst_optax.wrap(optax.adamw(1e-2), FRACTION)
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def gradients(state, x):
        return jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, x) - 1.0) ** 2))(state.params)

    def exact(state, x):
        updates, opt_state = state.tx.update(gradients(state, x), state.opt_state, state.params)
        params = dst_optax.apply_updates(state.params, updates, opt_state)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    step = jax.jit(exact, donate_argnums=0)
    for x in batches():
        before = state
        state = step(state, x)
        check(seed, state.params)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert step._cache_size() <= 2  # the step counter of a new TrainState is a Python int

    plain = jax.jit(lambda s, x: s.apply_gradients(grads=gradients(s, x)), donate_argnums=0)
    for x in batches():
        state = plain(state, x)
        check(seed, dst_optax.finalize(state.params, state.opt_state))


def nnx_model(nnx, salt=0):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.l1 = nnx.Linear(8, 32, rngs=rngs)
            self.l2 = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.l2(nnx.relu(self.l1(x)))

    return Model(nnx.Rngs(salt))


def pure(nnx, tree):
    return (nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure)(tree)  # the name changed after flax 0.12.0


def parameters(nnx, model):
    return pure(nnx, nnx.state(model, nnx.Param))


def test_nnx_optimizer():
    nnx = pytest.importorskip("flax.nnx", reason="needs flax")
    model = nnx_model(nnx)
    seed = copied(parameters(nnx, model))
    rules = [("^l1/kernel$", FRACTION), ("^l1/bias$", FRACTION), ("^l2/", FRACTION)]
    tx = dst_optax.wrap(optax.adam(1e-2), rules)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    for x in batches():
        step(model, optimizer, x)
        params, opt_state = parameters(nnx, model), pure(nnx, optimizer.opt_state)
        final = dst_optax.finalize(params, opt_state)
        check(seed, final)
        mask = dst_optax.subset_mask(final, opt_state)
        jax.tree.map(lambda m, a, b: np.testing.assert_array_equal(m, a != b), mask, final, seed)
    nnx.update(model, final)
    check(seed, parameters(nnx, model))


def test_nnx_objects_are_taken_as_they_are():
    nnx = pytest.importorskip("flax.nnx", reason="needs flax")
    model = nnx_model(nnx)
    seed = copied(parameters(nnx, model))
    tx = dst_optax.wrap(optax.adam(1e-2), FRACTION)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for x in batches(2):
        optimizer.update(model, nnx.grad(lambda m, x=x: jnp.mean((m(x) - 1.0) ** 2))(model))
    final = dst_optax.finalize(model, optimizer.opt_state)
    assert isinstance(final, type(model))
    check(seed, parameters(nnx, final))
    mask = dst_optax.subset_mask(final, optimizer.opt_state)
    differs = jax.tree.map(lambda a, b: np.asarray(a != b), parameters(nnx, final), seed)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(mask), jax.tree.leaves(differs))
    found = subset.extract(final, optimizer.opt_state)
    size = dst_optax.diagnostics.metrics(optimizer.opt_state, final)["subset_size"]
    assert sum(len(found[path].positions) for path in found) == int(size) > 0
    assert sorted(found) == ["l1/bias", "l1/kernel", "l2/bias", "l2/kernel"]
    reseeded = dst_optax.reseed(optimizer.opt_state, final)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(dst_optax.finalize(final, reseeded)),
        jax.tree.leaves(final),
    )


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="needs equinox")
    model = eqx.nn.MLP(8, 4, 32, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    seed = copied(params)
    tx = dst_optax.wrap(optax.lion(1e-2), FRACTION)
    state = tx.init(params)

    @eqx.filter_jit
    def step(params, state, x):
        def loss(p):
            return jnp.mean((jax.vmap(eqx.combine(p, static))(x) - 1.0) ** 2)

        updates, state = tx.update(eqx.filter_grad(loss)(params), state, params)
        return dst_optax.apply_updates(params, updates, state), state

    for x in batches():
        params, state = step(params, state, x)
        check(seed, params)


@pytest.mark.parametrize("fraction", [FRACTION, [("b", 1.0), ("frozen", 0.0), (".*", FRACTION)]])
def test_orbax_restore_continues_bit_for_bit(tmp_path, fraction):
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    rng = np.random.default_rng(1)
    shapes = {"w": (20, 15), "b": (7,), "frozen": (6,), "half": (9, 9)}
    dtypes = {"half": jnp.bfloat16}

    def draw(rng):
        return {n: jnp.asarray(rng.normal(size=s), dtypes.get(n, jnp.float32)) for n, s in shapes.items()}

    params, all_grads = draw(rng), [draw(rng) for _ in range(6)]
    tx = dst_optax.wrap(optax.adamw(1e-2), fraction)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return dst_optax.apply_updates(params, updates, state), state

    for g in all_grads[:3]:
        params, state = step(params, state, g)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        shapes_of = jax.eval_shape(lambda p: {"params": p, "state": tx.init(p)}, params)
        restored = checkpointer.restore(tmp_path / "run", shapes_of)
    assert jax.tree.structure(restored["state"]) == jax.tree.structure(state)
    again, state_again = restored["params"], restored["state"]
    for g in all_grads[3:]:
        params, state = step(params, state, g)
        again, state_again = step(again, state_again, g)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((again, state_again)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_restored_state_of_another_plan_is_refused(tmp_path):
    """As many silos of the same leaves, but other ones: only the fingerprint tells."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    params = {n: jnp.ones((6, 4)) for n in "abc"}
    mine, other = (
        dst_optax.dynamic_subset_tuning(FRACTION, silos=dst_optax.silos.per_group(groups))
        for groups in ([("a|b", "x"), ("c", "y")], [("a", "x"), ("b|c", "y")])
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", mine.init(params))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "run", jax.eval_shape(mine.init, params))
    mine.update(params, state, params)
    with pytest.raises(ValueError, match="fingerprint"):
        other.update(params, state, params)


@pytest.mark.parametrize("accumulate", [None, 2])
def test_tunix_trainer(tmp_path, accumulate):
    """Trains, stops, restores into another random model, and ends as the run that never stopped."""
    peft_trainer = pytest.importorskip("tunix.sft.peft_trainer", reason="needs google-tunix")
    nnx = pytest.importorskip("flax.nnx", reason="needs flax")
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")

    def train(salt, directory, max_steps):
        model = nnx_model(nnx, salt)
        trainer = peft_trainer.PeftTrainer(
            model,
            dst_optax.wrap(optax.adam(1e-2), FRACTION, ties="fill"),
            peft_trainer.TrainingConfig(
                eval_every_n_steps=100,
                max_steps=max_steps,
                gradient_accumulation_steps=accumulate,
                checkpoint_root_directory=str(tmp_path / directory),
                checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
            ),
        )
        trainer = trainer.with_gen_model_input_fn(lambda x: {"x": x})
        trainer = trainer.with_loss_fn(lambda model, x: jnp.mean((model(x) - 1.0) ** 2))
        trainer.train(batches(12))
        params, state = parameters(nnx, model), pure(nnx, trainer.optimizer.opt_state)
        return dst_optax.finalize(params, state), dst_optax.transform.states(state)[0].seed

    seed = copied(parameters(nnx, nnx_model(nnx)))
    through, _ = train(0, "through", 6)
    check(seed, through, least=30)
    check(seed, train(0, "stopped", 3)[0])
    resumed, seed_again = train(1, "stopped", 6)
    jax.tree.map(np.testing.assert_array_equal, seed_again, seed)
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
