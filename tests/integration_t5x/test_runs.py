"""Whole runs of T5X: pre-training, DST from its checkpoints, resumption, meshes, evaluation."""

import json
import os
import signal
import time

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

pytest.importorskip("t5x.models", reason="needs T5X itself; docs/t5x.md says how to install it")

import t5x_runs as runs
from real_data import REAL_DATA, needs_data

from dst_optax.subset import Subset
from t5x_integration import export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("t5x"),
    pytest.mark.filterwarnings("default"),  # T5X speaks to other authors
]

PRE, END, EVERY = 4, 10, 2
WAYS = {
    "wrapper": (runs.DST,),
    "chain": (runs.DST, "tests/integration_t5x/chain.gin"),
    "multi": (runs.DST, "tests/integration_t5x/multi.gin"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where the runs lie; programs are compiled once for all of them."""
    directory = tmp_path_factory.mktemp("t5x")
    known = {
        "jax_compilation_cache_dir": str(directory / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in known}
    for name, value in known.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name.upper(), str(value))
        yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def pretrained(root):
    """Checkpoints of a pre-training with Adafactor, one in each format."""
    found = {}
    for kind, orbax in (("orbax", True), ("legacy", False)):
        runs.train(root / kind, PRE, f"train.use_orbax={orbax}", files=())
        found[kind] = root / kind / f"checkpoint_{PRE}"
    assert (found["legacy"] / "checkpoint").is_file()
    assert not (found["orbax"] / "checkpoint").exists()
    return found


@pytest.fixture(scope="module")
def tuned(root, pretrained):
    made = {}

    def tune(way, kind):
        if (way, kind) not in made:
            directory = root / f"{way}_{kind}"
            runs.train(directory, END, files=WAYS[way], initial=pretrained[kind])
            made[way, kind] = directory
        return made[way, kind]

    return tune


@pytest.mark.parametrize("kind", ["orbax", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_budget_at_every_checkpoint(tuned, pretrained, way, kind):
    seed = runs.model(runs.arrays(pretrained[kind]))
    sizes = {}
    for step in range(PRE, END + 1, EVERY):
        found = runs.arrays(tuned(way, kind) / f"checkpoint_{step}")
        sizes[step] = runs.check_budget(seed, runs.model(found))
        prefix = "state/param_states/1/seed/" if way == "chain" else "state/dst/seed/"
        kept = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
        if step > PRE:
            runs.assert_same(kept, seed)
    assert sizes[PRE] == 0 < sizes[PRE + EVERY]


@pytest.mark.parametrize("kind", ["orbax", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_the_seed_of_a_run_from_a_tuned_model_is_that_model(root, tuned, way, kind):
    start, second = tuned(way, kind) / f"checkpoint_{END}", root / f"{way}_{kind}_again"
    runs.train(second, END + EVERY, files=WAYS[way], initial=start)
    seed = runs.model(runs.arrays(start))
    found = runs.arrays(second / f"checkpoint_{END + EVERY}")
    assert runs.check_budget(seed, runs.model(found)) > 0
    prefix = "state/param_states/1/" if way == "chain" else "state/dst/"
    assert found[f"{prefix}step"] == EVERY
    kept = {name.removeprefix(f"{prefix}seed/"): x for name, x in found.items() if f"{prefix}seed/" in name}
    runs.assert_same(kept, seed)


def test_the_wrapper_keeps_the_pretrained_slots(tuned, pretrained):
    before = runs.arrays(pretrained["legacy"])
    first = runs.arrays(tuned("wrapper", "legacy") / f"checkpoint_{PRE}")
    slots = [name for name in before if name.startswith("state/")]
    assert len(slots) > 50
    runs.assert_same({name: before[name] for name in slots}, {name: first[name] for name in slots})
    assert any(before[name].any() for name in slots if name.endswith("v_row"))


@pytest.mark.parametrize("way", WAYS)
def test_resumption_is_exact(root, tuned, pretrained, way):
    stopped = root / f"{way}_stopped"
    for step in (PRE + EVERY, END):
        runs.train(stopped, step, files=WAYS[way], initial=pretrained["orbax"])
    runs.assert_same(
        runs.arrays(stopped / f"checkpoint_{END}"), runs.arrays(tuned(way, "orbax") / f"checkpoint_{END}")
    )


def test_resumption_after_kill_while_saving_is_exact(root, tuned, pretrained):
    killed = root / "killed"
    files, bindings = runs.flags(killed, END, initial=pretrained["orbax"])
    process = runs.start("train", files, bindings, root / "killed.log")
    deadline = time.time() + 600
    while not list(killed.glob(f"checkpoint_{PRE + 2 * EVERY}*tmp*")):
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / f"checkpoint_{PRE + 2 * EVERY}").exists()
    runs.train(killed, END, initial=pretrained["orbax"])
    runs.assert_same(
        runs.arrays(killed / f"checkpoint_{END}"),
        runs.arrays(tuned("wrapper", "orbax") / f"checkpoint_{END}"),
    )


def test_another_seed_in_the_same_directory_is_refused(tuned, pretrained):
    directory = tuned("wrapper", "orbax")
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH"):
        runs.train(directory, END + EVERY, initial=pretrained["legacy"])
    assert sorted(directory.rglob("*")) == before


def test_a_run_of_dst_is_not_resumed_without_it(tuned, pretrained):
    directory = tuned("wrapper", "orbax")
    before = sorted(directory.rglob("*"))
    with pytest.raises(ValueError, match=r"add --gin_file=.*dst\.gin"):
        runs.train(directory, END + EVERY, files=(), initial=pretrained["orbax"])
    with pytest.raises(ValueError, match=r"OPTIMIZER after .*dst\.gin"):
        runs.train(directory, END + EVERY, "OPTIMIZER=%INNER_OPTIMIZER", initial=pretrained["orbax"])
    assert sorted(directory.rglob("*")) == before


def test_the_corrected_command_runs_where_the_wrong_one_failed(root, pretrained):
    directory, other = root / "corrected", pretrained["orbax"].with_name("checkpoint_3")
    with pytest.raises(ValueError, match=rf"checkpoint_3 is no checkpoint.*checkpoint_{PRE}"):
        runs.train(directory, PRE, initial=other)
    with pytest.raises(ValueError, match="in the checkpoint and"):
        runs.train(directory, PRE, "network.T5Config.mlp_dim=32", initial=pretrained["orbax"])
    runs.train(directory, PRE + EVERY, initial=pretrained["legacy"])
    seed = runs.model(runs.arrays(pretrained["legacy"]))
    runs.assert_same(runs.model(runs.arrays(directory / f"checkpoint_{PRE}")), seed)


BFLOAT16 = 'utils.SaveCheckpointConfig.dtype="bfloat16"'


def test_resumption_with_bfloat16_is_exact_where_t5x_does_not_round(root, tuned, pretrained):
    directory = root / "bfloat16_orbax"
    for step in (PRE + EVERY, END):
        runs.train(directory, step, BFLOAT16, initial=pretrained["orbax"])
    runs.assert_same(
        runs.arrays(directory / f"checkpoint_{END}"),
        runs.arrays(tuned("wrapper", "orbax") / f"checkpoint_{END}"),
    )


def test_resumption_from_rounded_parameters_keeps_the_seed(root, tmp_path, pretrained):
    directory, settings = root / "bfloat16_legacy", (BFLOAT16, "train.use_orbax=False")
    for step in (PRE + EVERY, END):
        runs.train(directory, step, *settings, initial=pretrained["legacy"])
    seed = runs.model(runs.arrays(pretrained["legacy"]))
    saved = runs.model(runs.arrays(directory / f"checkpoint_{END}"))
    assert {x.dtype.name for x in saved.values()} == {"bfloat16"}
    assert runs.check_budget({name: x.astype("bfloat16") for name, x in seed.items()}, saved) > 0
    export.export(directory, tmp_path / "subset")
    found = Subset.load(tmp_path / "subset").apply(seed)
    runs.check_budget(seed, found)
    runs.assert_same({name: x.astype("bfloat16") for name, x in found.items()}, saved)


def test_a_misspelt_setting_ends_the_program(root, pretrained):
    files, bindings = runs.flags(root / "misspelt", END, "FRACTON=0.1", initial=pretrained["orbax"])
    process = runs.start("train", files, bindings, root / "misspelt.log")
    assert process.wait(timeout=300) != 0
    assert "did you mean FRACTION?" in (root / "misspelt.log").read_text()
    assert not (root / "misspelt").exists()


def test_on_a_mesh(root, pretrained):
    directory = root / "mesh"
    submesh = ["PjitPartitioner.num_partitions=None", "PjitPartitioner.model_parallel_submesh=(1, 2)"]
    files, bindings = runs.flags(directory, END, *submesh, initial=pretrained["orbax"])
    process = runs.start("train", files, bindings, root / "mesh.log", devices=8)
    assert process.wait(timeout=900) == 0, (root / "mesh.log").read_text()[-6000:]
    seed = runs.model(runs.arrays(pretrained["orbax"]))
    assert runs.check_budget(seed, runs.model(runs.arrays(directory / f"checkpoint_{END}"))) > 0
    specs = runs.shardings(directory / f"checkpoint_{END}")
    assert {str(specs[f"target/{name}"]) for name in seed} != {str(None)}
    for name in seed:
        assert specs[f"state/dst/seed/{name}"] == specs[f"target/{name}"]
    assert any("model" in str(specs[f"target/{name}"]) for name in seed)


@pytest.mark.parametrize("kind", ["orbax", "legacy"])
@pytest.mark.parametrize("given", [True, False])
def test_export(tmp_path, tuned, pretrained, kind, given):
    checkpoint = tuned("wrapper", kind) / f"checkpoint_{END}"
    export.export(checkpoint, tmp_path / "subset", pretrained[kind] if given else None)
    seed, want = (runs.model(runs.arrays(x)) for x in (pretrained[kind], checkpoint))
    found = Subset.load(tmp_path / "subset")
    assert found.count == runs.check_budget(seed, want)
    runs.assert_same(found.apply(seed), want)


def test_export_before_the_first_step_asks_for_the_seed(tmp_path, tuned):
    with pytest.raises(ValueError, match="seed"):
        export.export(tuned("chain", "orbax") / f"checkpoint_{PRE}", tmp_path / "subset")
    assert not list(tmp_path.iterdir())


@needs_data
def test_cb_through_training_and_evaluation(root):
    """The official CB with T5's vocabulary; a subset on its seed predicts what the tuned model does."""
    vocabulary = f'seqio.SentencePieceVocabulary.sentencepiece_model_file="{REAL_DATA}/t5_vocab/spiece.model"'
    official = ["SOURCE=@sources.JsonlSource()", f'sources.JsonlSource.directory="{REAL_DATA}/superglue"']
    data = [vocabulary, *official]
    small, own = "t5x/examples/t5/t5_1_1/small.gin", "tests/integration_t5x/cb.gin"

    def train(name, steps, files, initial):
        directory = f'MODEL_DIR="{root / name}"'
        settings = [
            directory,
            "DROPOUT_RATE=0.0",
            f"TRAIN_STEPS={steps}",
            f"INITIAL_CHECKPOINT_PATH={initial}",
            "EVAL_STEPS=1",
        ]
        settings += ["BATCH_SIZE=8", f"EVAL_PERIOD={steps}", f"utils.SaveCheckpointConfig.period={steps}"]
        runs.call("train", [small, "configs/t5x/superglue.gin", own, *files], [*settings, *data])
        return root / name / f"checkpoint_{steps}"

    def evaluate(checkpoint, name, *more, split="validation"):
        files = [small, "t5x/configs/runs/eval.gin", "configs/t5x/superglue_tasks.gin", own]
        where = [f'CHECKPOINT_PATH="{checkpoint}"', f'EVAL_OUTPUT_DIR="{root / name}"']
        where += [f'utils.DatasetConfig.split="{split}"', *(b for b in more if "=" in b)]
        runs.call("eval", [*files, *(f for f in more if "=" not in f)], [*where, *data])
        found = (root / name / "inference_eval").glob("superglue_cb-0*.jsonl")
        return [json.loads(line)["prediction"] for line in next(found).read_text().splitlines()]

    seed = train("cb_seed", 4, (), "[]")
    tuned = train("cb_tuned", 8, (runs.DST, "tests/integration_t5x/fast.gin"), f'"{seed}"')
    before, after = (runs.model(runs.arrays(x)) for x in (seed, tuned))
    assert runs.check_budget(before, after, 0.01) > 0
    metrics = root / "cb_tuned" / "inference_eval" / "superglue_cb-metrics.jsonl"
    assert {"accuracy", "f1"} <= set(json.loads(metrics.read_text().splitlines()[-1]))

    export.export(root / "cb_tuned", root / "cb_subset")
    want = evaluate(tuned, "cb_eval")
    assert len(want) == 56
    assert (
        evaluate(seed, "cb_subset_eval", "configs/t5x/subset.gin", f'SUBSET="{root / "cb_subset"}"') == want
    )
    with pytest.raises(ValueError, match="fingerprint"):
        evaluate(tuned, "cb_wrong_eval", "configs/t5x/subset.gin", f'SUBSET="{root / "cb_subset"}"')
    with pytest.raises(ValueError, match="cb: an example has no label"):  # what T5X's eval.gin takes
        evaluate(tuned, "cb_test_eval", split="test")
