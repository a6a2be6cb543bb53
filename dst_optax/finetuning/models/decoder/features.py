"""From a task's inputs and targets to what the network takes."""

from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

FeatureSpec = seqio.FeatureConverter.FeatureSpec


class DecoderFeatureConverter(seqio.FeatureConverter):
    """Targets after inputs, and after which tokens the targets are predicted.

    An example becomes, int32 and padded with 0 where nothing looks,

    - ``decoder_input_tokens``: the prefix, the inputs and all targets but the last;
    - ``decoder_target_tokens`` and ``decoder_loss_weights``: the targets, and 1 where there is one;
    - ``decoder_target_indices``: the index of the input token that each target follows.

    What is padding is told by lengths: 0 is a token.

    Args:
      prefix_ids: tokens before all inputs, such as ``<bos>``; not put there twice.
    """

    TASK_FEATURES = {"inputs": FeatureSpec(tf.int32), "targets": FeatureSpec(tf.int32)}  # noqa: RUF012
    MODEL_FEATURES = {  # noqa: RUF012
        "decoder_input_tokens": FeatureSpec(tf.int32),
        "decoder_target_tokens": FeatureSpec(tf.int32),
        "decoder_loss_weights": FeatureSpec(tf.int32),
        "decoder_target_indices": FeatureSpec(tf.int32),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, tf.DType] = {}  # noqa: RUF012

    def __init__(self, prefix_ids: Sequence[int] = ()):
        super().__init__(pack=False)
        self._prefix = tuple(prefix_ids)

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        length, targets_length = lengths["decoder_input_tokens"], lengths["decoder_target_tokens"]

        def pad(x: tf.Tensor, length: int) -> tf.Tensor:
            return tf.ensure_shape(tf.pad(x, [[0, length - tf.size(x)]]), [length])

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            inputs, targets = with_prefix(example["inputs"], self._prefix), example["targets"]
            tf.debugging.assert_positive(
                tf.size(inputs), "an example has empty inputs: there is nothing that its targets follow."
            )
            indices = tf.minimum(tf.size(inputs) - 1 + tf.range(targets_length), length - 1)
            return {
                "decoder_input_tokens": pad(tf.concat([inputs, targets[:-1]], 0), length),
                "decoder_target_tokens": pad(targets, targets_length),
                "decoder_loss_weights": pad(tf.ones_like(targets), targets_length),
                "decoder_target_indices": tf.ensure_shape(indices, [targets_length]),
            }

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Lengths of what an example becomes."""
        inputs = len(self._prefix) + task_feature_lengths["inputs"]
        targets = task_feature_lengths["targets"]
        lengths = dict.fromkeys(self.MODEL_FEATURES, targets)
        return lengths | {"decoder_input_tokens": inputs + targets - 1}


def with_prefix(inputs: tf.Tensor, prefix: tuple[int, ...]) -> tf.Tensor:
    """Inputs that begin with the prefix, once."""
    if not prefix:
        return inputs
    begins = tf.constant(prefix, inputs.dtype)
    begun = tf.size(inputs) >= len(prefix) and tf.reduce_all(inputs[: len(prefix)] == begins)
    return inputs if begun else tf.concat([begins, inputs], 0)
