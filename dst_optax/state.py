"""What is remembered between steps, and how it is found again in any optimizer's state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from dst_optax.silos import SiloPlan
from dst_optax.tree import is_masked, map_named, named_leaves, paths


class Diagnostics(NamedTuple):
    """Numbers about the last step; counts above 2**24 are rounded."""

    num_free: jax.Array  # (), float32: entries chosen
    budget: jax.Array  # (), float32: entries that could be chosen
    num_nonfinite: jax.Array  # (), float32: entries kept because they are NaN or infinite
    passes: jax.Array  # (), int32: counting passes


class Memory(NamedTuple):
    """What a step passes on: its thresholds tell the next search where to begin."""

    threshold: jax.Array  # (silos,), float32; 0 where all or none of the silo is free
    threshold_delta: jax.Array  # (silos,), float32: its change in the last step
    diagnostics: Diagnostics


class DynamicSubsetTuningState(NamedTuple):
    """State of :func:`dst_optax.dynamic_subset_tuning`."""

    seed: Any  # like params, their dtypes; Free or Frozen where a leaf is so at every step
    mask: Any  # like seed, bool: entries that may differ from it; () where a trainer sets parameters
    captured: jax.Array  # (), bool: False until the first update; the seed is a placeholder until then
    step: jax.Array  # (), int32: updates so far
    fingerprint: jax.Array  # (), uint32: of the plan
    memory: Memory


class Free(optax.MaskedNode):
    """In place of a seed: every entry of the leaf is free at every step."""


class Frozen(optax.MaskedNode):
    """In place of a seed: no entry of the leaf ever moves."""


class LeafState(NamedTuple):
    """What the state knows of one leaf."""

    seed: Any  # an array, Free or Frozen
    mask: Any  # bool; None where the state has no masks
    captured: jax.Array  # (), bool


def init(plan: SiloPlan, params: Any, *, with_mask: bool = True) -> DynamicSubsetTuningState:
    """The state before the first step: a copy of the parameters stands where the seed will.

    Args:
      plan: the silos.
      params: pytree of arrays.
      with_mask: whether to keep masks; a trainer that sets parameters itself needs none.

    Returns:
      The state.
    """
    leaves, treedef = jax.tree.flatten(params)
    ranked = set(plan.ranked)

    def arrange(make: Callable[[Any], jax.Array]) -> Any:
        return treedef.unflatten(
            make(x) if i in ranked else Free() if plan.is_free(leaf) else Frozen()
            for i, (x, leaf) in enumerate(zip(leaves, plan.leaves, strict=True))
        )

    return DynamicSubsetTuningState(
        seed=arrange(copy),
        mask=arrange(_nowhere) if with_mask else (),
        captured=jnp.zeros((), bool),
        step=jnp.zeros((), jnp.int32),
        fingerprint=jnp.uint32(plan.fingerprint),
        memory=new_memory(len(plan.sizes)),
    )


def new_memory(num_silos: int) -> Memory:
    """The memory before the first step."""
    return Memory(
        threshold=jnp.zeros(num_silos, jnp.float32),
        threshold_delta=jnp.zeros(num_silos, jnp.float32),
        diagnostics=Diagnostics(
            num_free=jnp.zeros((), jnp.float32),
            budget=jnp.zeros((), jnp.float32),
            num_nonfinite=jnp.zeros((), jnp.float32),
            passes=jnp.zeros((), jnp.int32),
        ),
    )


def copy(x: Any) -> jax.Array:
    """A copy; zeros for a ``jax.ShapeDtypeStruct``, of which states are made to restore into."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype)
    return jnp.array(x, copy=True)


def _nowhere(x: Any) -> jax.Array:
    """False for every entry, as nothing is NaN and infinite.

    Computed from ``x`` to be sharded as it is; a constant would lie on every device (test_sharding.py).
    """
    x = copy(x) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    return jnp.isnan(x) & jnp.isinf(x)


def capture(state: DynamicSubsetTuningState, params: list[jax.Array]) -> DynamicSubsetTuningState:
    """The state with a seed: its own once it is captured, before that the parameters.

    Args:
      state: the state.
      params: the leaves that compete, like those of ``state.seed``.

    Returns:
      The state, captured.
    """
    seeds, treedef = jax.tree.flatten(state.seed)
    if seeds:
        params = [jnp.asarray(p) for p in params]
        seeds = _either(
            state.captured, [_placed_like(s, p) for s, p in zip(seeds, params, strict=True)], params
        )
    return state._replace(seed=treedef.unflatten(seeds), captured=jnp.ones((), bool))


@jax.custom_jvp
def _either(first: jax.Array, a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    """``a`` if ``first``, else ``b``.

    By a loop that runs once or never: a select would read and write the whole seed at every step, which takes
    1.15 times as long as a pass over parameters and seed.
    """
    return lax.while_loop(lambda carry: ~carry[0], lambda carry: (jnp.ones_like(first), b), (first, a))[1]


@_either.defjvp
def _(primals: Any, tangents: Any) -> Any:
    first, (_, a, b) = primals[0], tangents
    return _either(*primals), [jnp.where(first, x, y) for x, y in zip(a, b, strict=True)]


def _placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """``x`` split as ``like`` is on their mesh of explicit axes: parameters may move after ``init``."""
    now, wanted = (jax.typeof(each).sharding for each in (x, like))
    return jax.sharding.reshard(x, wanted) if now.mesh == wanted.mesh and now != wanted else x


def reseed(state: DynamicSubsetTuningState, params: Any) -> DynamicSubsetTuningState:
    """The state with a copy of ``params`` as its seed; every entry is tuned, and thresholds are forgotten."""
    by_path = dict(named_leaves(params))

    def renew(path: str, old: Any) -> jax.Array:
        new = by_path.get(path)
        if new is None:
            raise ValueError(f"reseed: the parameters lack {path!r}; pass the whole seed model.")
        _check_like(path, new, "the seed before", old)
        return copy(new)

    has_mask = bool(jax.tree.leaves(state.mask))
    return state._replace(
        seed=map_named(renew, state.seed),
        mask=jax.tree.map(lambda x: ~_nowhere(x), state.seed) if has_mask else state.mask,
        captured=jax.tree.map(jnp.ones_like, state.captured),  # may be a flax variable
        memory=state.memory._replace(
            threshold=jax.tree.map(jnp.zeros_like, state.memory.threshold),
            threshold_delta=jax.tree.map(jnp.zeros_like, state.memory.threshold_delta),
        ),
    )


def is_state(x: Any) -> bool:
    """Whether ``x`` is a DST state."""
    return isinstance(x, DynamicSubsetTuningState)


def states(state: Any) -> list[DynamicSubsetTuningState]:
    """All DST states in a pytree.

    Args:
      state: any optimizer state, that of ``nnx.Optimizer`` included.

    Returns:
      The states; flax variables around their arrays are taken off.

    Raises:
      ValueError: there is none.
    """
    dst_states = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if not dst_states:
        raise ValueError(
            f"no DynamicSubsetTuningState in the state of type {type(state).__name__}; pass the optimizer "
            "state that tx.update returned."
        )
    return [_bare(x) for x in dst_states]


def _bare(state: DynamicSubsetTuningState) -> DynamicSubsetTuningState:
    def bare(x: Any) -> Any:
        (array,) = jax.tree.leaves(x)
        return array

    memory = state.memory
    diagnostics = Diagnostics(*map(bare, memory.diagnostics))
    return state._replace(
        captured=bare(state.captured),
        step=bare(state.step),
        fingerprint=bare(state.fingerprint),
        memory=Memory(bare(memory.threshold), bare(memory.threshold_delta), diagnostics),
    )


def map_states(change: Callable[[DynamicSubsetTuningState], Any], state: Any) -> Any:
    """The pytree with each of its DST states changed."""
    return jax.tree.map(lambda x: change(x) if is_state(x) else x, state, is_leaf=is_state)


def leaf_states(state: Any) -> dict[str, LeafState]:
    """What the DST states in a pytree know of each leaf, by path.

    Raises:
      ValueError: two states know of one leaf, or a state is that of several models.
    """
    by_path: dict[str, LeafState] = {}
    for dst in states(state):
        if jnp.ndim(dst.captured):
            raise ValueError(
                f"the state is one of {dst.captured.shape[0]} models, as vmap makes it: call this inside the "
                "vmap, or take one of them, jax.tree.map(lambda x: x[0], (params, state))."
            )
        masks = dict(named_leaves(dst.mask))
        for path, seed in named_leaves(dst.seed):
            if is_masked(seed) and not isinstance(seed, Free | Frozen):
                continue
            if path in by_path:
                raise ValueError(
                    f"two DST states hold the parameter {path!r}; their leaves must be disjoint."
                )
            by_path[path] = LeafState(seed, masks.get(path), dst.captured)
    return by_path


def map_leaf_states(change: Callable[[str, Any, LeafState | None], Any], params: Any, state: Any) -> Any:
    """Maps ``change(path, leaf, leaf_state)`` over parameters; the state of an unknown leaf is None.

    Raises:
      ValueError: a parameter is missing, or not of its seed's shape and dtype.
    """
    by_path = _leaf_states_of(params, state)

    def visit(path: str, p: Any) -> Any:
        leaf = by_path.get(path)
        if leaf is not None and not is_masked(leaf.seed):
            _check_like(path, p, "its seed", leaf.seed)
        return change(path, p, leaf)

    return map_named(visit, params)


def seed_leaves(params: Any, state: Any) -> list[tuple[str, Any]]:
    """The seed of every leaf of ``params``, in order, with its path; a frozen leaf is its own seed.

    Args:
      params: current parameters.
      state: any optimizer state that holds DST states.

    Returns:
      Pairs of path and seed; None where none is kept, as for a leaf that is free at every step.

    Raises:
      ValueError: a parameter is missing, or the seed is not captured yet.
    """
    by_path = _leaf_states_of(params, state)
    for leaf in by_path.values():
        if not bool(leaf.captured):
            raise ValueError(
                "the seed is not captured yet: take a training step first, or call dst_optax.reseed(state, "
                "params) with the seed model."
            )

    def seed(path: str, p: Any) -> Any:
        leaf = by_path.get(path)
        if leaf is None or isinstance(leaf.seed, Free):
            return None
        return p if isinstance(leaf.seed, Frozen) else leaf.seed

    return [(path, seed(path, p)) for path, p in named_leaves(params, is_leaf=lambda x: False)]


def _leaf_states_of(params: Any, state: Any) -> dict[str, LeafState]:
    by_path = leaf_states(state)
    missing = sorted(set(by_path) - set(paths(params)))
    if missing:
        raise ValueError(
            f"the state knows of {missing[0]!r}, which the parameters lack; pass the parameters "
            "that the state was made for."
        )
    return by_path


def check_structure(plan: SiloPlan, updates: Any, state: DynamicSubsetTuningState, params: Any) -> None:
    """Raises if updates, state and params are not of one model."""
    # it is a state of ours
    if not is_state(state):
        raise ValueError(
            f"the state is {type(state).__name__}, not a DynamicSubsetTuningState: restore a checkpoint "
            "against jax.eval_shape(tx.init, params). One that dst-optax 0.1 wrote holds other fields; "
            "extract its subset with 0.1, apply that to the seed, and start from there with dst_optax.reseed."
        )
    # updates and seeds are those of the parameters, in path and shape
    given = dict(named_leaves(params, is_leaf=lambda x: False))
    for name, tree in (("updates", updates), ("the seed in the state", state.seed)):
        for path, leaf in named_leaves(tree, is_leaf=lambda x: False):
            if path not in given:
                raise ValueError(
                    f"{name} has a leaf {path!r} that params lacks; was tx.init called with these parameters?"
                )
            if jnp.shape(leaf) != jnp.shape(given[path]):
                raise ValueError(
                    f"parameter {path!r} has the shape {jnp.shape(given[path])}, but {name} has "
                    f"{jnp.shape(leaf)} there; call tx.init again for a changed model."
                )
    named_updates = paths(updates)
    if len(named_updates) != len(given):
        lost = next(path for path in given if path not in named_updates)
        raise ValueError(f"updates lacks the parameter {lost!r}; pass an update for every parameter.")
    if named_updates != list(given):
        raise ValueError(
            f"updates are in the order {named_updates[:4]}, params in the order {list(given)[:4]}: make both "
            "of the same containers."
        )
    ranked = [plan.leaves[i].path for i in plan.ranked]
    for path, u in named_leaves(updates, is_leaf=lambda x: False):
        dtype = jnp.result_type(u)
        if not jnp.issubdtype(dtype, jnp.floating) or (dtype.itemsize == 1 and path in ranked):
            raise TypeError(
                f"the update of {path!r} has the dtype {dtype}; it must be a float of 16 bits or more."
            )
    # the same leaves are ranked, in as many silos
    seeds = named_leaves(state.seed, is_leaf=lambda x: False)
    threshold = state.memory.threshold
    if [path for path, _ in seeds] != ranked or threshold.shape != (len(plan.sizes),):
        differing = sorted({path for path, _ in seeds} ^ set(ranked))
        raise ValueError(
            f"the state was made by another transform: it has {threshold.shape[0]} silos and "
            f"{len(seeds)} seeds, this transform {len(plan.sizes)} and {len(ranked)}"
            f"{f' (first difference: {differing[0]!r})' if differing else ''}; use the silos and fractions "
            "it was made with or call tx.init again."
        )
    for path, seed in seeds:
        _check_like(path, given[path], "its seed", seed)
    if isinstance(state.fingerprint, Tracer):
        return
    fingerprint = int(state.fingerprint)
    if fingerprint != plan.fingerprint:
        raise ValueError(
            f"the state carries the plan fingerprint {fingerprint:#010x}, this transform has "
            f"{plan.fingerprint:#010x}: paths, dtypes or silos differ; use those it was made with or call "
            "tx.init again."
        )


def _check_like(path: str, p: Any, other_name: str, other: Any) -> None:
    if jnp.shape(p) != other.shape:
        raise ValueError(
            f"parameter {path!r} has the shape {jnp.shape(p)}, {other_name} {other.shape}; the state "
            "belongs to another model."
        )
    if jnp.result_type(p) != other.dtype:
        raise ValueError(
            f"parameter {path!r} has the dtype {jnp.result_type(p)}, {other_name} {other.dtype}; restore the "
            "parameters in the seed's dtype, or call tx.init again for parameters of another dtype."
        )
