"""A T5 is scored by the likelihood of its options, too: of single rows, by the network alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("rich")
seqio = pytest.importorskip("seqio")

from few import Few  # noqa: E402

from dst_optax.finetuning import placement, trainer  # noqa: E402
from dst_optax.finetuning.evaluator import Evaluator  # noqa: E402
from dst_optax.finetuning.models import t5  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402

CONFIG = t5.T5Config(384, 16, 2, 1, 1, 8, 16)
VOCABULARY = seqio.ByteVocabulary()
RECIPE = trainer.Recipe(steps=1, lengths={"inputs": 64, "targets": 16}, eval_batch_size=100)


@jax.jit
def network_of(params, *tokens):
    return t5.Transformer(CONFIG).apply({"params": params}, *tokens, enable_dropout=False)


def log_likelihood(params, inputs, option):
    """Of an option's bytes, one after the other, on one row without padding."""
    targets = np.array([[byte + 3 for byte in option.encode()]], np.int32)
    shifted = np.pad(targets, [(0, 0), (1, 0)])[:, :-1]
    logits = network_of(params, inputs[None], shifted, targets)
    chosen = jax.nn.log_softmax(logits[0])[np.arange(targets.size), targets[0]]
    return float(jnp.sum(chosen))


@pytest.mark.parametrize("task", ["record", "wsc"])
def test_tasks_whose_answers_are_names_have_no_options(task):
    """Neither label is what a T5 is trained to say, so all would be one answer."""
    data = SuperGlue(Few(train_size=8), VOCABULARY, ("rte", task), evaluation="options")
    with pytest.raises(ValueError, match="ReCoRD and WSC are names, not options; evaluate them by decoding"):
        data.register()
    data.register(decoder_only=True)


@pytest.mark.parametrize(
    ("task", "options", "predicted"),
    [("copa", ("choice1", "choice2"), {0, 1}), ("rte", ("entailment", "not_entailment"), {0})],
)
def test_the_likeliest_option_of_a_t5(task, options, predicted):
    """The options are the words that T5 was trained on; of unequal ones, the shorter is the likelier."""
    data = SuperGlue(Few(train_size=8), VOCABULARY, (task,), evaluation="options")
    data.register()
    model = t5.T5(CONFIG)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(0)))
    evaluator = Evaluator(model, data, RECIPE, placement.make_mesh())
    split = evaluator.split(task, "validation")
    metrics, score = evaluator.score(params)
    likeliest = evaluator.predict(params, split)
    assert set(likeliest) == predicted

    few = split.examples[:4]
    scores = np.array([[log_likelihood(params, e["inputs"], option) for option in options] for e in few])
    assert [int(e["inputs"][-1]) for e in few] == [1] * len(few)
    assert likeliest[: len(few)] == scores.argmax(1).tolist()

    labels = np.array([int(e["label"]) for e in split.examples])
    assert score == metrics[f"eval/{task}/accuracy"] == pytest.approx(100 * np.mean(likeliest == labels))
    lengths = [len(option) for option in options]
    normalised = [int(x.argmax()) for x in scores / lengths]
    evaluator._splits[task, "validation"] = type(split)(split.provider, few, split.batch)
    right = 100 * np.mean(np.array(normalised) == labels[: len(few)])
    assert evaluator.score(params)[0][f"eval/{task}/accuracy_normalised"] == pytest.approx(right)
