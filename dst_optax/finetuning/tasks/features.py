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
    """Tokenises, puts what the model's tokenizer begins texts with before the inputs, and ends."""
    prefix = getattr(vocabulary, "prefix_ids", ()) if decoder_only else ()
    begin = [lambda data: data.map(lambda example: _begun(example, prefix))] if prefix else []
    return [seqio.preprocessors.tokenize, *begin, seqio.preprocessors.append_eos_after_trim]


def _begun(example: Mapping[str, Any], prefix: Sequence[int]) -> dict[str, Any]:
    """A chat template may have put the prefix there already."""
    inputs, first = example["inputs"], tf.constant(prefix, tf.int32)
    has_it = tf.reduce_all(
        tf.equal(tf.pad(inputs, [[0, len(prefix)]], constant_values=-1)[: len(prefix)], first)
    )
    return {**example, "inputs": tf.cond(has_it, lambda: inputs, lambda: tf.concat([first, inputs], 0))}
