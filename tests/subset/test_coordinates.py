"""A subset in Hugging Face's coordinates makes of their seed what save_hf makes of the tuned parameters."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import bits
from typer.testing import CliRunner

from dst_optax import subset
from dst_optax.finetuning.models import decoder, t5
from dst_optax.finetuning.models.t5 import huggingface as t5_hf
from dst_optax.subset import SubsetError, models

T5 = dataclasses.replace(
    t5.CONFIGS["tiny"], vocab_size=19, emb_dim=6, num_heads=2, head_dim=4, mlp_dim=10, num_encoder_layers=2
)
DECODER = decoder.DecoderConfig("llama", 19, 6, 3, 2, 1, 4, 10, tie_embeddings=True)
FAMILIES = {
    "t5": (t5, T5),
    "t5 stacked": (t5, dataclasses.replace(T5, scan_layers=True)),
    "t5 untied": (t5, dataclasses.replace(T5, logits_via_embedding=False)),
    "llama": (decoder, DECODER),
    "llama stacked": (decoder, dataclasses.replace(DECODER, scan_layers=True)),
    "qwen2 untied": (decoder, dataclasses.replace(DECODER, family="qwen2", tie_embeddings=False)),
    "qwen3 stacked": (decoder, dataclasses.replace(DECODER, family="qwen3", scan_layers=True)),
    "gemma3": (decoder, dataclasses.replace(DECODER, family="gemma3_text", sliding_window=4)),
}


def table_of(family, config):
    return t5_hf.tensors(config) if family is t5 else decoder.tensors(config)


def noise(rng, shape, dtype):
    words = f"u{np.dtype(dtype).itemsize}"
    return rng.integers(0, np.iinfo(words).max, shape, words, endpoint=True).view(dtype)


def tuned_of(rng, seed, share=0.2):
    return {
        p: np.where(rng.random(x.shape) < share, noise(rng, x.shape, x.dtype), x) for p, x in seed.items()
    }


def tree(flat):
    out = {}
    for path, x in flat.items():
        *keys, last = path.split("/")
        node = out
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(x)
    return out


def saved(family, flat, config, path):
    family.save_hf(tree(flat), config, path)
    return {name: np.asarray(x) for name, x in models.open_model(path).items()}


def case(name, tmp_path, dtype=np.float32):
    """Table, seed and tuned parameters by path, and both as save_hf writes them."""
    family, config = FAMILIES[name]
    rng = np.random.default_rng(0)
    seed = {p: noise(rng, shape, dtype) for p, shape in family.shapes(config).items()}
    tuned = tuned_of(rng, seed)
    written = [saved(family, x, config, tmp_path / w) for x, w in ((seed, "seed"), (tuned, "tuned"))]
    return table_of(family, config), seed, tuned, *written


def same(a, b):
    return set(a) == set(b) and all((bits(np.asarray(a[p])) == bits(np.asarray(b[p]))).all() for p in b)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_commutes_with_applying(name, dtype, tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case(name, tmp_path, dtype)
    ours = subset.from_models(seed, tuned, with_seed_values=True)
    for given in (hf_seed, seed):  # the seed may be given on either side
        theirs = ours.to_hf(table, given)
        assert same(theirs.apply(hf_seed), hf_tuned)
        assert same(theirs.revert(hf_tuned), hf_seed)
        assert theirs.count == ours.count
        again = theirs.from_hf(table, given)
        assert same(again.apply(seed), tuned)
        assert same(again.revert(tuned), seed)
        assert all(again[p].seed_fingerprint == e.seed_fingerprint for p, e in ours.items())


def test_another_seed_is_refused_on_both_sides(tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case("llama", tmp_path)
    ours = subset.from_models(seed, tuned)
    theirs = ours.to_hf(table, hf_seed)
    for wrong in (hf_tuned, tuned):
        with pytest.raises(SubsetError, match="is not the seed"):
            ours.to_hf(table, wrong)
        with pytest.raises(SubsetError, match="is not the seed"):
            theirs.from_hf(table, wrong)
    with pytest.raises(SubsetError, match="neither"):
        ours.to_hf(table, {"a": np.zeros(3)})
    with pytest.raises(SubsetError, match="astype"):
        ours.to_hf(table, {n: np.zeros(x.shape) for n, x in hf_seed.items()})
    with pytest.raises(SubsetError, match="already"):
        theirs.to_hf(table, hf_seed)


def test_a_copy_of_a_tied_tensor_that_became_another_is_refused(tmp_path):
    table, _, _, hf_seed, hf_tuned = case("llama", tmp_path)
    seed = hf_seed | {"lm_head.weight": hf_seed["model.embed_tokens.weight"]}
    tuned = hf_tuned | {"lm_head.weight": hf_tuned["model.embed_tokens.weight"]}
    both = subset.from_models(seed, tuned)
    assert both.from_hf(table, seed).count == subset.from_models(hf_seed, hf_tuned).count
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # one of them alone
        only = subset.from_models(seed, seed | {name: hf_tuned["model.embed_tokens.weight"]})
        says = r"'lm_head.weight' and 'model.embed_tokens.weight' are one tensor"
        with pytest.raises(SubsetError, match=says):
            only.from_hf(table, seed)


@pytest.mark.parametrize("name", ["llama stacked", "t5 stacked"])
def test_rows_may_come_in_any_order(name, tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case(name, tmp_path)
    ours, theirs = subset.from_models(seed, tuned), subset.from_models(hf_seed, hf_tuned)
    assert same(theirs.from_hf(table[::-1], hf_seed).apply(seed), tuned)
    assert same(ours.to_hf(table[::-1], hf_seed).apply(hf_seed), hf_tuned)
    missing = next(row for row in table if row.layer == 0)
    twice = next(row for row in table if (row.path, row.layer) == (missing.path, 1))
    for wrong in ([row for row in table if row is not missing], [*table, twice]):
        for convert, given in ((theirs.from_hf, hf_seed), (ours.to_hf, seed)):
            with pytest.raises(SubsetError, match=f"{missing.path!r} has the layers .* in the table"):
                convert(wrong, given)


@pytest.mark.parametrize("name", ["llama", "t5 stacked"])
def test_only_a_seed_that_is_recognised_is_vouched_for(name, tmp_path):
    """As one that is cast back to what the subset was made for."""
    family, config = FAMILIES[name]
    rng = np.random.default_rng(0)
    halves = {p: rng.normal(size=s).astype(ml_dtypes.bfloat16) for p, s in family.shapes(config).items()}
    seed = {p: x.astype(np.float32) for p, x in halves.items()}
    tuned = {p: x + (rng.random(x.shape) < 0.2).astype(np.float32) for p, x in seed.items()}
    right, wrong = (
        saved(family, x, config, tmp_path / where)
        for where, x in (("right", halves), ("wrong", {p: x + 1 for p, x in halves.items()}))
    )
    table = table_of(family, config)
    for stored in (False, True):
        ours = subset.from_models(seed, tuned, with_seed_values=stored).astype(ml_dtypes.bfloat16)
        theirs = ours.to_hf(table, right)
        assert all(theirs[n].seed_fingerprint == subset.fingerprint(x) for n, x in right.items())
        if stored:
            with pytest.raises(SubsetError, match=r"is not the seed's .* it differs from the seed values"):
                ours.to_hf(table, wrong)
            continue
        unknown = ours.to_hf(table, wrong)
        assert {e.seed_fingerprint for e in unknown.values()} == {None}
        assert {e.seed_fingerprint for e in unknown.from_hf(table, wrong).values()} == {None}


def test_composed_subsets_keep_their_coordinates(tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case("llama", tmp_path)
    theirs = subset.from_models(seed, tuned).to_hf(table, hf_seed)
    both = subset.compose([theirs, theirs])
    with pytest.raises(SubsetError, match="already"):
        both.to_hf(table, hf_seed)
    assert same(both.apply(hf_seed), hf_tuned)


def test_another_models_table_is_refused(tmp_path):
    _, seed, tuned, hf_seed, _ = case("llama", tmp_path)
    ours = subset.from_models(seed, tuned)
    for config in (
        dataclasses.replace(DECODER, scan_layers=True),
        dataclasses.replace(DECODER, num_layers=4),
        dataclasses.replace(DECODER, mlp_dim=12),
    ):
        with pytest.raises(SubsetError, match=r"lacks|the model"):
            ours.to_hf(decoder.tensors(config), hf_seed)


def test_a_checkpoint_with_more_tensors_keeps_the_seed_values(tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case("llama", tmp_path)
    more = {"rotary_emb.inv_freq": np.ones(3, np.float32)}
    theirs = subset.from_models(seed, tuned, with_seed_values=True).to_hf(table, hf_seed | more)
    assert same(theirs.revert(hf_tuned | more), hf_seed | more)


def test_a_seed_of_another_shape_is_refused(tmp_path):
    table, seed, tuned, hf_seed, _ = case("llama", tmp_path)
    name = next(row.name for row in table if row.transposed)
    with pytest.raises(SubsetError, match=f"{name!r} is .* in the seed, .* in the model"):
        subset.from_models(seed, tuned).to_hf(table, hf_seed | {name: hf_seed[name][:-1]})


def test_what_only_the_checkpoint_has_stays(tmp_path):
    table, seed, tuned, hf_seed, hf_tuned = case("t5", tmp_path)
    extra = {
        "unread.weight": np.ones((2, 3), np.float32),
        "encoder.embed_tokens.weight": hf_seed["shared.weight"],
    }
    theirs = subset.from_models(seed, tuned).to_hf(table, hf_seed | extra)
    found = theirs.apply(hf_seed | extra)
    assert same({"x": found["unread.weight"]}, {"x": extra["unread.weight"]})
    assert same({"x": found["encoder.embed_tokens.weight"]}, {"x": hf_tuned["shared.weight"]})
    assert same(theirs.from_hf(table, hf_seed | extra).apply(seed), tuned)
    changed = subset.from_models(
        hf_seed | extra, hf_tuned | extra | {"unread.weight": np.zeros((2, 3), np.float32)}
    )
    with pytest.raises(SubsetError, match=r"'unread.weight' has 6 entries"):
        changed.from_hf(table, hf_seed | extra)


@pytest.mark.parametrize("name", ["t5 stacked", "qwen3 stacked"])
def test_the_command(name, tmp_path):
    from dst_optax.subset_cli import app

    _, seed, tuned, _, hf_tuned = case(name, tmp_path)
    subset.from_models(seed, tuned).save(tmp_path / "ours")
    arguments = ["--seed", str(tmp_path / "seed")]
    run = CliRunner().invoke
    to_hf = run(
        app, ["convert", str(tmp_path / "ours"), "--to", "hf", *arguments, "--out", str(tmp_path / "hf")]
    )
    assert to_hf.exit_code == 0, to_hf.output
    applied = run(
        app, ["apply", *arguments, "--subset", str(tmp_path / "hf"), "--out", str(tmp_path / "applied")]
    )
    assert applied.exit_code == 0, applied.output
    assert same(models.open_model(tmp_path / "applied"), hf_tuned)
    back = [
        "convert",
        str(tmp_path / "hf"),
        "--to",
        "jax",
        "--stacked",
        *arguments,
        "--out",
        str(tmp_path / "back"),
    ]
    assert run(app, back).exit_code == 0
    assert same(subset.Subset.load(tmp_path / "back").apply(seed), tuned)
    for wrong in (["--to", "tf"], ["--to", "hf", "--stacked"]):
        out = [*wrong, *arguments, "--out", str(tmp_path / "no")]
        assert run(app, ["convert", str(tmp_path / "ours"), *out]).exit_code == 2
    assert not (tmp_path / "no").exists()
