"""A run's subset is exported for the checkpoint that it started from, in the checkpoint's own dtype."""

import json

import ml_dtypes
import numpy as np
import pytest

from dst_optax import subset
from dst_optax.finetuning.models import decoder, huggingface
from dst_optax.subset import models

CONFIG = decoder.DecoderConfig("llama", 19, 6, 2, 2, 1, 4, 10, tie_embeddings=True)


def nested(flat):
    out = {}
    for path, x in flat.items():
        *keys, last = path.split("/")
        node = out
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = x
    return out


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_float32_run_is_exported_for_its_checkpoint(tmp_path, dtype):
    rng = np.random.default_rng(0)
    checkpoint = {p: rng.normal(size=shape).astype(dtype) for p, shape in decoder.shapes(CONFIG).items()}
    decoder.save_hf(nested(checkpoint), CONFIG, tmp_path / "checkpoint")
    seed = {p: x.astype(np.float32) for p, x in checkpoint.items()}
    tuned = {p: np.where(rng.random(x.shape) < 0.2, x * 1.1, x).astype(np.float32) for p, x in seed.items()}
    subset.from_models(seed, tuned).save(tmp_path / "subset")
    huggingface.export_subset(tmp_path, tmp_path / "checkpoint")
    decoder.save_hf(nested({p: x.astype(dtype) for p, x in tuned.items()}), CONFIG, tmp_path / "tuned")
    wanted = models.open_model(tmp_path / "tuned")
    found = subset.Subset.load(tmp_path / "subset_hf").apply(models.open_model(tmp_path / "checkpoint"))
    assert set(found) == set(wanted)
    assert all((np.asarray(found[p]) == np.asarray(x)).all() for p, x in wanted.items())


def test_models_of_no_family_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json"):
        huggingface.tensors_of(tmp_path, stacked=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="gpt2"):
        huggingface.tensors_of(tmp_path, stacked=False)
