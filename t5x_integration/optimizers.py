"""Dynamic Subset Tuning as a T5X optimizer.

:func:`dynamic_subset_tuning` goes around any T5X optimizer. :func:`chain` is T5X's chain of optax
transforms for which ``dst_optax.dynamic_subset_tuning`` is the last link. Importing this module
teaches T5X how the states of DST, ``optax.adafactor`` and ``optax.inject_hyperparams`` are sharded.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from flax.serialization import from_state_dict, to_state_dict
from jax.sharding import PartitionSpec
from t5x import optimizers  # pyright: ignore[reportMissingImports]

import dst_optax
from dst_optax import distances, silos
from dst_optax.rule import SubsetRule
from dst_optax.state import Free, leaf_states
from dst_optax.tree import is_masked, leaf_path, map_named, named_leaves

FIRST_EDITION = (
    "this checkpoint was written by dst-optax 0.1, whose state holds other fields. Finish the run with 0.1, "
    "or start a new one from its seed: export the subset with 0.1 and apply it with `dst-optax subset apply`."
)
LAYERS = "layers"  # T5X's name of the axis that nn.scan stacks layers along


@struct.dataclass
class DynamicSubsetTuningState:
    """State of :class:`DynamicSubsetTuning`, with the inner optimizer's where T5X keeps it."""

    step: jax.Array  # (), int32
    param_states: Any
    dst: Any  # dst_optax.DynamicSubsetTuningState


class DynamicSubsetTuning(optimizers.OptimizerDef):
    """A T5X optimizer whose result may differ from the seed in a small subset only.

    Attributes:
      inner: any T5X optimizer.
      rule: what may differ from the seed.
    """

    def __init__(self, inner: Any, rule: SubsetRule):
        self.inner = inner
        self.rule = rule

    @property
    def hyper_params(self) -> Any:
        """Those of the inner optimizer."""
        return self.inner.hyper_params

    def update_hyper_params(self, **overrides: Any) -> Any:
        """See the inner optimizer."""
        return self.inner.update_hyper_params(**overrides)

    def plan(self, params: Any) -> silos.SiloPlan:
        """The silos, for metrics of each."""
        return self.rule.plan(params)

    def init_state(self, params: Any) -> DynamicSubsetTuningState:
        """States of both; the seed is captured at the first step, after weights were restored."""
        inner = self.inner.init_state(params)
        return DynamicSubsetTuningState(inner.step, inner.param_states, self.rule.init(params))

    def apply_gradient(
        self, hyper_params: Any, params: Any, state: DynamicSubsetTuningState, grads: Any
    ) -> tuple[Any, DynamicSubsetTuningState]:
        """Free entries get exactly what the inner optimizer sets, all others exactly the seed."""
        if not hasattr(state, "dst"):
            raise ValueError(
                f"the state is {type(state).__name__}, without DST's; make it with create, and put "
                "dynamic_subset_tuning around MultiOptimizer, not into it."
            )
        proposed, inner = self.inner.apply_gradient(hyper_params, params, state, grads)
        tuned, dst = self.rule.project(proposed, params, state.dst)
        return tuned, DynamicSubsetTuningState(inner.step, inner.param_states, dst)

    def set_param_axes(self, param_logical_axes: Any) -> None:
        """Tells the inner optimizer the axes; unless silos are given, each scanned layer is one."""
        if hasattr(self.inner, "set_param_axes"):
            self.inner.set_param_axes(param_logical_axes)
        if self.rule.silos is None:
            stacked = silos.per_tensor(stacked=stacked_layers(param_logical_axes))
            self.rule = dataclasses.replace(self.rule, silos=stacked)

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
        """The seed is sharded as its parameter, what is kept of silos lies on every device."""
        state = optimizer.state
        inner = optimizers.Optimizer(self.inner, _inner(state), optimizer.target)
        inner = self.inner.derive_logical_axes(inner, param_logical_axes).state
        dst = partition(state.dst, param_logical_axes)
        param_states = _specified(state.param_states, inner.param_states)
        state = DynamicSubsetTuningState(inner.step, param_states, dst)
        return optimizers.Optimizer(self, state, param_logical_axes)

    def state_dict(self, target: Any, state: DynamicSubsetTuningState) -> Any:
        """Without empty nodes, which T5X cannot save."""
        state_dict = self.inner.state_dict(target, _inner(state))
        flat = traverse_util.flatten_dict(to_state_dict(state.dst))
        state_dict["state"]["dst"] = traverse_util.unflatten_dict(flat)
        return state_dict

    def restore_state(self, opt_target: Any, opt_state: Any, state_dict: Mapping[str, Any]) -> Any:
        """Puts the empty nodes back."""
        state = dict(state_dict["state"])
        flat = traverse_util.flatten_dict(state.pop("dst"))
        if ("memory", "threshold") not in flat:
            raise ValueError(FIRST_EDITION)
        current = traverse_util.flatten_dict(to_state_dict(opt_state.dst), keep_empty_nodes=True)
        flat |= {path: x for path, x in current.items() if x is traverse_util.empty_node}
        dst = from_state_dict(opt_state.dst, traverse_util.unflatten_dict(flat))
        inner = {**state_dict, "state": state}
        target, inner = self.inner.restore_state(opt_target, _inner(opt_state), inner)
        target = as_trained(target, opt_target, dst)
        return target, DynamicSubsetTuningState(inner.step, inner.param_states, dst)


def dynamic_subset_tuning(
    inner: Any,
    fraction_of_free_params: Any = None,
    *,
    num_free_params: int | None = None,
    silos: silos.Silos | None = None,
    distance: distances.Distance | None = None,
    ties: str = "strict",
) -> DynamicSubsetTuning:
    """Wraps a T5X optimizer, so that only a small, moving subset may differ from the seed.

    The inner optimizer keeps its state under the names that it has without the wrapper, so a
    pre-trained checkpoint's slots fit.

    Args:
      inner: T5X's Adafactor, MultiOptimizer, OptaxWrapper or another ``OptimizerDef``.
      fraction_of_free_params: see :func:`dst_optax.dynamic_subset_tuning`.
      num_free_params: see there.
      silos: see there; None makes every tensor a silo and, of tensors with an axis named "layers",
        every slice.
      distance: see there.
      ties: see there.

    Returns:
      The optimizer.
    """
    rule = SubsetRule(fraction_of_free_params, num_free_params, silos, distance, ties)
    return DynamicSubsetTuning(inner, rule)


class OptaxWrapper(optimizers.OptaxWrapper):
    """T5X's wrapper of optax transforms, for chains that end in DST: it sets the seed exactly."""

    def apply_gradient(self, hyper_params: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """T5X's, but for the last addition."""
        updates, new = self.optax_optimizer.update(grads, state.param_states, params)
        params = dst_optax.apply_updates(params, updates, new)
        return params, optimizers.OptimizerState(step=state.step + 1, param_states=new)

    def restore_state(self, opt_target: Any, opt_state: Any, state_dict: Mapping[str, Any]) -> Any:
        """T5X's, for parameters that were saved in fewer bits too."""
        target, state = super().restore_state(opt_target, opt_state, state_dict)
        return as_trained(target, opt_target, state.param_states), state

    def derive_logical_axes(self, optimizer: Any, param_logical_axes: Any) -> Any:
        """T5X's, but that nothing is without a spec."""
        axes = super().derive_logical_axes(optimizer, param_logical_axes)
        states = _specified(optimizer.state.param_states, axes.state.param_states)
        return axes.replace(state=axes.state.replace(param_states=states))


def chain(transformations: Sequence[optax.GradientTransformation]) -> OptaxWrapper:
    """``optax.chain`` as a T5X optimizer; ``dst_optax.dynamic_subset_tuning`` goes last.

    Args:
      transformations: optax transforms.

    Returns:
      The optimizer. Learning rates are the transforms' own; T5X's schedule is only logged.
    """
    return OptaxWrapper(optax.chain(*transformations))


def as_trained(params: Any, wanted: Any, state: Any) -> Any:
    """Restored parameters in the dtypes of training.

    T5X rounds parameters to ``SaveCheckpointConfig.dtype``, and keeps the optimizer's state, the seed among
    it, as it is. Entries that show the seed, rounded, are the seed's.

    Args:
      params: pytree of arrays, as restored.
      wanted: same structure, arrays or their shapes and dtypes as training has them.
      state: the restored state, with those of DST in it.

    Returns:
      The parameters in the dtypes of ``wanted``.

    Raises:
      ValueError: they are of another model, or the state does not hold what was rounded off.
    """
    # T5X restores partition specs by the same function, and they have neither shape nor dtype
    shapes = {path: getattr(x, "shape", None) for path, x in named_leaves(wanted)}
    for path, p in named_leaves(params):
        if getattr(p, "shape", shapes[path]) != shapes[path]:
            raise ValueError(
                f"the parameter {path!r} has the shape {p.shape} in the checkpoint and {shapes[path]} in the "
                "model; give a checkpoint of this model."
            )
    dtypes = {path: getattr(x, "dtype", None) for path, x in named_leaves(wanted)}
    rounded = [path for path, p in named_leaves(params) if getattr(p, "dtype", dtypes[path]) != dtypes[path]]
    if not rounded:
        return params
    leaves = leaf_states(state)

    def widen(path: str, p: jax.Array) -> jax.Array:
        if path not in rounded:
            return p
        leaf = leaves.get(path)
        if leaf is None or isinstance(leaf.seed, Free):
            return p.astype(dtypes[path])
        if is_masked(leaf.seed) or not bool(leaf.captured):
            raise ValueError(
                f"the parameter {path!r} was restored as {p.dtype}, training has {dtypes[path]}, and its "
                "seed is not in the checkpoint. From an initial checkpoint, set "
                "RestoreCheckpointConfig.dtype to that of training. A run that stopped before its first "
                "step, or has frozen parameters, starts anew, with SaveCheckpointConfig.dtype = 'float32'."
            )
        return unrounded(p, leaf.seed)

    return map_named(widen, params)


def unrounded(p: Any, seed: Any) -> jax.Array:
    """An array of fewer bits than its seed in the seed's dtype, where both agree the seed."""
    p = jnp.asarray(p)
    return jnp.where(p == jnp.asarray(seed).astype(p.dtype), seed, p.astype(seed.dtype))


def stacked_layers(param_logical_axes: Any) -> list[tuple[str, int]]:
    """Which axis of which parameter stacks layers, for ``silos.per_tensor(stacked=...)``.

    Args:
      param_logical_axes: pytree of PartitionSpecs of axis names.

    Returns:
      ``(regex, axis)`` pairs.
    """
    leaves = jax.tree_util.tree_flatten_with_path(
        param_logical_axes, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )[0]
    return [
        (f"^{re.escape(leaf_path(path))}$", tuple(axes).index(LAYERS))
        for path, axes in leaves
        if LAYERS in axes
    ]


def partition(state: dst_optax.DynamicSubsetTuningState, params_axes: Any) -> Any:
    """Partition rule of DST's state: seed and mask lie as the parameters do, all else everywhere."""
    mask = _like_params(state.mask, params_axes) if jax.tree.leaves(state.mask) else state.mask
    rest = _everywhere(state._replace(seed=(), mask=()))
    return rest._replace(seed=_like_params(state.seed, params_axes), mask=mask)


def partition_factored(state: optax.FactoredState, params_axes: Any) -> Any:
    """Partition rule of ``optax.adafactor``: means of rows and columns lie on every device."""

    def full(axes: PartitionSpec, v: Any) -> PartitionSpec:
        return axes if len(axes) == v.ndim and v.shape != (1,) else PartitionSpec()

    return optax.FactoredState(
        count=PartitionSpec(),  # type: ignore[arg-type]
        v_row=_everywhere(state.v_row),
        v_col=_everywhere(state.v_col),
        v=jax.tree.map(full, params_axes, state.v),
    )


def partition_injected(state: optax.InjectStatefulHyperparamsState, params_axes: Any) -> Any:
    """Partition rule of ``optax.inject_hyperparams``."""
    inner = optimizers.OptaxStatePartitionRules.derive_optax_logical_axes(state.inner_state, params_axes)
    return _everywhere(state)._replace(inner_state=inner)


def _like_params(tree: Any, params_axes: Any) -> Any:
    return optimizers.OptaxStatePartitionRules.derive_params_axes(tree, params_axes)


def _specified(states: Any, axes: Any) -> Any:
    """``PartitionSpec()`` instead of None: T5X restores an array that has no spec as float32."""
    return jax.tree.map(lambda _, a: PartitionSpec() if a is None else a, states, axes)


def _everywhere(tree: Any) -> Any:
    return jax.tree.map(lambda _: PartitionSpec(), tree)


def _inner(state: DynamicSubsetTuningState) -> Any:
    return optimizers.OptimizerState(step=state.step, param_states=state.param_states)


optimizers.OptaxStatePartitionRules._RULES |= {
    dst_optax.DynamicSubsetTuningState: partition,
    optax.FactoredState: partition_factored,
    optax.InjectStatefulHyperparamsState: partition_injected,
}
