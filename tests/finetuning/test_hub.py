"""Names of models on the hub, from a made cache and without a network."""

import sys

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from dst_optax.finetuning import hub  # noqa: E402

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache as the hub's client makes it, with two revisions of a model, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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
    path = hub.local_path(name)
    assert path.endswith(COMMITS[revision])
    assert open(path + "/config.json").read() == revision


def test_local_paths_win(cache):
    (cache / "google" / "t5-v1_1-small").mkdir(parents=True)
    assert hub.local_path("google/t5-v1_1-small") == "google/t5-v1_1-small"


@pytest.mark.parametrize("path", ["/absent/x", "gs://bucket/x", "./a/b", "absent", "a/b/c"])
def test_what_is_no_name_stays_a_path(path):
    assert hub.local_path(path) == path


@pytest.mark.parametrize("name", ["google/absent", "google/t5-v1_1-small@v3"])
def test_neither_cache_nor_network(name):
    with pytest.raises(ValueError, match=r"neither a path nor in the .* cache.*hf download google/"):
        hub.local_path(name)


def test_the_client_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"a/b does not exist.*dst-optax\[hub\]"):
        hub.local_path("a/b")
