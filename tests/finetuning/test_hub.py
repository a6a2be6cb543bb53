"""Names of models on the hub, from a made cache and without a network."""

import fnmatch
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

constants = pytest.importorskip("huggingface_hub.constants")

from dst_optax.finetuning import hub  # noqa: E402

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache as the hub's client makes it, with two revisions of a model, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = tmp_path / "cache" / "models--google--t5-v1_1-small"
    (model / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        (model / "refs" / name).write_text(commit)
        (model / "snapshots" / commit).mkdir(parents=True)
        (model / "snapshots" / commit / "config.json").write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("google/t5-v1_1-small", "main"),
        ("google/t5-v1_1-small@v2", "v2"),
        (f"google/t5-v1_1-small@{COMMITS['v2']}", "v2"),
    ],
)
def test_a_cached_model_is_found_offline(name, revision):
    found = Path(hub.local_path(name))
    assert found.name == COMMITS[revision]
    assert (found / "config.json").read_text() == revision


@pytest.mark.parametrize(("given", "weights"), [((), True), ((hub.SETTINGS,), False)])
def test_weights_are_downloaded_only_where_they_are_wanted(monkeypatch, given, weights):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **kw: asked.extend(kw["allow_patterns"])
    )
    hub.local_path("owner/model", *given)
    assert any(fnmatch.fnmatch("tokenizer.json", pattern) for pattern in asked)
    assert any(fnmatch.fnmatch("model.safetensors", pattern) for pattern in asked) == weights


def test_local_paths_win(cache):
    (cache / "google" / "t5-v1_1-small").mkdir(parents=True)
    assert hub.local_path("google/t5-v1_1-small") == "google/t5-v1_1-small"


@pytest.mark.parametrize("path", ["/absent/x", "./a/b", "absent", "a/b/c"])
def test_what_is_no_name_stays_a_path(path):
    assert hub.local_path(path) == path


def test_a_path_in_an_object_store_is_refused():
    with pytest.raises(ValueError, match="checkpoint: gs://bucket/x lies in an object store"):
        hub.local_path("gs://bucket/x")


@pytest.mark.parametrize("name", ["google/absent", "google/t5-v1_1-small@v3"])
def test_neither_cache_nor_network(name):
    with pytest.raises(ValueError, match=r"neither a path nor in the .* cache.*hf download google/"):
        hub.local_path(name)


def test_the_client_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"a/b does not exist.*dst-optax\[hub\]"):
        hub.local_path("a/b")


@pytest.mark.parametrize("family", ["t5", "decoder"])
def test_a_model_without_safetensors_is_told(family):
    """The hub has old models with pickled weights only, which are not even downloaded."""
    from dst_optax.finetuning.models import decoder, t5

    load, config = {
        "t5": (t5.load, t5.CONFIGS["tiny"]),
        "decoder": (decoder.load, decoder.CONFIGS["smollm2_135m"]),
    }[family]
    with pytest.raises(ValueError, match=r"google--t5.* has no safetensors.*save_pretrained"):
        load(hub.local_path("google/t5-v1_1-small"), config)


def test_a_run_starts_from_a_cached_model(cache):
    for needed in ("seqio", "orbax.checkpoint", "clu", "rich", "tensorboard", "matplotlib"):
        pytest.importorskip(needed)
    import seqio

    from dst_optax.finetuning.context import RunContext
    from dst_optax.finetuning.models import t5
    from dst_optax.finetuning.recipe import Recipe
    from dst_optax.finetuning.tasks.superglue.sources import SyntheticSource
    from dst_optax.finetuning.tasks.superglue.suite import SuperGlue

    model = t5.T5Config(
        vocab_size=384,
        emb_dim=8,
        num_heads=1,
        head_dim=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        mlp_dim=8,
    )
    random = np.random.default_rng(0)
    drawn = {path: random.standard_normal(shape, np.float32) for path, shape in t5.shapes(model).items()}
    seed = t5.parameters.unflatten(drawn)
    t5.save_hf(seed, model, cache / "cache/models--google--t5-v1_1-small/snapshots" / COMMITS["main"])
    data = SuperGlue(SyntheticSource(train_size=8), seqio.ByteVocabulary(), "rte")
    recipe = Recipe(steps=1, lengths={"inputs": 64, "targets": 16})
    context = RunContext("run", data, model, recipe, checkpoint="google/t5-v1_1-small")
    jax.tree.map(np.testing.assert_array_equal, context.seed, seed)
