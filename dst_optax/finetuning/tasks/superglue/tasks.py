"""SuperGLUE as seqio tasks and their proportional mixture.

Registered names are ``<prefix>_<task>`` and ``<prefix>_proportional``; any seqio user, T5X for one,
can train and evaluate on them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from dst_optax.finetuning.tasks import features
from dst_optax.finetuning.tasks.superglue.benchmark import spec
from dst_optax.finetuning.tasks.superglue.metrics import METRICS
from dst_optax.finetuning.tasks.superglue.prompts import to_prompt
from dst_optax.finetuning.tasks.superglue.sources import Source
from dst_optax.finetuning.tasks.superglue.text import UNKNOWN, label_of, names_referent, to_text

PREFIX = "superglue"
SHUFFLE = 50_000  # at most so many examples wait to be drawn


def register(
    source: Source,
    vocabulary: seqio.Vocabulary,
    tasks: Sequence[str],
    prefix: str = PREFIX,
    decoder_only: bool = False,
) -> dict[str, str]:
    """Registers tasks, and their mixture if any can be trained on, anew.

    Args:
      source: where the rows come from; training splits are read at once, others when wanted.
      vocabulary: of inputs and targets, e.g. ``seqio.ByteVocabulary()`` or
        ``seqio.SentencePieceVocabulary(path)``.
      tasks: names of tasks, e.g. ``["rte", "cb"]``.
      prefix: of the registered names.
      decoder_only: whether examples are prompts that targets continue, instead of T5's.

    Returns:
      The registered name of each task; the mixture is ``<prefix>_proportional``.

    Raises:
      ValueError: unknown task, bad data of a training split, or the vocabulary cannot spell a label.

    Example:
      >>> from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource
      >>> names = register(SyntheticSource(), seqio.ByteVocabulary(), ["rte"])
      >>> example = next(iter(seqio.get_mixture_or_task(names["rte"]).get_dataset(split="validation")))
      >>> example["targets_pretokenized"].numpy() in (b"entailment", b"not_entailment")
      True
    """
    if not decoder_only:
        for task in tasks:
            check_labels(task, vocabulary)
    names = {task: f"{prefix}_{task}" for task in tasks}
    for task, name in names.items():
        _add(seqio.TaskRegistry, name, _task(task, name, source, vocabulary, decoder_only))
    rates = [(names[task], seqio.mixing_rate_num_examples) for task in tasks if "train" in spec(task).splits]
    if rates:
        mixture = f"{prefix}_proportional"
        _add(seqio.MixtureRegistry, mixture, seqio.Mixture(mixture, rates))
    return names


def check_labels(task: str, vocabulary: seqio.Vocabulary, length: int | None = None) -> None:
    """Makes sure that a model can say each label of a task.

    Args:
      task: name of the task.
      vocabulary: of the targets.
      length: of the targets, a label and the end of text; None for no bound.

    Raises:
      ValueError: a label is another text after encoding and decoding, or is longer: right answers would
        score as wrong ones.

    Example:
      >>> check_labels("rte", seqio.ByteVocabulary(), length=15)
    """
    for label in spec(task).labels:
        ids = list(vocabulary.encode(label))
        said = vocabulary.decode(ids)
        if label_of(task, said) != label_of(task, label) or 0 in ids:
            raise ValueError(
                f"{task}: the vocabulary makes {said!r} of the label {label!r}, so that right answers would "
                "score as wrong ones; give the vocabulary that the model was trained with."
            )
        if length is not None and len(ids) >= length:
            raise ValueError(
                f"{task}: the label {label!r} has {len(ids)} tokens and an end, but targets only {length}; "
                f"set the length of the targets to {len(ids) + 1} or more."
            )


def examples(task: str, split: str, source: Source, decoder_only: bool = False) -> list[dict[str, Any]]:
    """What the seqio task yields before tokenisation.

    Training on WSC uses only the true candidates, as in T5; training on ReCoRD sees a query once for
    each of its answers.

    Args:
      task: name of the task.
      split: "train", "validation" or "test".
      source: where the rows come from.
      decoder_only: whether they are prompts; these have ``options``, and all of WSC is trained on.

    Returns:
      Examples with ``inputs``, ``targets``, the parts of ``idx`` and ``label`` or ``answers``.

    Raises:
      ValueError: bad data, or no examples at all.

    Example:
      >>> from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource
      >>> examples("rte", "train", SyntheticSource())[0]["inputs"]
      'rte hypothesis: b hit d premise: gg b hit d g'
    """
    rows = source.rows(task, split)
    if split == "train" and task == "wsc" and not decoder_only:
        rows = [row for row in rows if row["label"] == 1]
    if split == "train" and task == "record":
        rows = [{**row, "answers": [a, *row["answers"]]} for row in rows for a in row["answers"]]
    if not rows:
        raise ValueError(f"the {split} split of {task} is empty: nothing to train on or to evaluate.")
    worded = []
    for row in rows:
        inputs, targets = to_text(task, row)
        options: dict[str, Any] = {}
        if decoder_only:
            inputs, choices = to_prompt(task, row)
            targets = _continuation(task, row, choices)
            options = {"options": list(choices)}
        index = row["idx"] if isinstance(row["idx"], dict) else {"idx": row["idx"]}
        index = {name if name == "idx" else f"idx/{name}": i for name, i in index.items()}
        answer = {"answers": row["answers"]} if task == "record" else {"label": row["label"]}
        worded.append({"inputs": inputs, "targets": targets, **index, **answer, **options})
    return worded


def _continuation(task: str, row: Mapping[str, Any], options: tuple[str, ...]) -> str:
    if task == "record":
        return f" {row['answers'][0]}" if row["answers"] else UNKNOWN
    return UNKNOWN if row["label"] < 0 else options[row["label"]]


class _Rows(seqio.FunctionDataSource):
    """A source that knows the sizes of its splits when they are asked for."""

    def __init__(self, task: str, source: Source, decoder_only: bool):
        self._examples = functools.cache(lambda split: examples(task, split, source, decoder_only))
        super().__init__(self._dataset, splits=spec(task).splits)

    def _dataset(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # the rows are in memory; seqio shuffles examples
        return _tensors(self._examples(split))

    def num_input_examples(self, split: str) -> int:
        """Examples of a split; ReCoRD's and WSC's training splits count what is trained on."""
        return len(self._examples(split))


def _task(
    task: str, name: str, source: Source, vocabulary: seqio.Vocabulary, decoder_only: bool
) -> seqio.Task:
    rows = _Rows(task, source, decoder_only)
    size = rows.num_input_examples("train") if "train" in rows.splits else 1
    return seqio.Task(
        name,
        source=rows,
        preprocessors=features.preprocessors(vocabulary, decoder_only),
        output_features=features.output_features(vocabulary, decoder_only),
        postprocess_fn=postprocessor(task),
        metric_fns=list(METRICS[task]),
        shuffle_buffer_size=min(size, SHUFFLE),  # seqio repeats first: more would wait for many epochs
    )


def _tensors(rows: list[dict[str, Any]]) -> tf.data.Dataset:
    columns: Any = {
        name: tf.ragged.constant([e[name] for e in rows], dtype=tf.string)
        if name in ("answers", "options")
        else tf.constant([e[name] for e in rows])
        for name in rows[0]
    }
    return tf.data.Dataset.from_tensor_slices(columns)


def postprocessor(task: str) -> Callable[..., Any]:
    """What turns a decoded text into a prediction, and an example into its target.

    Args:
      task: name of the task.

    Returns:
      A seqio ``postprocess_fn``, which refuses to make a target of an example without a label.

    Example:
      >>> postprocessor("rte")("entailment"), postprocessor("rte")("", example={"label": 1}, is_target=True)
      (0, 1)
    """

    def postprocess(text: str, example: Mapping[str, Any] | None = None, is_target: bool = False) -> Any:
        if is_target:
            assert example is not None
            return _target(task, example)
        if example is not None and "options" in example:
            options = [_string(option).strip() for option in example["options"]]
            said = text.strip()
            return said if task == "record" else options.index(said) if said in options else -1
        if task == "record":
            return text
        if task == "wsc":
            assert example is not None
            return names_referent(text, _string(example["targets_pretokenized"]))
        return label_of(task, text)

    return postprocess


def _target(task: str, example: Mapping[str, Any]) -> Any:
    if (len(example["answers"]) == 0) if task == "record" else (example["label"] < 0):
        raise ValueError(
            f"{task}: an example has no label, so nothing can be scored; SuperGLUE keeps those of its test "
            "split to itself. Score 'validation'."
        )
    if task == "record":
        return [_string(answer) for answer in example["answers"]]
    if task == "multirc":
        group = (int(example["idx/paragraph"]), int(example["idx/question"]))
        return {"label": int(example["label"]), "group": group}
    return int(example["label"])


def _string(value: Any) -> str:
    return tf.compat.as_text(value)


def _add(registry: Any, name: str, provider: Any) -> None:
    if name in registry.names():
        registry.remove(name)
    registry.add_provider(name, provider)
