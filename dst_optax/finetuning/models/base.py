"""What the trainer, the methods and the tasks know of a model: one small interface, families behind it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
from flax import traverse_util
from jax.sharding import Mesh

if TYPE_CHECKING:
    import seqio

Params = Any
Batch = Mapping[str, Any]


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

    def configured(self, dtype: str, dropout: float | None) -> "LanguageModel":
        """The model that computes in a dtype and drops activations at a rate; None keeps its own rate."""
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

    def save(self, directory: Path, params: Params) -> None:
        """Writes a checkpoint that :meth:`load` reads."""
        ...

    def shardings(self, params: Params, mesh: Mesh) -> Any:
        """Where parameters lie on a mesh of ``data`` and ``model``."""
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

    def check(self, vocabulary: Any) -> None:
        """Raises a ValueError if a vocabulary cannot be the model's."""
        ...

    def matrices(self, paths: Iterable[str]) -> list[str]:
        """Which parameters are matrices of linear layers, those of queries and values first.

        Args:
          paths: of parameters, layers stacked along axis 1 or not.
        """
        ...


def language_model(model: Any) -> LanguageModel:
    """The model of a configuration or a published name.

    Args:
      model: a ``T5Config`` or ``DecoderConfig``, the name of a published one, a Hugging Face checkpoint whose
        ``config.json`` is read (a directory, or a name on the hub), or a model already.

    Raises:
      ValueError: no such name, or no configuration that is supported.

    Example:
      >>> language_model("t5_1_1_small").decoder_only
      False
    """
    from dst_optax.finetuning import hub
    from dst_optax.finetuning.models import decoder, t5

    if isinstance(model, str):
        model = _config_of(hub.local_path(model))
    if isinstance(model, t5.T5Config):
        return t5.T5(model)
    return decoder.CausalLM(model) if isinstance(model, decoder.DecoderConfig) else model


def _config_of(model: str) -> Any:
    from dst_optax.finetuning.models import decoder, t5

    if model in decoder.CONFIGS:
        return decoder.CONFIGS[model]
    file = Path(model) / "config.json"
    try:
        family = json.loads(file.read_text()).get("model_type") if file.is_file() else None
    except (ValueError, AttributeError) as e:
        raise ValueError(f"{file} cannot be read as the configuration of a model: {e}.") from e
    return decoder.read_config(model) if family in decoder.FAMILIES else t5.shape_of(model)


def flatten(params: Params) -> dict[str, Any]:
    """A tree of dicts as one dict from ``a/b/c`` to leaf."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
