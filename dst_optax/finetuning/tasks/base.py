"""What the trainer knows of what it trains and evaluates on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import seqio

    from dst_optax.finetuning.inputs import EvalSplit


class TaskSuite(Protocol):
    """Tasks that are trained on together, and how they are scored."""

    @property
    def source(self) -> Any:
        """Where the rows come from; its ``repr`` identifies it in a run directory."""
        ...

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Of inputs and targets."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Tasks to train and evaluate on."""
        ...

    @property
    def diagnostics(self) -> Sequence[str]:
        """Tasks that are only predicted."""
        ...

    @property
    def evaluation(self) -> str:
        """``decode`` decodes predictions; ``options`` takes the likeliest of each example's options."""
        ...

    @property
    def token_metrics(self) -> bool:
        """Whether evaluations have the accuracy and perplexity of target tokens as well."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else decides on examples or scores, in values of JSON; it identifies a run directory, too."""
        return {}

    def register(self, decoder_only: bool) -> str:
        """Registers the seqio tasks as a model wants them, and names what to train on."""
        ...

    def check(self, target_length: int) -> str:
        """Reads every split, so that bad data is known before any work is done.

        Args:
          target_length: tokens of targets at most.

        Returns:
          A digest of the data, by which a run directory notices that it has changed.
        """
        ...

    def provider(self, task: str) -> str:
        """Name of the seqio task."""
        ...

    def predicted_split(self, task: str) -> str:
        """The split that the tuned model predicts in the end."""
        ...

    def options(self, split: "EvalSplit", example: Mapping[str, Any]) -> Sequence[str]:
        """Texts that may follow the inputs of an example."""
        ...

    def score(self, measured: Mapping[str, Mapping[str, float]]) -> float:
        """One number, larger if better, of the metrics of all tasks."""
        ...

    def majority(self, split: str = "validation") -> float | None:
        """The score of always giving the most common answer; None where there is none."""
        ...

    def write(
        self,
        directory: str | Path,
        task: str,
        examples: Sequence[Mapping[str, Any]],
        predictions: Sequence[Any],
    ) -> Path:
        """Writes predictions."""
        ...


def digest(rows: Any) -> str:
    """SHA-256 of values of JSON.

    Example:
      >>> digest({"train": [("1+1=", "2")]})[:8]
      '75bc3149'
    """
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def vocabulary_digest(vocabulary: "seqio.Vocabulary") -> str:
    """SHA-256 of a vocabulary's kind and, of SentencePiece's and tokenizers', all that they are.

    Example:
      >>> import seqio
      >>> vocabulary_digest(seqio.ByteVocabulary())[:8]
      '286adda6'
    """
    proto: bytes = getattr(vocabulary, "sp_model", b"")
    identity: Sequence[Any] = getattr(vocabulary, "identity", [])
    kind = [type(vocabulary).__name__, vocabulary.vocab_size, hashlib.sha256(proto).hexdigest()]
    return digest([kind, identity])
