"""A serving host reads, inspects, applies and checks subsets where jax, optax and flax are not installed."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dst_optax import subset
from dst_optax.subset import fingerprint_jax, models
from dst_optax.subset.fingerprint_numpy import lanes

PROGRAM = """
import collections
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "optax", "flax", "orbax", "tensorflow", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import numpy as np
import dst_optax.serving
from dst_optax.subset import Subset, SubsetError, compose, models

found = Subset.load(sys.argv[1])
seed, tuned = (dict(models.open_model(path)) for path in sys.argv[2:4])
applied = found.apply(seed)
assert list(applied) == list(tuned)
assert all(applied[p].tobytes() == tuned[p].tobytes() for p in tuned)
assert all(found.revert(applied)[p].tobytes() == seed[p].tobytes() for p in seed)
assert compose([found, found]).count == found.count
models.apply_to_files(found, sys.argv[2], sys.argv[4])
found.save(sys.argv[5])
try:
    found.apply(tuned)
except SubsetError as e:
    assert "is not the seed's" in str(e)
else:
    raise AssertionError
nested = Subset({"a/w": found["w"], "c/0": found["b"]})
assert nested.apply({"c": [seed["b"]], "a": {"w": seed["w"]}})["c"][0].tobytes() == tuned["b"].tobytes()
Layer = collections.namedtuple("Layer", ["w", "b"])
nested = Subset({"x/w": found["w"], "x/b": found["b"]})
made = nested.apply(collections.OrderedDict(x=Layer(seed["w"], seed["b"])))
assert (type(made), type(made["x"])) == (collections.OrderedDict, Layer)
assert made["x"].b.tobytes() == tuned["b"].tobytes()
assert not {"jax", "optax", "flax", "torch"} & set(sys.modules)
"""


def test_a_subset_is_read_and_applied(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"w": ((300, 500), np.float32), "b": ((7,), ml_dtypes.bfloat16), "d": ((3, 4), np.float64)}
    seed = {p: rng.normal(size=shape).astype(dtype) for p, (shape, dtype) in shapes.items()}
    tuned = {p: np.where(rng.random(x.shape) < 0.3, -x, x).astype(x.dtype) for p, x in seed.items()}
    for name, model in (("seed", seed), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(model, tmp_path / name / "model.safetensors")
    subset.from_models(seed, tuned, with_seed_values=True).save(tmp_path / "subset")
    paths = [str(tmp_path / name) for name in ("subset", "seed", "tuned", "applied", "again")]
    subprocess.run([sys.executable, "-c", PROGRAM, *paths], check=True, timeout=120)
    assert (models.open_model(tmp_path / "applied")["w"] == tuned["w"]).all()
    again = subset.Subset.load(tmp_path / "again")
    assert all((again.apply(seed)[p] == x).all() for p, x in tuned.items())


@pytest.mark.parametrize("size", [0, 1, 4095, 2**16 + 3, 2**20 + 5])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64, np.uint8, np.bool_])
def test_numpy_and_compiled_programs_give_one_fingerprint(size, dtype):
    bits = np.random.default_rng(size).integers(0, 2, size * np.dtype(dtype).itemsize, np.uint8)
    x = bits.view(dtype)
    assert (lanes(x) == np.asarray(fingerprint_jax.lanes(x))).all()
