"""Position coding, fingerprints and files: round trips, entropy, checks."""

import dataclasses
import errno
import hashlib
import itertools
import json
import pathlib
import re
import threading

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bits

from dst_optax import subset
from dst_optax.subset import Entries, Subset, SubsetError, files, fingerprint, fingerprint_numpy, gaps

STRATEGY = st.one_of(
    st.sets(st.integers(0, 400)).map(sorted),
    st.sets(st.integers(0, 2**43), max_size=300).map(sorted),
    st.tuples(st.integers(0, 2**40), st.integers(0, 700), st.integers(1, 2**20)).map(
        lambda t: list(range(t[0], t[0] + t[1] * t[2], t[2]))
    ),
)


@settings(max_examples=200, deadline=None)
@given(STRATEGY, st.integers(0, 10))
def test_positions_survive_coding(positions, extra):
    size = (positions[-1] + 1 if positions else 0) + extra
    stream = gaps.encode(np.array(positions, np.int64))
    out = gaps.decode(stream, len(positions), size)
    assert out.tolist() == positions
    assert out.dtype == (np.int32 if size <= 2**31 else np.int64)
    for wrong in (len(positions) + 1, len(positions) - 1):
        with pytest.raises(SubsetError):
            gaps.decode(stream, wrong, size)
    if positions:
        with pytest.raises(SubsetError):
            gaps.decode(stream, len(positions), positions[-1])
        with pytest.raises(SubsetError):
            gaps.decode(stream[:-1], len(positions), size)
        with pytest.raises(SubsetError, match="too many"):
            gaps.decode(stream + b"\0", len(positions), size)


def test_long_streams_have_segments():
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(3_000_000) < 0.1)
    assert len(positions) > 2 * gaps.SEGMENT
    assert (gaps.decode(gaps.encode(positions), len(positions), 3_000_000) == positions).all()
    dense = np.arange(2 * gaps.SEGMENT)
    stream = gaps.encode(dense)
    assert 8 * len(stream) < 1.1 * len(dense)
    assert (gaps.decode(stream, len(dense), len(dense)) == dense).all()


@pytest.mark.parametrize("share", [0.1, 0.01, 1e-3, 1e-4])
def test_positions_are_near_the_entropy_bound(share):
    rng = np.random.default_rng(1)
    positions = np.cumsum(rng.geometric(share, 100_000)) - 1
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) / share
    length = 8 * len(gaps.encode(positions)) / len(positions)
    assert entropy * 0.99 < length < entropy * 1.07


@pytest.mark.parametrize("share", [0.1, 0.01, 1e-3, 1e-4])
@pytest.mark.parametrize("entries", [2, 5, 50])
def test_clustered_positions_code_smaller(share, entries):
    """All entries lie in a tenth of the rows, some of them in each."""
    rng = np.random.default_rng(2)
    count, width = 50_000 // entries, round(entries / (10 * share))
    rows = np.sort(rng.choice(10 * count, count, replace=False))
    inside = np.flatnonzero(rng.random(count * width) < 10 * share)
    clustered = rows[inside // width] * width + inside % width
    length = 8 * len(gaps.encode(clustered)) / len(clustered)
    scattered = np.sort(rng.choice(10 * count * width, len(clustered), replace=False))
    assert length < 8 * len(gaps.encode(scattered)) / len(scattered) - 0.5


def reference(x):
    """The fingerprint, from its definition, in numpy."""
    mask = np.uint64(0xFFFFFFFF)
    digest = hashlib.sha256(f"{x.dtype.name}{list(x.shape)}".encode()).digest()
    word, index = bits(x).ravel().astype(np.uint64), np.arange(x.size, dtype=np.uint64)
    out = ""
    for j, constants in enumerate(zip(*(getattr(fingerprint_numpy, c) for c in "ABCDE"), strict=True)):
        a, b, c, d, e = (np.uint64(k) for k in constants)
        h = (
            (word & mask) * a
            + (word >> np.uint64(32)) * b
            + (index & mask) * c
            + (index >> np.uint64(32)) * d
            + e
        ) & mask
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ h >> np.uint64(shift)) * np.uint64(factor)) & mask
        out += f"{(int(h.sum()) + int.from_bytes(digest[4 * j : 4 * j + 4], 'big')) % 2**32:08x}"
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0), (7, 9), (70_000,), (5000, 3), (2, 3, 4, 5)])
def test_fingerprint_is_its_definition(dtype, shape):
    x = np.asarray((np.random.default_rng(0).normal(size=shape) * 10).astype(dtype))
    assert fingerprint(x) == reference(x)
    if dtype != np.float64:
        assert fingerprint(jnp.asarray(x)) == reference(x)


def test_fingerprint_sees_every_change():
    x = np.zeros((50, 40), np.float32)
    found = {fingerprint(x)}
    for i in (0, 1, 39, 40, 1999):
        for bit in (0, 1, 31):
            y = x.copy()
            bits(y).ravel()[i] ^= np.uint32(1 << bit)
            found.add(fingerprint(y))
    found |= {
        fingerprint(x.reshape(40, 50)),
        fingerprint(x.astype(np.float16)),
        fingerprint(x.view(np.int32)),
    }
    assert len(found) == 1 + 15 + 3


def example(rng, with_seed_values, dtype=np.float32):
    seed = {
        f"l{i}": rng.normal(size=s).astype(dtype)
        for i, s in enumerate([(), (0,), (5,), (40, 70), (3, 2, 90)])
    }
    tuned = {
        p: np.asarray(np.where(rng.random(x.shape) < 0.1, x + 1, x).astype(dtype)) for p, x in seed.items()
    }
    seed = {p: np.asarray(x) for p, x in seed.items()}
    return (
        seed,
        tuned,
        subset.from_models(seed, tuned, with_seed_values=with_seed_values, metadata={"score": 0.5}),
    )


def assert_equal(a, b):
    assert list(a) == list(b)
    assert a.metadata == b.metadata
    for path, e in a.items():
        other = b[path]
        assert (e.shape, e.dtype, e.seed_fingerprint) == (other.shape, other.dtype, other.seed_fingerprint)
        assert e.positions.tolist() == other.positions.tolist()
        assert e.positions.dtype == other.positions.dtype
        assert (bits(e.values) == bits(other.values)).all()
        assert (e.seed_values is None) == (other.seed_values is None)
        if e.seed_values is not None:
            assert (bits(e.seed_values) == bits(other.seed_values)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("with_seed_values", [False, True])
@pytest.mark.parametrize("encoding", ["gaps", "raw"])
def test_files_hold_everything(tmp_path, dtype, with_seed_values, encoding):
    seed, tuned, found = example(np.random.default_rng(2), with_seed_values, dtype)
    found.save(tmp_path / "a" / "b", encoding)
    loaded = Subset.load(tmp_path / "a" / "b")
    assert_equal(found, loaded)
    assert all((bits(x) == bits(tuned[p])).all() for p, x in loaded.apply(seed).items())
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == sorted(
        [files.TENSORS, files.CONFIG, files.CARD]
    )
    assert "score" in (tmp_path / "a" / "b" / files.CARD).read_text()
    found.save(tmp_path / "a" / "b")  # replaces


def test_huge_and_full_tensors(tmp_path):
    huge = Entries((2**22, 2**21), np.array([0, 2**31, 2**43 - 1]), np.ones(3, np.float32))
    full = Entries((300,), np.arange(300), np.ones(300, np.float32))
    found = Subset({"huge": huge, "full": full})
    found.save(tmp_path)
    assert_equal(found, Subset.load(tmp_path))
    assert (tmp_path / files.TENSORS).stat().st_size < 2000


ENTRIES = st.tuples(
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=12), ENTRIES, max_size=4), st.booleans())
def test_extract_save_load_apply_is_the_identity(tmp_path_factory, leaves, with_seed_values):
    seed, tuned = {}, {}
    for path, (shape, dtype, share, number) in leaves.items():
        if any(f"{path}.{kind}" in leaves for kind in ("values", "positions")) or path.endswith("/value"):
            return
        rng = np.random.default_rng(number)
        words = rng.integers(0, 2**32, size=(2, *shape), dtype=np.uint32).astype(
            f"u{np.dtype(dtype).itemsize}"
        )
        seed[path] = words[0].view(dtype).reshape(shape)
        tuned[path] = (
            np.asarray(np.where(rng.random(shape) < share, words[1], words[0])).view(dtype).reshape(shape)
        )
    directory = tmp_path_factory.mktemp("s")
    subset.from_models(seed, tuned, with_seed_values=with_seed_values).save(directory)
    loaded = Subset.load(directory)
    applied = loaded.apply(seed)
    assert all((bits(applied[p]) == bits(tuned[p])).all() for p in seed)
    if with_seed_values:
        reverted = loaded.revert(applied)
        assert all((bits(reverted[p]) == bits(seed[p])).all() for p in seed)


def test_a_failed_save_leaves_the_old_subset(tmp_path, monkeypatch):
    found = example(np.random.default_rng(0), False)[2]
    found.save(tmp_path)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        found.astype(np.float16).save(tmp_path)
    monkeypatch.undo()
    assert_equal(found, Subset.load(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_leaves_the_old_subset(tmp_path, monkeypatch):
    """Even where the first of the files still finds room."""
    first = example(np.random.default_rng(0), False)[2]
    first.save(tmp_path)
    write, left = pathlib.Path.write_bytes, [1]

    def full(path, content):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        return write(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        first.astype(np.float16).save(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([files.CARD, files.CONFIG, files.TENSORS])
    assert_equal(first, Subset.load(tmp_path))


def test_a_subset_that_is_being_saved_is_read_whole(tmp_path):
    versions = [example(np.random.default_rng(seed), False)[2] for seed in range(2)]
    prints = {version["l3"].seed_fingerprint for version in versions}
    versions[0].save(tmp_path)
    stop = threading.Event()

    def save():
        for i in itertools.takewhile(lambda _: not stop.is_set(), itertools.count()):
            Subset(versions[i % 2].leaves, {"save": i}).save(tmp_path)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        for _ in range(100):
            assert Subset.load(tmp_path)["l3"].seed_fingerprint in prints
    finally:
        stop.set()
        writer.join()


def test_a_save_that_was_killed_lost_nothing(tmp_path):
    """The first file was renamed, the others were not."""
    first, second = (example(np.random.default_rng(seed), False)[2] for seed in range(2))
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    (tmp_path / "b" / files.TENSORS).replace(tmp_path / "a" / files.TENSORS)
    (tmp_path / "b" / files.CONFIG).replace(tmp_path / "a" / f".tmp-{files.CONFIG}-0")
    assert_equal(second, Subset.load(tmp_path / "a"))
    first.save(tmp_path / "a")
    assert_equal(first, Subset.load(tmp_path / "a"))
    (tmp_path / "a" / files.TENSORS).write_bytes(b"x")
    with pytest.raises(SubsetError, match=r"is damaged"):
        Subset.load(tmp_path / "a")


def test_a_first_save_that_was_killed_lost_nothing(tmp_path):
    first = example(np.random.default_rng(0), False)[2]
    first.save(tmp_path)
    (tmp_path / files.CONFIG).replace(tmp_path / f".tmp-{files.CONFIG}-0")
    assert_equal(first, Subset.load(tmp_path))


def test_a_file_beyond_what_its_configuration_allows_is_not_read(tmp_path):
    example(np.random.default_rng(0), True)[2].save(tmp_path)
    files.os.truncate(tmp_path / files.TENSORS, 2**28)
    with pytest.raises(SubsetError, match=rf"{files.TENSORS} has {2**28} bytes; at most \d+ are read"):
        Subset.load(tmp_path)


def test_seed_values_of_some_tensors_are_not_dropped(tmp_path):
    found = example(np.random.default_rng(0), True)[2]
    mixed = Subset({**found, "l3": dataclasses.replace(found["l3"], seed_values=None)})
    with pytest.raises(SubsetError, match=r"'l3' has no seed values, others have"):
        mixed.save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_another_readme_is_not_overwritten(tmp_path):
    (tmp_path / files.CARD).write_text("my model")
    with pytest.raises(SubsetError, match="a directory of its own"):
        subset.from_models({"w": np.zeros(2)}, {"w": np.ones(2)}).save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [files.CARD]
    assert (tmp_path / files.CARD).read_text() == "my model"


def test_arrays_of_the_other_byte_order_are_refused():
    with pytest.raises(SubsetError, match=r"'w' is >f4, of the other byte order"):
        subset.from_models({"w": np.zeros(2, ">f4")}, {"w": np.ones(2, ">f4")})


def test_every_damaged_byte_is_found(tmp_path):
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    content = (tmp_path / files.TENSORS).read_bytes()
    for at in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[at] ^= 1
        (tmp_path / files.TENSORS).write_bytes(damaged)
        with pytest.raises(SubsetError, match="damaged: its checksum"):
            Subset.load(tmp_path)


def test_metadata_is_kept_as_json_has_it(tmp_path):
    found = example(np.random.default_rng(0), False)[2]
    Subset(found.leaves, {"score by step": {50: 0.1, 100: (0.2, None)}}).save(tmp_path)
    assert Subset.load(tmp_path).metadata == {"score by step": {"50": 0.1, "100": [0.2, None]}}


def test_metadata_that_are_no_unicode_are_kept(tmp_path):
    """As the names of files may be."""
    found = example(np.random.default_rng(0), False)[2]
    Subset(found.leaves, {"seed": "caf\udce9"}).save(tmp_path)
    assert Subset.load(tmp_path).metadata == {"seed": "caf\udce9"}
    assert "caf\\udce9" in (tmp_path / files.CARD).read_text()


def test_metadata_that_could_not_be_read_is_refused(tmp_path, monkeypatch):
    found = example(np.random.default_rng(0), False)[2]
    with pytest.raises(SubsetError, match="has a key twice"):
        Subset(found.leaves, {"x": {1: 1, "1": 2}}).save(tmp_path / "no")
    monkeypatch.setattr(files, "MAX_CONFIG", 1000)
    with pytest.raises(SubsetError, match="at most 1000 are read"):
        Subset(found.leaves, {"x": "y" * 1000}).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_bad_metadata_and_dtypes_are_refused_before_writing(tmp_path):
    found = example(np.random.default_rng(0), False)[2]
    for value in (float("nan"), object(), {1, 2}):
        with pytest.raises(SubsetError, match="metadata"):
            Subset(found.leaves, {"x": value}).save(tmp_path / "no")
    with pytest.raises(SubsetError, match="'w' has the dtype complex128"):
        Subset({"w": Entries((1,), np.array([0]), np.zeros(1, np.complex128))}).save(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def resigned(directory, change):
    """Changes the configuration and makes its checksum right again."""
    path = directory / files.CONFIG
    config = json.loads(path.read_text())
    change(config)
    config["sha256"][files.CONFIG] = files._digest({k: v for k, v in config.items() if k != "sha256"})
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2 is not known"),
        (lambda c: c.update(format="x"), "format"),
        (lambda c: c.pop("metadata"), "keys"),
        (lambda c: c["leaves"]["l3"].update(entries=10**9), "entries"),
        (lambda c: c["leaves"]["l3"].update(entries=True), "entries"),
        (lambda c: c["leaves"]["l3"].update(entries=5), "expected uint8|expected float32"),
        (lambda c: c["leaves"]["l3"].update(shape=[2**40, 2**40]), "at most"),
        (lambda c: c["leaves"]["l3"].update(shape=[-40, -70]), "shape"),
        (lambda c: c["leaves"]["l3"].update(shape=[1e3]), "shape"),
        (lambda c: c["leaves"]["l3"].update(shape=[1, 300]), "position|entries"),
        (lambda c: c["leaves"]["l3"].update(dtype="float16"), "expected float16"),
        (lambda c: c["leaves"]["l3"].update(dtype="object"), "dtypes"),
        (lambda c: c["leaves"]["l3"].update(seed_fingerprint="0" * 31 + "G"), "fingerprint"),
        (lambda c: c["leaves"].update(zz=c["leaves"].pop("l3")), "tensor"),
        (lambda c: c.update(seed_values=True), "lacks the tensor"),
        (lambda c: c["leaves"].update({"l3": c["leaves"]["l4"], "l4": c["leaves"]["l3"]}), "expected"),
    ],
)
def test_lying_configurations_are_refused(tmp_path, change, message):
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    resigned(tmp_path, lambda c: None)
    Subset.load(tmp_path)
    resigned(tmp_path, change)
    with pytest.raises(SubsetError, match=message):
        Subset.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[::-1].copy(), "increase strictly"),
        (lambda x: np.append(x[:-1], np.int32(10**9)), r"lie in"),
        (lambda x: np.append(np.int32(-1), x[1:]), "lie in"),
        (lambda x: x[:-1], "expected int32"),
        (lambda x: x.astype(np.int64), "expected int32"),
        (lambda x: x.astype(np.float32), "expected int32"),
    ],
)
def test_lying_raw_positions_are_refused(tmp_path, change, message):
    found = example(np.random.default_rng(2), False)[2]
    found.save(tmp_path, "raw")
    tensors = safetensors.numpy.load_file(tmp_path / files.TENSORS)
    assert (tensors["l3.positions"] == found["l3"].positions).all()  # for any reader of safetensors
    tensors["l3.positions"] = change(tensors["l3.positions"])
    content = safetensors.numpy.save(tensors)
    (tmp_path / files.TENSORS).write_bytes(content)
    resigned(tmp_path, lambda c: c["sha256"].update({files.TENSORS: hashlib.sha256(content).hexdigest()}))
    with pytest.raises(SubsetError, match=message):
        Subset.load(tmp_path)


def test_an_unknown_encoding_is_refused_before_writing(tmp_path):
    with pytest.raises(SubsetError, match="encoding"):
        example(np.random.default_rng(2), False)[2].save(tmp_path / "x", "zip")
    assert not (tmp_path / "x").exists()


def test_a_changed_configuration_is_refused(tmp_path):
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    text = (tmp_path / files.CONFIG).read_text()
    for old, new in (('"score": 0.5', '"score": 0.9'), ('"seed_fingerprint": "', '"seed_fingerprint": "0')):
        assert old in text
        changed = text.replace(old, new, 1)
        (tmp_path / files.CONFIG).write_text(re.sub(r'("0[0-9a-f]{31})[0-9a-f]"', r'\1"', changed))
        with pytest.raises(SubsetError, match="it was changed or is damaged"):
            Subset.load(tmp_path)


@pytest.mark.parametrize("text", ['{"a": NaN}', "[" * 10**6, "", "\xff", "1" * 5000, "null", "[]"])
def test_odd_json_is_refused(tmp_path, text):
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    (tmp_path / files.CONFIG).write_bytes(text.encode("latin1"))
    with pytest.raises(SubsetError, match=str(tmp_path / files.CONFIG)):
        Subset.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("{", '{"version": 1,', "a key twice"), ('"score": 0.5', '"score": 1e999', "1e999 is not a JSON value")],
)
def test_what_json_alone_would_take_is_refused(tmp_path, old, new, message):
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    text = (tmp_path / files.CONFIG).read_text()
    (tmp_path / files.CONFIG).write_text(text.replace(old, new, 1))
    with pytest.raises(SubsetError, match=message):
        Subset.load(tmp_path)


def test_files_must_be_there_and_regular(tmp_path):
    with pytest.raises(SubsetError, match="cannot be read"):
        Subset.load(tmp_path)
    example(np.random.default_rng(2), False)[2].save(tmp_path)
    (tmp_path / files.TENSORS).unlink()
    files.os.mkfifo(tmp_path / files.TENSORS)
    with pytest.raises(SubsetError, match="not a regular file"):
        Subset.load(tmp_path)


def test_equal_subsets_are_equal_files(tmp_path):
    """Byte for byte, however often they are written: safetensors puts several metadata in any order."""
    found = subset.from_models({"w": np.zeros(8)}, {"w": np.arange(8.0)})
    written = set()
    for i in range(20):
        found.save(tmp_path / str(i))
        written.add(tuple(file.read_bytes() for file in sorted((tmp_path / str(i)).iterdir())))
    assert len(written) == 1
