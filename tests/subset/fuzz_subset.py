"""Mutations of subset files, and what must hold for every one; also a target for atheris.

python tests/subset/fuzz_subset.py -runs=100000 corpus/     # coverage-guided, needs `pip install atheris`
"""

import contextlib
import hashlib
import json
import struct
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from dst_optax import subset
from dst_optax.subset import Subset, SubsetError, files, gaps

ODD_NUMBERS = [
    -1,
    0,
    1,
    2,
    127,
    128,
    129,
    2**31,
    2**32,
    2**45,
    2**63,
    2**64,
    10**400,
    1.5,
    True,
    None,
    "8",
    [],
]


def honest():
    """A small model, and the files of a subset of it: (seed, config bytes, content)."""
    rng = np.random.default_rng(0)
    shapes = {"a": (40, 30), "b": (600,), "c": (), "d": (0, 4), "e": (5, 5, 5)}
    types = {"a": np.float32, "b": ml_dtypes.bfloat16, "c": np.float16, "d": np.float32, "e": np.float32}
    seed = {p: np.asarray(rng.normal(size=s).astype(types[p])) for p, s in shapes.items()}
    tuned = {p: np.where(rng.random(x.shape) < 0.3, -x, x).astype(x.dtype) for p, x in seed.items()}
    found = subset.from_models(seed, tuned, with_seed_values=True, metadata={"task": "toy"})
    return seed, found


def sign(config, content):
    """Makes both checksums right, as an attacker would."""
    try:
        config["sha256"] = {files.TENSORS: hashlib.sha256(content).hexdigest()}
        rest = {k: v for k, v in config.items() if k != "sha256"}
        config["sha256"][files.CONFIG] = files._digest(rest)
    except (TypeError, ValueError, AttributeError):
        pass
    return json.dumps(config).encode()


def flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def damage(rng, data):
    kind = rng.integers(5)
    if kind == 0:
        return data[: rng.integers(len(data) + 1)]
    if kind == 1:
        return data + rng.bytes(rng.integers(1, 40))
    if kind == 2:
        at = rng.integers(len(data) + 1)
        return data[:at] + rng.bytes(rng.integers(1, 9)) + data[at:]
    if kind == 3:
        at, length = rng.integers(len(data) + 1), rng.integers(1, 65)
        return data[:at] + bytes([rng.choice([0, 255])]) * length + data[at + length :]
    return flip(rng, data)


def lie(rng, config):
    """Changes one number, name or value somewhere in the configuration."""
    places = []

    def walk(node):
        if isinstance(node, dict | list) and len(node):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            for k in keys:
                places.append((node, k))
                walk(node[k])

    walk(config)
    node, key = places[rng.integers(len(places))]
    kind = rng.integers(4)
    if kind == 0:
        node[key] = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
    elif kind == 1 and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif kind == 2:
        other, name = places[rng.integers(len(places))]
        node[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(node[key]))
    elif isinstance(node[key], int | float):
        node[key] = int(node[key]) + int(rng.integers(-3, 4))
    elif isinstance(node[key], str):
        node[key] = ["float16", "bfloat16", "int64", "\udcff", "", "0" * 32][rng.integers(6)]
    return config


def header_lie(rng, content):
    """Changes the safetensors header: offsets, shapes, dtypes, its own length."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.integers(6) == 0:
        wrong = int(rng.choice([0, 1, length - 1, length + 1, 2**31, 2**62]))
        return struct.pack("<Q", wrong) + content[8:]
    header = lie(rng, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def stream_lie(rng, content, name):
    """Damages the coded positions, keeping the file well-formed."""
    tensors = {n: files._array(t, n) for n, t in safetensors.deserialize(content)}
    stream = tensors[name].tobytes()
    kind = rng.integers(3)
    if kind == 0:
        stream = struct.pack("<I", int(rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))) + stream[4:]
    elif kind == 1:
        stream = damage(rng, stream)
    else:
        stream = flip(rng, stream)
    tensors[name] = np.frombuffer(stream, np.uint8)
    return safetensors.numpy.save(tensors)


def check(seed, before, directory, config, content):
    """Loads what was mutated: a clear refusal, or a valid subset that leaves the seed as it is."""
    (directory / files.CONFIG).write_bytes(config)
    (directory / files.TENSORS).write_bytes(content)
    try:
        found = Subset.load(directory)
        found.apply(seed, verify=False)
    except SubsetError:
        return False
    finally:
        assert all(seed[p].tobytes() == b for p, b in before.items())
    for e in found.values():
        assert len(e) == 0 or 0 <= e.positions.min() <= e.positions.max() < e.size
        assert (np.diff(e.positions) > 0).all()
    return True


def check_stream(data):
    """Any bytes as a stream of positions: refused, or strictly increasing positions that code again."""
    if len(data) < 10:
        return
    count, size = struct.unpack("<HQ", data[:10])
    size %= 2**46
    tracemalloc.start()
    try:
        positions = gaps.decode(data[10:], count, size)
    except SubsetError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000 + 200 * max(len(data), count)
    assert len(positions) == count
    assert (np.diff(positions) > 0).all()
    assert (gaps.decode(gaps.encode(positions), count, size) == positions).all()


if __name__ == "__main__":
    import atheris

    atheris.instrument_func(gaps.decode)
    for function in (gaps._decode_segment, gaps._unpack, gaps._Reader.take):
        atheris.instrument_func(function)
    atheris.instrument_func(files.parse_config)

    def target(data):
        check_stream(data)
        with contextlib.suppress(SubsetError):
            files.parse_config(data)

    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
