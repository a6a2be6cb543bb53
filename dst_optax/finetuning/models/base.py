"""What the trainer, the methods and the tasks know of a model: one small interface, families behind it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    import seqio

Params = Any
Batch = Mapping[str, Any]
Rules = Sequence[tuple[str, str | None]]
STACKED = ((r"^((encoder|decoder)/\2|layers)/", 1),)  # parameters of all layers, as ``scan_layers`` has them


class LanguageModel(Protocol):
    """A network with its parameters' names, places and files."""

    @property
    def config(self) -> Any:
        """Its shape; what identifies the model in a run directory."""
        ...

    @property
    def decoder_only(self) -> bool:
        """Whether targets continue the inputs, so that these must not be ended."""
        ...

    @property
    def embedding(self) -> str:
        """The path of the embedding of tokens; soft prompts begin as rows of it."""
        ...

    def feature_converter(self) -> "seqio.FeatureConverter":
        """Makes of ``inputs`` and ``targets`` a batch for :meth:`logits` and :meth:`decode`.

        It has ``decoder_target_tokens`` and ``decoder_loss_weights``, both ``(batch, targets)``.
        """
        ...

    def configured(self, **how: Any) -> "LanguageModel":
        """The model that computes otherwise.

        Args:
          **how: ``dtype``, ``dropout_rate``, ``scan_layers`` and ``remat``; None keeps what the model has.
        """
        ...

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        ...

    def load(self, checkpoint: str) -> Params:
        """The parameters of a checkpoint, on the host.

        Raises:
          ValueError: there is none, or it is another model's.
        """
        ...

    def save(self, directory: Path, params: Params, source: Path | None = None) -> None:
        """Writes a checkpoint that :meth:`load` reads.

        Args:
          directory: to fill.
          params: the parameters.
          source: a Hugging Face checkpoint of the model, whose tokenizer and settings go along.
        """
        ...

    @property
    def axis_rules(self) -> Rules:
        """Which axis of a mesh of ``data`` and ``model`` each logical axis lies on, if any."""
        ...

    def shardings(self, params: Params, mesh: Mesh, rules: Rules | None = None) -> Any:
        """Where parameters lie on a mesh; None takes ``axis_rules``."""
        ...

    def logits(self, params: Params, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Logits of ``decoder_target_tokens``, float32, ``(batch, targets, vocabulary)``.

        Args:
          params: the parameters; may hold a soft ``prompt``.
          batch: of the feature converter.
          key: of dropout; None drops nothing.
        """
        ...

    def decode(self, params: Params, batch: Batch, vocabulary: Any, max_length: int) -> jax.Array:
        """Tokens that follow the inputs of a batch, int32, ``(batch, max_length)``."""
        ...

    def text(self, vocabulary: Any, tokens: Sequence[int]) -> str:
        """The text of a row that :meth:`decode` made."""
        ...

    def check(self, vocabulary: Any, checkpoint: str | None = None) -> None:
        """Raises a ValueError if a vocabulary cannot be the model's, or not that of its checkpoint."""
        ...

    def matrices(self, paths: Iterable[str]) -> list[str]:
        """Which parameters are matrices of linear layers, those of queries and values first.

        Args:
          paths: of parameters, layers stacked along axis 1 or not.
        """
        ...


def replace_given(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with all changes that are not None."""
    return dataclasses.replace(config, **{name: x for name, x in changes.items() if x is not None})


def flatten(params: Params) -> dict[str, Any]:
    """A tree of dicts as one dict from ``a/b/c`` to leaf."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def dividing(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """The same sharding, but whole along axes of an array that the mesh does not divide evenly.

    Example:
      >>> from jax.sharding import AbstractMesh, PartitionSpec
      >>> mesh = AbstractMesh((2, 4), ("data", "model"))
      >>> tuple(dividing(NamedSharding(mesh, PartitionSpec("model", "data")), (6, 8)).spec)
      (None, 'data')
    """
    spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    sizes = sharding.mesh.shape

    def divides(axis: Any, n: int) -> bool:
        return n % math.prod(sizes[a] for a in (axis if isinstance(axis, tuple) else (axis,))) == 0

    kept = [axis if axis and divides(axis, n) else None for axis, n in zip(spec, shape, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
