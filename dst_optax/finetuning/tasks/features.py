"""How the texts of a task become tokens for either kind of model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf


def output_features(vocabulary: seqio.Vocabulary, decoder_only: bool) -> dict[str, Any]:
    """Features of a seqio task: what decoder-only models continue is not ended."""
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=not decoder_only),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }


def preprocessors(vocabulary: seqio.Vocabulary, decoder_only: bool) -> list[Callable[..., Any]]:
    """Tokenises, cuts inputs that targets continue at their beginning, and ends what is to be ended.

    A target that is cut has no end, where the model is to continue it: it would learn to stop there.
    """
    prefix = getattr(vocabulary, "prefix_ids", ()) if decoder_only else ()

    def begin(dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None) -> tf.data.Dataset:
        length = None if sequence_length is None else sequence_length["inputs"]
        return dataset.map(lambda e: {**e, "inputs": _begun(e["inputs"], prefix, length)})

    steps: list[Callable[..., Any]] = [seqio.preprocessors.tokenize]
    if decoder_only:
        return [*steps, begin, seqio.preprocessors.append_eos]
    return [*steps, seqio.preprocessors.append_eos_after_trim]


def _begun(inputs: tf.Tensor, prefix: Sequence[int], length: int | None) -> Any:
    """Inputs after what the model's tokenizer begins texts with; a chat template may have put that there."""
    first = tf.constant(prefix, tf.int32)
    padded = tf.pad(inputs, [[0, len(prefix)]], constant_values=-1)
    begins = tf.reduce_all(tf.equal(padded[: len(prefix)], first))
    rest = tf.cond(begins, lambda: inputs[len(prefix) :], lambda: inputs)
    kept = rest if length is None else rest[tf.maximum(tf.size(rest) - length + len(prefix), 0) :]
    return tf.concat([first, kept], 0)
