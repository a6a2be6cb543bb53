"""Files of unknown origin: mutations, each a clear SubsetError or a valid subset.

`HYPOTHESIS_PROFILE=fuzz` makes 20,000 of them, four times as many.
"""

import json
import os
import tracemalloc

import fuzz_subset as fuzz
import numpy as np
import pytest

from dst_optax.subset import Subset, SubsetError, files, gaps

KINDS = ["config bytes", "content bytes", "signed content", "signed config", "signed header", "signed stream"]
CASES = 3400 if os.environ.get("HYPOTHESIS_PROFILE") == "fuzz" else 850


@pytest.fixture
def example(tmp_path):
    seed, found = fuzz.honest()
    found.save(tmp_path)
    config, content = (tmp_path / files.CONFIG).read_bytes(), (tmp_path / files.TENSORS).read_bytes()
    before = {p: x.tobytes() for p, x in seed.items()}
    assert fuzz.check(seed, before, tmp_path, config, content)
    assert fuzz.check(seed, before, tmp_path, fuzz.sign(json.loads(config), content), content)
    return seed, before, tmp_path, config, content


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(example, kind):
    seed, before, directory, config, content = example
    rng = np.random.default_rng(KINDS.index(kind))
    tracemalloc.start()
    Subset.load(directory).apply(seed, verify=False)
    honest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    loaded = 0
    for case in range(CASES):
        new_config, new_content = config, content
        if kind == "config bytes":
            new_config = fuzz.damage(rng, config)
        elif kind == "content bytes":
            new_content = fuzz.damage(rng, content)
        elif kind == "signed config":
            new_config = fuzz.sign(fuzz.lie(rng, json.loads(config)), content)
        else:
            if kind == "signed content":
                new_content = fuzz.damage(rng, content)
            elif kind == "signed header":
                new_content = fuzz.header_lie(rng, content)
            else:
                name = rng.choice(["a.positions", "b.positions", "e.positions"])
                new_content = fuzz.stream_lie(rng, content, str(name))
            new_config = fuzz.sign(json.loads(config), new_content)
        measured = case % 20 == 0
        if measured:
            tracemalloc.start()
        loaded += fuzz.check(seed, before, directory, new_config, new_content)
        if measured:
            assert tracemalloc.get_traced_memory()[1] <= 2 * honest
            tracemalloc.stop()
    if kind.endswith("bytes"):
        same = fuzz.check(seed, before, directory, config, content)
        assert same
        assert loaded < CASES // 85  # only what leaves the JSON's meaning as it is
    else:
        assert loaded < CASES


def test_random_streams():
    rng = np.random.default_rng(9)
    for _ in range(3000):
        positions = np.flatnonzero(rng.random(rng.integers(1, 3000)) < rng.choice([0.5, 0.1, 0.01]))
        stream = fuzz.damage(rng, gaps.encode(positions))
        size = int(rng.integers(1, 2**46))
        fuzz.check_stream(len(positions).to_bytes(2, "little") + size.to_bytes(8, "little") + stream)
        fuzz.check_stream(rng.bytes(rng.integers(0, 60)))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"\xff\xff\xff\xff\x00", "ends after 5 bytes"),  # four billion bytes of unary numbers
        (b"\x01\x00\x00\x00\xff\x01", "a gap of 255 bits"),
        (b"\x06\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20", "a gap of 45 bits"),
        (b"\x01\x00\x00\x00\x1e\x01\xff\xff\xff\x3f", "the position 1073741823 in"),
        (b"\x01\x00\x00\x00\x08\x01", "ends after 6 bytes"),  # no low bits
        (b"\x01\x00\x00\x00\x00\x03", "has 2 positions"),
        (b"\x01\x00\x00\x00\x00\x00", "has 0 positions"),
        (b"\x02\x00\x00\x00\x00\x01\x00", "has 1 positions"),  # an empty last byte
        (b"\x01\x00\x00\x00\x00\x01\x00", "1 bytes too many"),
    ],
)
def test_lying_streams(stream, message):
    with pytest.raises(SubsetError, match=message):
        gaps.decode(stream, 1, 1000)


def test_nothing_is_allocated_for_a_count_alone():
    with pytest.raises(SubsetError, match="cannot hold 1099511627776 positions"):
        gaps.decode(bytes(1000), 2**40, 2**41)


def test_the_largest_gaps_do_not_overflow():
    """Two segments of the widest gaps, whose sum comes near 2**63."""
    ones, widest = b"\xff" * (gaps.SEGMENT // 8), b"\xff" * (gaps.SEGMENT * gaps.MAX_WIDTH // 8)
    segment = len(ones).to_bytes(4, "little") + bytes([gaps.MAX_WIDTH]) + ones + widest
    with pytest.raises(SubsetError, match="the position 2305843009213693951 in"):
        gaps.decode(segment * 2, 2 * gaps.SEGMENT, gaps.MAX_SIZE)
