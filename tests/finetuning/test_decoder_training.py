"""Decoder-only models behind the trainer: every method tunes them, options and completions are scored."""

import json
from dataclasses import replace

import decoder_cases as cases
import jax
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("clu")
pytest.importorskip("rich")
seqio = pytest.importorskip("seqio")

from few import Few  # noqa: E402

from dst_optax import subset  # noqa: E402
from dst_optax.finetuning import inputs, placement, trainer  # noqa: E402
from dst_optax.finetuning.context import RunContext  # noqa: E402
from dst_optax.finetuning.evaluator import Evaluator, option_tokens, target_scores  # noqa: E402
from dst_optax.finetuning.methods.dst import DST  # noqa: E402
from dst_optax.finetuning.methods.full import Full  # noqa: E402
from dst_optax.finetuning.methods.lora import LoRA  # noqa: E402
from dst_optax.finetuning.methods.prompt import Prompt  # noqa: E402
from dst_optax.finetuning.models import decoder, t5  # noqa: E402
from dst_optax.finetuning.models.base import flatten  # noqa: E402
from dst_optax.finetuning.steps import TrainState, make_step  # noqa: E402
from dst_optax.finetuning.tasks.jsonl import Jsonl  # noqa: E402
from dst_optax.finetuning.tasks.superglue.suite import SuperGlue  # noqa: E402
from dst_optax.subset import models  # noqa: E402

CONFIG = decoder.DecoderConfig("qwen3", 264, 16, 2, 4, 2, 4, 24, tie_embeddings=True, scan_layers=True)
RECIPE = trainer.Recipe(
    steps=2, batch_size=4, lengths={"inputs": 48, "targets": 8}, eval_every=2, eval_batch_size=72, log_every=1
)


class Bytes(seqio.ByteVocabulary):
    """Bytes as a decoder's own vocabulary: 1 ends and 2 is put before."""

    eos_ids = (1,)
    prefix_ids = (2,)

    def decode_until_end(self, ids):
        ids = ids[: ids.index(1)] if 1 in ids else ids
        return self.decode([i for i in ids if 2 < i < 259])


DATA = SuperGlue(Few(train_size=8), Bytes(), ("rte",), evaluation="options")


def test_every_method_tunes_a_decoder(tmp_path):
    adam = optax.adam(1e-2)
    methods = {
        "full": Full(adam),
        "dst": DST(adam, 0.05),
        "lora": LoRA(adam, rank=2),
        "prompt": Prompt(adam, length=3),
    }
    seed = tmp_path / "seed"
    params = decoder.CausalLM(CONFIG).init(jax.random.key(5))
    decoder.save_hf(jax.tree.map(np.asarray, params), CONFIG, seed)
    rows = trainer.finetune(str(tmp_path / "run"), DATA, CONFIG, methods, RECIPE, checkpoint=str(seed))
    found = {row["method"]: row for row in rows}
    assert set(found["seed model"]["metrics"]) == {"eval/rte/accuracy", "eval/rte/accuracy_normalised"}
    size, run = decoder.num_params(CONFIG), tmp_path / "run"
    assert found["full"]["free_params"] == size
    assert 0 < found["dst"]["free_params"] <= 0.06 * size
    matrices = [(16, 16), (16, 8), (16, 8), (16, 16), (16, 24), (16, 24), (24, 16)]
    assert found["lora"]["free_params"] == 2 * sum(2 * (a + b) for a, b in matrices)
    assert found["prompt"]["free_params"] == 3 * 16
    tuned = decoder.load(run / "full/rng_0/tuned", CONFIG)
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(tuned), jax.tree.leaves(params), strict=True))
    moved = subset.Subset.load(run / "dst/rng_0/tuned/subset").apply(params)
    differing = sum(
        int((x != y).sum()) for x, y in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
    )
    assert differing == found["dst"]["free_params"]


def test_scanned_layers_are_silos_and_tuned_like_unscanned_ones(tmp_path):
    flat, method = replace(CONFIG, scan_layers=False), DST(optax.sgd(0.1), 0.05, ties="fill")
    decoder.save_hf(cases.weights(flat), flat, tmp_path / "seed")
    pairs = [([2, 70 + i, 71], [80 + i, 81, 1]) for i in range(4)]
    found = []
    for how in ({"scan_layers": False}, {"scan_layers": True, "remat": True}):
        model = decoder.CausalLM(CONFIG).configured(**how)
        seed = jax.tree.map(jax.numpy.asarray, model.load(str(tmp_path / "seed")))
        state, step = TrainState({}, seed, method.init(seed, seed)), jax.jit(make_step(model, method))
        batch = inputs.batch_of(model, pairs, {"inputs": 5, "targets": 4})
        for _ in range(2):
            state, _ = step(state, batch, jax.random.key(0))
        table = decoder.tensors(model.config)
        tuned = subset.extract(state.tuned, state.slots)
        found.append(tuned.to_hf(table, models.open_model(tmp_path / "seed")))
    one, other = found
    assert one.keys() == other.keys() == {row.name for row in decoder.tensors(flat)}
    for name in one:
        assert len(one[name].positions) == len(other[name].positions) > 0
        both, a, b = np.intersect1d(one[name].positions, other[name].positions, return_indices=True)
        assert len(both) >= 0.9 * len(one[name].positions)
        np.testing.assert_allclose(one[name].values[a], other[name].values[b], rtol=1e-3)


def test_a_run_that_keeps_its_seed_needs_the_checkpoint_no_more(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    decoder.save_hf(cases.weights(CONFIG), CONFIG, checkpoint)
    given = (str(tmp_path / "run"), DATA, CONFIG, RECIPE)
    before = RunContext(*given, checkpoint=str(checkpoint)).seed_fingerprint
    checkpoint.rename(tmp_path / "elsewhere")
    assert RunContext(*given, checkpoint=str(checkpoint)).seed_fingerprint == before


def test_a_whole_model_is_saved_with_its_tokenizer(tmp_path, capsys):
    checkpoint, tuned = tmp_path / "checkpoint", tmp_path / "tuned"
    decoder.save_hf(cases.weights(CONFIG), CONFIG, checkpoint)
    given = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 77}
    (checkpoint / "config.json").write_text(json.dumps(given))
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "pytorch_model.bin",
        "model.safetensors.index.json",
    ):
        (checkpoint / name).write_text(name)
    context = RunContext(str(tmp_path / "run"), DATA, CONFIG, RECIPE, checkpoint=str(checkpoint))
    context.save_model(tuned, context.seed)
    assert {file.name for file in tuned.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert json.loads((tuned / "config.json").read_text())["max_position_embeddings"] == 77
    checkpoint.rename(tmp_path / "elsewhere")
    context.save_model(tmp_path / "without", context.seed)
    assert {file.name for file in (tmp_path / "without").iterdir()} == {"config.json", "model.safetensors"}
    assert "saved without the seed's tokenizer" in capsys.readouterr().out


def test_a_recipe_says_how_layers_are_computed(tmp_path):
    recipe = replace(RECIPE, scan_layers=False, remat=True)
    context = RunContext(str(tmp_path / "run"), DATA, CONFIG, recipe)
    assert context.model == decoder.CausalLM(replace(CONFIG, scan_layers=False, remat=True))
    assert set(flatten(context.seed)) == set(decoder.shapes(context.model.config))


def evaluator(data, lengths=RECIPE.lengths):
    data.register(True)
    return Evaluator(decoder.CausalLM(CONFIG), data, replace(RECIPE, lengths=lengths), placement.make_mesh())


def log_likelihood(params, inputs, targets):
    """By the network on one row without padding."""
    tokens = np.array([[*inputs, *targets]], np.int32)
    logits = decoder.Decoder(CONFIG).apply({"params": params}, tokens)[0, len(inputs) - 1 : -1]
    return float(sum(jax.nn.log_softmax(row)[token] for row, token in zip(logits, targets, strict=True)))


def test_the_likeliest_option_is_predicted():
    data = replace(DATA, names=("copa",))
    found, params = evaluator(data, {"inputs": 48, "targets": 32}), cases.weights(CONFIG)
    split = found.split("copa", "validation")
    likeliest = found.predict(params, split)
    assert set(likeliest) == {0, 1}
    metrics, score = found.score(params)
    labels = np.array([int(example["label"]) for example in split.examples])
    assert score == metrics["eval/copa/accuracy"] == pytest.approx(100 * np.mean(likeliest == labels))
    for example, prediction in list(zip(split.examples, likeliest, strict=True))[:6]:
        options = [Bytes().encode(option.decode()) for option in example["options"]]
        scores = [log_likelihood(params, example["inputs"].tolist(), option) for option in options]
        assert prediction == int(np.argmax(scores))


def test_likelihoods_are_also_divided_by_the_bytes_of_options():
    data = replace(DATA, names=("copa",))
    found, params = evaluator(data, {"inputs": 48, "targets": 32}), cases.weights(CONFIG)
    split = found.split("copa", "validation")
    labels, normalised = [], []
    for example in split.examples[:4]:
        options = [option.decode() for option in example["options"]]
        scores = [
            log_likelihood(params, example["inputs"].tolist(), Bytes().encode(option)) / len(option)
            for option in options
        ]
        labels.append(int(example["label"]))
        normalised.append(int(np.argmax(scores)))
    few = replace(split, examples=split.examples[:4])
    found._splits["copa", "validation"] = few
    metrics, _ = found.score(params)
    right = 100 * np.mean(np.array(labels) == np.array(normalised))
    assert metrics["eval/copa/accuracy_normalised"] == pytest.approx(right)


def test_an_option_that_begins_with_another_can_be_the_likeliest():
    """Without an end the shorter one always would be."""
    assert option_tokens(Bytes(), [" Obama", " Obama Jr"], 10) == [
        [*Bytes().encode(" Obama"), 1],
        [*Bytes().encode(" Obama Jr"), 1],
    ]
    assert option_tokens(Bytes(), [" yes", " no"], 4) == [Bytes().encode(" yes"), Bytes().encode(" no")]
    with pytest.raises(ValueError, match="the option ' yes' has 4 tokens, but targets only 3"):
        option_tokens(Bytes(), [" yes", " no"], 3)


def test_a_token_without_an_embedding_is_refused(tmp_path):
    """It was added to the tokenizer alone; jax would make NaN of it, hours later."""
    rows = [{"prompt": "ab", "completion": " z"}]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = replace(CONFIG, vocab_size=110)

    class Added(Bytes):
        @property
        def _base_vocab_size(self):
            return 110

    with pytest.raises(ValueError, match=r"jsonl train: example 0.* the token 125, .* only 110 rows"):
        trainer.finetune(str(tmp_path / "run"), Jsonl(str(tmp_path), Added()), small, {}, RECIPE)


def test_texts_longer_than_the_model_was_made_for_are_refused(tmp_path):
    short = replace(CONFIG, max_length=54)
    with pytest.raises(ValueError, match=r"up to 55 tokens, but the model has positions for 54"):
        RunContext(str(tmp_path / "run"), DATA, short, RECIPE)
    prompts, enough = [Prompt(optax.sgd(1.0), length=n) for n in (5, 6)], replace(CONFIG, max_length=60)
    with pytest.raises(ValueError, match=r"a soft prompt of 6 make texts of up to 61 tokens.* for 60 only"):
        RunContext(str(tmp_path / "run"), DATA, enough, RECIPE, methods=prompts)
    assert not (tmp_path / "run").exists()
    RunContext(str(tmp_path / "run"), DATA, enough, RECIPE, methods=prompts[:1])


def test_of_models_that_give_no_right_answer_the_least_perplexed_is_kept(tmp_path):
    """On free text none is exactly right, and the first evaluation would win for good."""
    rows = [{"prompt": f"{i}", "completion": f" {'abcdef' * 3}{i}"} for i in range(8)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = replace(RECIPE, steps=6, lengths={"inputs": 8, "targets": 24}, patience=2)
    data, methods = Jsonl(str(tmp_path), Bytes()), {"full": Full(optax.adam(1e-2))}
    (_, row) = trainer.finetune(str(tmp_path / "run"), data, CONFIG, methods, recipe)
    log = [json.loads(x) for x in (tmp_path / "run/full/rng_0/metrics.jsonl").read_text().splitlines()]
    perplexities = {x["step"]: x["eval/jsonl/perplexity"] for x in log if "eval/score" in x}
    assert row["score"] == 0
    assert perplexities[2] > perplexities[4] > perplexities[6]
    assert row["best_step"] == 6
    assert row["metrics"]["eval/jsonl/perplexity"] == pytest.approx(perplexities[6], rel=1e-5)


def test_options_that_are_longer_than_targets_are_told():
    data = replace(DATA)
    data.register(True)
    for length in (4, 6):  # the end needs room, too
        with pytest.raises(ValueError, match=r"option ' False' has 6 tokens.*7 or more"):
            data.check(length)
    data.check(7)


def test_scores_of_targets_are_those_of_single_rows():
    params, model = cases.weights(CONFIG), decoder.CausalLM(CONFIG)
    pairs = [([2, 70, 71], [80, 81, 1]), ([2], [90])]
    found = target_scores(model, params, inputs.batch_of(model, pairs, {"inputs": 5, "targets": 4}))
    expected = [log_likelihood(params, *pair) for pair in pairs]
    np.testing.assert_allclose(found["log_likelihood"], expected, rtol=1e-4)
    assert found["tokens"].tolist() == [3, 1]


def test_completions_are_scored_by_their_tokens_and_decoded(tmp_path):
    for split in ("train", "validation"):
        rows = [{"prompt": "ab", "completion": " cd"}, {"prompt": "x", "completion": " y"}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params, data = cases.weights(CONFIG), Jsonl(str(tmp_path), Bytes())
    found = evaluator(data)
    metrics, score = found.score(params)
    pairs = [([2, *Bytes().encode(a)], [*Bytes().encode(b), 1]) for a, b in (("ab", " cd"), ("x", " y"))]
    total = sum(log_likelihood(params, *pair) for pair in pairs)
    assert metrics["eval/jsonl/perplexity"] == pytest.approx(np.exp(-total / 7), rel=1e-4)
    assert 0 <= metrics["eval/jsonl/token_accuracy"] <= 100
    assert score == metrics["eval/jsonl/exact_match"] == 0
    model = decoder.CausalLM(CONFIG)
    said = found.predict(params, found.split("jsonl", "validation"))
    tokens = decoder.decode(model.network, params, np.array([pairs[0][0]]), np.array([3]), 8, (1,))[
        0
    ].tolist()
    assert said[0] == Bytes().decode_until_end(tokens).strip()


def test_checkpoints_of_other_models_are_told(tmp_path):
    tiny, other = t5.CONFIGS["tiny"], replace(CONFIG, scan_layers=False, mlp_dim=32)
    t5.save_hf(jax.tree.map(np.asarray, jax.jit(t5.T5(tiny).init)(jax.random.key(0))), tiny, tmp_path / "t5")
    with pytest.raises(ValueError, match="model_type 't5'"):
        decoder.CausalLM(CONFIG).load(str(tmp_path / "t5"))
    decoder.save_hf(cases.weights(other), other, tmp_path / "other")
    with pytest.raises(ValueError, match="mlp_dim is 32 there and 24 here"):
        decoder.CausalLM(CONFIG).load(str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_lora_finds_all_linear_matrices(name):
    config = cases.CONFIGS[name]
    paths = decoder.shapes(config)
    found = decoder.CausalLM(config).matrices(paths)
    assert set(found) == {p for p in paths if p.endswith("/kernel") and "lm_head" not in p}
    first = 2 * config.num_layers
    assert all("/q_proj/" in path or "/v_proj/" in path for path in found[:first])


def test_lora_of_a_model_without_matrices_is_refused():
    params = {"some": {"table": np.ones((2, 2), np.float32)}}
    with pytest.raises(ValueError, match="no matrices among some/table"):
        LoRA(optax.adam(1e-2)).split(params, jax.random.key(0), decoder.CausalLM(CONFIG))


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="dropout"):
        decoder.CausalLM(CONFIG).configured(dropout_rate=0.1)
    assert decoder.CausalLM(CONFIG).configured(dtype="bfloat16").config.dtype == "bfloat16"


def test_flattened_seed_is_placed_on_the_mesh():
    model, mesh = decoder.CausalLM(CONFIG), placement.make_mesh()
    placed = placement.place_model(model, cases.weights(CONFIG), mesh)
    assert set(flatten(placed)) == set(decoder.shapes(CONFIG))
