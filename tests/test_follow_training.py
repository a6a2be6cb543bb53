"""A server that is sent only what changed has each version of the trainer, bit for bit."""

import decoder_cases as cases
import numpy as np
import pytest

pytest.importorskip("flax")

import follow_training

from dst_optax import subset
from dst_optax.finetuning.models import decoder
from dst_optax.finetuning.models.base import flatten, unflatten
from dst_optax.subset import SubsetError, models

CONFIG = cases.CONFIGS["llama"]


@pytest.fixture
def run(tmp_path):
    """A seed, snapshots of three steps, and the checkpoint that each of them means."""
    rng, seed = np.random.default_rng(0), flatten(cases.weights(CONFIG))
    decoder.save_hf(unflatten(seed), CONFIG, tmp_path / "seed")
    wanted = []
    for step in range(1, 4):
        tuned = {p: np.where(rng.random(x.shape) < 0.1, x * 1.5, x) for p, x in seed.items()}
        found = subset.from_models(unflatten(seed), unflatten(tuned))
        found.save(tmp_path / "snapshots" / f"{step:08d}" / "subset")
        decoder.save_hf(unflatten(tuned), CONFIG, tmp_path / f"tuned{step}")
        wanted.append({n: np.asarray(x) for n, x in models.open_model(tmp_path / f"tuned{step}").items()})
    return tmp_path, wanted


def sent(root):
    return list(follow_training.changes(root / "snapshots", str(root / "seed"), root / "steps"))


def test_every_version_arrives(run):
    root, wanted = run
    assert len(sent(root)) == 3
    seed, served = models.open_model(root / "seed"), []
    serve = lambda name, version: served.append((name, version.apply(seed)))  # noqa: E731
    assert len(list(follow_training.follow(root / "steps", str(root / "seed"), serve))) == 3
    assert [name for name, _ in served] == ["step00000001", "step00000002", "step00000003"]
    for (_, found), model in zip(served, wanted, strict=True):
        assert all(np.asarray(found[n]).tobytes() == x.tobytes() for n, x in model.items())


def test_a_server_is_given_by_both_its_options(monkeypatch, capsys):
    options = ["snapshots", "--checkpoint", "seed", "--steps", "steps", "--url", "http://localhost:8000"]
    monkeypatch.setattr("sys.argv", ["follow_training.py", *options])
    with pytest.raises(SystemExit):
        follow_training.main()
    assert "--url needs --root" in capsys.readouterr().err


def test_a_missing_step_is_told(run):
    root, _ = run
    sent(root)
    (root / "steps" / "00000002").rename(root / "lost")
    with pytest.raises(SubsetError, match="a version between them is missing"):
        list(follow_training.follow(root / "steps", str(root / "seed"), lambda name, version: None))


def test_a_pytorch_model_becomes_each_version(run):
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    root, wanted = run
    sent(root)
    serve, models_served = follow_training.torch_server(str(root / "seed")), []

    def look(name, version):
        model = serve(name, version)
        models_served.append({n: x.detach().numpy().tobytes() for n, x in model.named_parameters()})

    list(follow_training.follow(root / "steps", str(root / "seed"), look))
    for found, model in zip(models_served, wanted, strict=True):
        assert found == {n: x.tobytes() for n, x in model.items()}
