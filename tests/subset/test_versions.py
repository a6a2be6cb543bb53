"""Steps between versions chain to the same models, and a missing one is noticed without reading a model."""

import ml_dtypes
import numpy as np
import pytest
from oracle import bits

from dst_optax import subset
from dst_optax.subset import SubsetError, fingerprint, versions

SHAPES = {"w": (30, 50), "b": (7,), "s": (), "none": (0, 3)}


def noise(rng, shape, dtype):
    words = f"u{np.dtype(dtype).itemsize}"
    return rng.integers(0, np.iinfo(words).max, shape, words, endpoint=True).view(dtype)


def history(dtype, count=5):
    rng = np.random.default_rng(0)
    models = [{p: noise(rng, s, dtype) for p, s in SHAPES.items()}]
    for _ in range(count - 1):
        new = {}
        for p, x in models[-1].items():
            to_seed, to_noise = rng.random(x.shape) < 0.1, rng.random(x.shape) < 0.2
            new[p] = np.where(to_seed, models[0][p], np.where(to_noise, noise(rng, x.shape, dtype), x))
        models.append({p: x.astype(dtype) for p, x in new.items()})
    found = [subset.from_models(models[0], m, with_seed_values=True) for m in models]
    return models, found


def same(a, b):
    return all((bits(np.asarray(a[p])) == bits(np.asarray(b[p]))).all() for p in b)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_steps_lead_from_version_to_version(dtype):
    models, found = history(dtype)
    version = found[0]
    for i in range(1, len(models)):
        step = versions.between(found[i - 1], found[i])
        assert same(step.apply(models[i - 1]), models[i])  # its fingerprints are the version's before
        assert same(step.revert(models[i]), models[i - 1])
        exact = subset.from_models(models[i - 1], models[i])
        assert all((step[p].positions == e.positions).all() for p, e in exact.items())
        version = versions.then(version, step)
        assert same(version.apply(models[0]), models[i])
        assert version.count == found[i].count
        for p, e in version.items():
            assert versions.tuned_fingerprint(e) == fingerprint(models[i][p])


def test_a_missing_step_is_noticed():
    _, found = history(np.float32)
    late = versions.between(found[2], found[3])
    with pytest.raises(SubsetError, match="a version between them is missing"):
        versions.then(found[1], late)


def test_what_does_not_fit_is_refused():
    models, found = history(np.float32)
    bare = subset.from_models(models[0], models[1])
    with pytest.raises(SubsetError, match="seed values"):
        versions.between(found[0], bare)
    other = subset.from_models(models[1], models[2], with_seed_values=True)
    with pytest.raises(SubsetError, match="different seeds"):
        versions.between(found[1], other)
    less = subset.Subset({"w": found[1]["w"]})
    with pytest.raises(SubsetError):
        versions.between(less, found[2])
