"""A choice of SuperGLUE tasks as the trainer takes it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seqio

from dst_optax.finetuning import processes
from dst_optax.finetuning.inputs import EvalSplit
from dst_optax.finetuning.tasks.base import digest
from dst_optax.finetuning.tasks.superglue import metrics, submission, tasks
from dst_optax.finetuning.tasks.superglue.benchmark import MAIN, spec
from dst_optax.finetuning.tasks.superglue.sources import Source, official_split


@dataclass(frozen=True)
class SuperGlue:
    """What to train on and how to score it.

    Attributes:
      source: where the rows come from.
      vocabulary: of inputs and targets.
      names: tasks to train and evaluate on; a single name, or several
        that are mixed in proportion to their sizes.
      diagnostics: tasks without training data, "axb" and "axg", to predict at the end.
      evaluation: "decode", or "options": the likeliest of the labels.

    Example:
      >>> from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource
      >>> suite = SuperGlue(SyntheticSource(), seqio.ByteVocabulary(), names=("rte",))
      >>> suite.register(), suite.provider("rte")
      ('superglue_proportional', 'superglue_rte')
    """

    source: Source
    vocabulary: seqio.Vocabulary
    names: Sequence[str] = MAIN
    diagnostics: Sequence[str] = ()
    evaluation: str = "decode"
    token_metrics = False

    def __post_init__(self) -> None:
        for name in ("names", "diagnostics"):
            if isinstance(value := getattr(self, name), str):  # one task, not its letters
                object.__setattr__(self, name, (value,))
        if self.evaluation not in ("decode", "options"):
            raise ValueError(f"SuperGlue: evaluation is {self.evaluation!r}; decode and options are known.")

    def register(self, decoder_only: bool = False) -> str:
        """Reads and checks the training data, registers the tasks, names the mixture to train on.

        Args:
          decoder_only: whether they are for a model whose targets continue the inputs.

        Raises:
          ValueError: unknown tasks, tasks without training data, bad or missing data.
        """
        for task in self.names:
            if "train" not in spec(task).splits:
                raise ValueError(f"{task} has no training data; put it under diagnostics, not names.")
        if not self.names:
            raise ValueError(f"no task to train on; name some of {', '.join(MAIN)}.")
        if self.evaluation == "options" and not decoder_only and {"record", "wsc"} & set(self.names):
            raise ValueError(
                "in T5's wording the answers of ReCoRD and WSC are names, not options; evaluate them by "
                "decoding."
            )
        tasks.register(
            self.source,
            self.vocabulary,
            [*self.names, *self.diagnostics],
            decoder_only=decoder_only,
        )
        return f"{tasks.PREFIX}_proportional"

    def check(self, target_length: int | None = None) -> str:
        """Reads every split, so that bad data is known before any work is done.

        Args:
          target_length: of the targets, with their end; None for no bound.

        Returns:
          A digest of the examples.

        Raises:
          ValueError: bad, empty or missing data, or a label or option that is longer than ``target_length``.
        """
        read = {}
        for task in (*self.names, *self.diagnostics):
            decoder_only = not seqio.TaskRegistry.get(self.provider(task)).output_features["inputs"].add_eos
            splits = {
                split: tasks.examples(task, split, self.source, decoder_only) for split in spec(task).splits
            }
            for split, examples in splits.items():
                self._tell_absent_labels(task, split, examples)
            read[task] = list(itertools.chain(*splits.values()))
            if decoder_only:
                self._check_options(task, read[task], target_length)
            else:
                tasks.check_labels(task, self.vocabulary, target_length)
        return digest(read)

    def _tell_absent_labels(self, task: str, split: str, examples: Sequence[Mapping[str, Any]]) -> None:
        """Says which labels of CB a split has no example of: its metric is the mean of their F1."""
        if task != "cb" or any(example["label"] < 0 for example in examples):
            return
        labels = [example["label"] for example in examples]
        absent = [label for i, label in enumerate(spec(task).labels) if i not in labels]
        if absent and processes.is_primary():
            best = self.score({task: metrics.accuracy(labels, labels) | metrics.macro_f1(labels, labels)})
            print(
                f"{task} {split}: no example is {' or '.join(map(repr, absent))}, which counts as an F1 of "
                f"0: answers that are all right score {best:.1f}.",
                flush=True,
            )

    def _check_options(
        self, task: str, examples: Sequence[Mapping[str, Any]], target_length: int | None
    ) -> None:
        if target_length is None:
            return
        options = {option for example in examples for option in example["options"]}
        size, longest = max((len(self.vocabulary.encode(option)), option) for option in options)
        if size >= target_length:
            raise ValueError(
                f"{task}: the option {longest!r} has {size} tokens and an end, but targets only "
                f"{target_length}; set the length of the targets to {size + 1} or more."
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        """How examples are scored."""
        return {"evaluation": self.evaluation}

    def provider(self, task: str) -> str:
        """Name of the seqio task."""
        return f"{tasks.PREFIX}_{task}"

    def predicted_split(self, task: str) -> str:
        """The source's test split."""
        del task
        return "test"

    def options(self, split: EvalSplit, example: Mapping[str, Any]) -> Sequence[str]:
        """The answers that an example allows, in the order of label indices."""
        if "options" in example:
            return [option.decode() for option in example["options"]]
        return spec(split.provider.name.removeprefix(f"{tasks.PREFIX}_")).labels

    def score(self, measured: Mapping[str, Mapping[str, float]]) -> float:
        """One number: the mean of the tasks' scores; for all eight tasks the SuperGLUE average."""
        plain = {
            task: {name: x for name, x in values.items() if not name.endswith("_normalised")}
            for task, values in measured.items()
        }
        return metrics.score({task: metrics.score(values) for task, values in plain.items()})

    def majority(self, split: str = "validation") -> float | None:
        """The score of always giving each task's most common answer; None where there are no labels."""
        by_task = {}
        for task in self.names:
            provider = seqio.TaskRegistry.get(self.provider(task))
            examples = tasks.examples(task, split, self.source)
            if task == "record":
                return None
            examples = [{**e, "targets_pretokenized": e["targets"]} for e in examples]
            targets = [provider.postprocess_fn(e["targets"], example=e, is_target=True) for e in examples]
            scores = []
            for label in range(len(spec(task).labels)):
                values: dict[str, float] = {}
                for metric in metrics.METRICS[task]:
                    values |= metric(targets, [label] * len(targets))
                scores.append(metrics.score(values))
            by_task[task] = max(scores)
        return metrics.score(by_task)

    def write(
        self,
        directory: str | Path,
        task: str,
        examples: Sequence[Mapping[str, Any]],
        predictions: Sequence[Any],
    ) -> Path:
        """Writes predictions of the test split as the leaderboard takes them."""
        return submission.write(directory, task, examples, predictions, official_split(self.source, task))
