"""Prompts of decoder-only models: each task's words, options that may follow, one of them the target."""

import pytest

pytest.importorskip("seqio")

from dst_optax.finetuning.tasks.superglue import tasks
from dst_optax.finetuning.tasks.superglue.benchmark import TASKS, spec
from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_prompt_with_options(task):
    split = "train" if "train" in spec(task).splits else "test"
    examples = tasks.examples(task, split, SyntheticSource(train_size=20), decoder_only=True)
    for example in examples:
        assert example["inputs"] == example["inputs"].rstrip()
        assert all(option.startswith(" ") and option.strip() for option in example["options"])
        if task == "record":
            assert example["targets"] in {f" {answer}" for answer in example["answers"]}
        elif example["label"] >= 0:
            assert len(example["options"]) == len(spec(task).labels)
            assert example["targets"] == example["options"][example["label"]]
        post = tasks.postprocessor(task)
        for i, option in enumerate(example["options"]):
            said = post(f"{option} ", example={**example, "options": example["options"]})
            assert said == (option.strip() if task == "record" else i)
    labels = {example.get("label") for example in examples}
    assert task == "record" or -1 in labels or labels == set(range(len(spec(task).labels)))


def test_answers_that_are_no_option_are_wrong():
    assert tasks.postprocessor("rte")("perhaps", example={"options": [" True", " False"]}) == -1


def test_what_t5_is_given_has_no_options():
    assert "options" not in tasks.examples("rte", "train", SyntheticSource())[0]
