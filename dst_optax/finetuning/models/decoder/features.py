"""From a task's inputs and targets to what the network takes."""

from collections.abc import Mapping

import seqio
import tensorflow as tf

FeatureSpec = seqio.FeatureConverter.FeatureSpec


class DecoderFeatureConverter(seqio.FeatureConverter):
    """Targets after inputs, and after which tokens the targets are predicted.

    An example becomes, int32 and padded with 0 where nothing looks,

    - ``decoder_input_tokens``: the inputs and all targets but the last;
    - ``decoder_target_tokens`` and ``decoder_loss_weights``: the targets, and 1 where there is one;
    - ``decoder_target_indices``: the index of the input token that each target follows.

    What is padding is told by lengths: 0 is a token.

    Example:
      >>> task = {"inputs": tf.constant([5, 0]), "targets": tf.constant([7, 1])}
      >>> data = tf.data.Dataset.from_tensors(task)
      >>> features = next(DecoderFeatureConverter()(data, {"inputs": 3, "targets": 3}).as_numpy_iterator())
      >>> features["decoder_input_tokens"].tolist(), features["decoder_target_indices"].tolist()
      ([5, 0, 7, 0, 0], [1, 2, 3])
    """

    TASK_FEATURES = {"inputs": FeatureSpec(tf.int32), "targets": FeatureSpec(tf.int32)}  # noqa: RUF012
    MODEL_FEATURES = {  # noqa: RUF012
        "decoder_input_tokens": FeatureSpec(tf.int32),
        "decoder_target_tokens": FeatureSpec(tf.int32),
        "decoder_loss_weights": FeatureSpec(tf.int32),
        "decoder_target_indices": FeatureSpec(tf.int32),
    }
    PACKING_FEATURE_DTYPES: Mapping[str, tf.DType] = {}

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = self.get_model_feature_lengths(task_feature_lengths)
        length, targets_length = lengths["decoder_input_tokens"], lengths["decoder_target_tokens"]

        def pad(x: tf.Tensor, length: int) -> tf.Tensor:
            return tf.ensure_shape(tf.pad(x, [[0, length - tf.size(x)]]), [length])

        def convert(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
            inputs, targets = example["inputs"], example["targets"]
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
        inputs, targets = task_feature_lengths["inputs"], task_feature_lengths["targets"]
        lengths = dict.fromkeys(self.MODEL_FEATURES, targets)
        return lengths | {"decoder_input_tokens": inputs + targets - 1}
