"""As much of T5X as our code touches, where T5X is not installed.

The classes do what T5X's do at the commit that README names; the same tests run on the real ones
where it is installed.
"""

import dataclasses
import sys
import types
from typing import Any, ClassVar

import jax
import optax
from flax import serialization, struct, traverse_util


@struct.dataclass
class OptimizerState:
    step: Any
    param_states: Any


class OptimizerDef:
    def __init__(self, hyper_params):
        self.hyper_params = hyper_params

    def update_hyper_params(self, **overrides):
        return self.hyper_params.replace(**overrides)

    def create(self, target):
        return Optimizer(self, self.init_state(target), target)

    def state_dict(self, target, state):
        return {
            "target": serialization.to_state_dict(target),
            "state": serialization.to_state_dict(state),
        }

    def restore_state(self, target, state, state_dict):
        return (
            serialization.from_state_dict(target, state_dict["target"]),
            serialization.from_state_dict(state, state_dict["state"]),
        )


class Optimizer(struct.PyTreeNode):
    optimizer_def: Any = struct.field(pytree_node=False)
    state: Any = struct.field(pytree_node=True)
    target: Any = struct.field(pytree_node=True)

    def apply_gradient(self, grads, **overrides):
        hyper_params = self.optimizer_def.update_hyper_params(**overrides)
        target, state = self.optimizer_def.apply_gradient(hyper_params, self.target, self.state, grads)
        return self.replace(target=target, state=state)

    def state_dict(self):
        return self.optimizer_def.state_dict(self.target, self.state)

    def restore_state(self, state_dict):
        target, state = self.optimizer_def.restore_state(self.target, self.state, state_dict)
        return self.replace(target=target, state=state)


class OptaxStatePartitionRules:
    _RULES: ClassVar = {}

    @classmethod
    def _is_optax_state(cls, x):
        return isinstance(x, tuple) and hasattr(x, "_fields") and type(x).__name__.endswith("State")

    @classmethod
    def derive_optax_logical_axes(cls, state, axes):
        leaves, treedef = jax.tree.flatten(state, is_leaf=cls._is_optax_state)
        return jax.tree.unflatten(
            treedef, [cls._RULES[type(x)](x, axes) if cls._is_optax_state(x) else None for x in leaves]
        )

    @classmethod
    def derive_params_axes(cls, tree, axes):
        return jax.tree.map(lambda a, x: x if isinstance(x, optax.MaskedNode) else a, axes, tree)


OptaxStatePartitionRules._RULES[optax.ScaleByAdamState] = lambda state, axes: optax.ScaleByAdamState(
    count=None, mu=axes, nu=axes
)
OptaxStatePartitionRules._RULES[optax.EmptyState] = lambda state, axes: state


@struct.dataclass
class NoHyperParams:
    learning_rate: float | None = None


class OptaxWrapper(OptimizerDef):
    def __init__(self, optax_optimizer):
        self.optax_optimizer = optax_optimizer
        super().__init__(NoHyperParams())

    def init_state(self, params):
        return OptimizerState(step=0, param_states=self.optax_optimizer.init(params))

    def derive_logical_axes(self, optimizer, axes):
        states = OptaxStatePartitionRules.derive_optax_logical_axes(optimizer.state.param_states, axes)
        return Optimizer(self, OptimizerState(None, states), axes)


@dataclasses.dataclass
class SaveCheckpointConfig:
    dtype: str | None = "float32"
    checkpoint_manager_cls: Any = None
    period: int | None = None
    keep: int | None = None
    save_dataset: bool = False


@dataclasses.dataclass
class RestoreCheckpointConfig:
    path: Any
    mode: str = "latest"
    dtype: str | None = None
    checkpoint_manager_cls: Any = None
    fallback_to_scratch: bool = False
    state_transformation_fns: Any = ()


@dataclasses.dataclass
class CheckpointConfig:
    save: Any = None
    restore: Any = None


@dataclasses.dataclass
class DatasetConfig:
    seed: int | None = None


class OrbaxCheckpointManagerInterface:
    pass


class WeightMetricsComputer:
    pass


class Trainer:
    def __init__(self, weight_metrics_computer=None):
        pass


class Adafactor(OptimizerDef):
    def __init__(self, min_dim_size_to_factor=128):
        super().__init__(None)


class AveragePerStep:
    @classmethod
    def from_model_output(cls, value):
        return float(value)


class PjitPartitioner:
    def __init__(self, num_partitions=None, model_parallel_submesh=None):
        pass


def standard_logical_axis_rules(activation_partitioning_dims=1, parameter_partitioning_dims=1):
    return []


def flatten_state_dict(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def intersect_state(tree, other):
    known = flatten_state_dict(other)
    return traverse_util.unflatten_dict(
        {k: x for k, x in flatten_state_dict(tree).items() if k in known}, sep="/"
    )


def parse_gin_flags(paths, files, bindings):
    import gin

    for path in paths:
        gin.add_config_file_search_path(path)
    gin.parse_config_files_and_bindings(files, bindings)


def train(*, model_dir=None, checkpoint_cfg=None, train_dataset_cfg=None, total_steps=None):
    return checkpoint_cfg


MODULES = {
    "optimizers": (OptimizerDef, OptimizerState, Optimizer, OptaxStatePartitionRules, OptaxWrapper),
    "adafactor": (Adafactor,),
    "checkpoints": (OrbaxCheckpointManagerInterface,),
    "gin_utils": (parse_gin_flags,),
    "metrics": (AveragePerStep,),
    "partitioning": (PjitPartitioner, standard_logical_axis_rules),
    "state_utils": (flatten_state_dict, intersect_state),
    "train": (train,),
    "trainer": (Trainer, WeightMetricsComputer),
    "utils": (CheckpointConfig, SaveCheckpointConfig, RestoreCheckpointConfig, DatasetConfig),
}


def install():
    """Puts the stub in T5X's place."""
    package = types.ModuleType("t5x")
    package.__path__ = []
    sys.modules["t5x"] = package
    for name, members in MODULES.items():
        module = types.ModuleType(f"t5x.{name}")
        for member in members:
            setattr(module, member.__name__, member)
            member.__module__ = module.__name__
        setattr(package, name, module)
        sys.modules[module.__name__] = module
