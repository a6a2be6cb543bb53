"""Sorted positions as gaps in Rice code, a few per cent above the entropy of random positions.

A position is the gap to its predecessor: the number of entries skipped, ``p[i] - p[i-1] - 1``. Blocks of
128 gaps share a parameter r, chosen per block, so that clustered positions code smaller. The r low bits
of a gap are stored as they are, the rest ``q = gap >> r`` in unary: q zero bits and a one. A q of 16 or
more is written as 16, and what exceeds 16 as an *escape* of 32 bits, so that a jump between clusters
costs 48 bits at most.

The stream is a sequence of segments of 131072 gaps (the last is shorter). All numbers are
little-endian, all bit strings start at the lowest bit of their first byte. A segment of k gaps is

  ====================  ==========================================================================
  ``uint32``            bytes of the unary part
  ``uint8[ceil(k/128)]``  r of each block, at most 30
  low bits              for each r in use, ascending: the low bits of its blocks, in order, r bits
                        each, without space between blocks, padded to a byte
  unary part            k ones and the zeros before them, padded to a byte
  ``uint32[...]``       escapes, in order
  ====================  ==========================================================================

References:
  Rice, Plaunt, *Adaptive variable-length coding for efficient compression of spacecraft television
  data*, IEEE Trans. Comm. 19(6), 1971. Zukowski et al., *Super-scalar RAM-CPU cache compression*
  (blocks with exceptions), ICDE 2006.
"""

import numpy as np

from dst_optax.subset.errors import SubsetError

BLOCK = 128
SEGMENT = 1024 * BLOCK
LONGEST = 16  # unary numbers from here on have an escape
MAX_RICE = 30
MAX_SIZE = 2**45  # entries of a tensor: sums of gaps stay exact in int64


def position_dtype(size: int) -> np.dtype:
    """The dtype of positions in a tensor of ``size`` entries: int32 where it suffices, else int64."""
    return np.dtype(np.int32 if size <= 2**31 else np.int64)


def encode(positions: np.ndarray) -> bytes:
    """Codes strictly increasing positions.

    Args:
      positions: (k,) integers, strictly increasing, in [0, 2**45).

    Returns:
      The stream.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset import gaps
      >>> stream = gaps.encode(np.array([3, 7, 8]))
      >>> gaps.decode(stream, 3, 10).tolist()
      [3, 7, 8]
    """
    parts: list[bytes] = []
    before = -1
    for start in range(0, len(positions), SEGMENT):
        part = positions[start : start + SEGMENT].astype(np.int64)
        gaps = np.diff(part, prepend=before)
        gaps -= 1
        before = part[-1]
        parts += _encode_segment(gaps)
    return b"".join(parts)


def decode(stream: bytes | memoryview, count: int, size: int) -> np.ndarray:
    """Reads positions back; a stream that :func:`encode` cannot have made is refused.

    Args:
      stream: the bytes.
      count: how many positions they hold.
      size: entries of the tensor; every position is below.

    Returns:
      (count,) int32 or int64, see :func:`position_dtype`.

    Raises:
      SubsetError: the stream is damaged. Memory stays proportional to ``len(stream)``.

    Example:
      >>> import numpy as np
      >>> from dst_optax.subset import gaps
      >>> gaps.decode(gaps.encode(np.arange(100)), 100, 100).sum()
      np.int64(4950)
    """
    if not 0 <= count <= size <= MAX_SIZE:
        raise SubsetError(f"{count} positions in a tensor of {size} entries are not possible.")
    if count > 8 * len(stream):
        raise SubsetError(f"a stream of {len(stream)} bytes cannot hold {count} positions.")
    out = np.empty(count, position_dtype(size))
    reader = _Reader(stream)
    last = -1
    for start in range(0, count, SEGMENT):
        steps = _decode_segment(reader, min(SEGMENT, count - start), size)
        steps[0] += last
        np.cumsum(steps, out=steps)
        last = int(steps[-1])
        if last >= size:
            raise SubsetError(f"the stream has the position {last} in a tensor of {size} entries.")
        out[start : start + len(steps)] = steps
    if reader.at != len(stream):
        raise SubsetError(f"the stream has {len(stream) - reader.at} bytes too many.")
    return out


class _Reader:
    """Takes bytes off the front of a stream, never past its end."""

    def __init__(self, stream: bytes | memoryview) -> None:
        self.bytes = np.frombuffer(stream, np.uint8)
        self.at = 0

    def take(self, length: int) -> np.ndarray:
        if length > len(self.bytes) - self.at:
            raise SubsetError(f"the stream ends after {len(self.bytes)} bytes, in the middle of a segment.")
        self.at += length
        return self.bytes[self.at - length : self.at]


def _encode_segment(gaps: np.ndarray) -> list[bytes]:
    count = len(gaps)
    rice, blocks = _choose_rice(gaps)
    high = (blocks >> rice[:, None]).reshape(-1)[:count]
    escaped = high >= LONGEST
    escapes = (high[escaped] - LONGEST).astype("<u4")
    ends = np.minimum(high, LONGEST)
    ends += 1
    np.cumsum(ends, out=ends)
    unary = np.zeros(int(ends[-1]), bool)
    unary[ends - 1] = True
    low = []
    for r, chosen, length in _classes(rice, count):
        mask = np.int64((1 << r) - 1)
        low.append(_pack((blocks[chosen] & mask).reshape(-1), r)[: -(-length * r // 8)].tobytes())
    packed = np.packbits(unary, bitorder="little").tobytes()
    return [
        len(packed).to_bytes(4, "little"),
        rice.astype(np.uint8).tobytes(),
        *low,
        packed,
        escapes.tobytes(),
    ]


def _decode_segment(reader: _Reader, count: int, size: int) -> np.ndarray:
    """Distances of each position from the one before, (count,) int64."""
    unary_bytes = int(reader.take(4).view("<u4")[0])
    blocks = -(-count // BLOCK)
    rice = reader.take(blocks).astype(np.int64)
    if rice.max() > MAX_RICE:
        raise SubsetError(f"the stream has a Rice parameter of {rice.max()}; at most {MAX_RICE} is allowed.")
    low = np.empty((blocks, BLOCK), np.uint32)
    for r, chosen, length in _classes(rice, count):
        low[chosen] = _unpack(reader.take(-(-length * r // 8)), r, low[chosen].shape)
    if unary_bytes > -(-count * (LONGEST + 1) // 8):
        raise SubsetError(f"the stream has a unary part of {unary_bytes} bytes for {count} positions.")
    ones = np.flatnonzero(np.unpackbits(reader.take(unary_bytes), bitorder="little").view(bool))
    if len(ones) != count or ones[-1] // 8 != unary_bytes - 1:
        raise SubsetError(f"the stream has {len(ones)} positions in a segment of {count}.")
    steps = np.zeros((blocks, BLOCK), np.int64)
    high = steps.reshape(-1)[:count]
    np.subtract(ones[1:], ones[:-1] + 1, out=high[1:])
    high[0] = ones[0]
    longest = high.max()
    if longest >= LONGEST:
        if longest > LONGEST:
            raise SubsetError(f"the stream has a unary number of {longest}; at most {LONGEST} is allowed.")
        escaped = np.flatnonzero(high == LONGEST)
        high[escaped] += reader.take(4 * len(escaped)).view("<u4")
    steps <<= rice[:, None]
    steps += low
    if high.max() >= size:
        raise SubsetError(f"the stream has a gap of {high.max()} in a tensor of {size} entries.")
    high += 1
    return high


def _choose_rice(gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best of three parameters for each block, and the gaps padded with zeros to whole blocks."""
    count = len(gaps)
    padding = -count % BLOCK
    blocks = np.pad(gaps, (0, padding)).reshape(-1, BLOCK)
    lengths = np.full(len(blocks), BLOCK)
    lengths[-1] -= padding
    exponents = (blocks + 1).astype(np.float32).view(np.int32) >> 23
    octaves = np.sum(exponents - 127, axis=1) / lengths  # mean of floor(log2(gap + 1)), hardly moved by jumps
    middle = np.clip(np.round(octaves + 0.8).astype(np.int64), 1, MAX_RICE - 1)
    needed = int(gaps.max()).bit_length() - 32  # an escape has 32 bits
    candidates = np.maximum(middle + np.array([[-1], [0], [1]]), needed)
    costs = []
    for rice in candidates:
        high = blocks >> rice[:, None]
        bits = np.sum(np.minimum(high, LONGEST), axis=1) + 32 * np.count_nonzero(high >= LONGEST, axis=1)
        costs.append(bits + rice * lengths)
    return np.take_along_axis(candidates, np.argmin(costs, axis=0)[None], axis=0)[0], blocks


def _classes(rice: np.ndarray, count: int) -> list[tuple[int, slice | np.ndarray, int]]:
    """For each parameter in use: it, its blocks, and how many of their entries are real."""
    padding = len(rice) * BLOCK - count
    used = np.flatnonzero(np.bincount(rice)).tolist()
    if len(used) == 1:
        return [(used[0], slice(None), count)]
    found = []
    for r in used:
        chosen = np.flatnonzero(rice == r)
        found.append((r, chosen, len(chosen) * BLOCK - (padding if rice[-1] == r else 0)))
    return found


def _pack(values: np.ndarray, r: int) -> np.ndarray:
    """Writes values of r bits one after another; a multiple of eight of them."""
    columns = np.ascontiguousarray(values.reshape(-1, 8).T)
    out = np.zeros((len(values) // 8, r), np.uint8)
    for j, column in enumerate(columns):
        for byte in range(j * r // 8, -(-(j + 1) * r // 8)):
            shift = 8 * byte - j * r
            piece = column >> shift if shift >= 0 else column << -shift
            out[:, byte] |= piece.astype(np.uint8)
    return out.reshape(-1)


def _unpack(packed: np.ndarray, r: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads values of r bits, as many as ``shape`` holds; missing bytes count as zero."""
    out = np.zeros(shape, np.uint32)
    if r == 0:
        return out
    groups = out.size // 8
    padded = np.zeros(groups * r + 8, np.uint8)
    padded[: len(packed)] = packed
    word = np.dtype("<u4" if r <= 25 else "<u8")
    columns = out.reshape(-1, 8)
    for j in range(8):  # value j of each group of eight starts at bit j * r of r bytes
        words = np.ndarray((groups,), word, padded, offset=j * r // 8, strides=(r,))
        np.right_shift(words, word.type(j * r % 8), out=columns[:, j], casting="unsafe")
    out &= np.uint32((1 << r) - 1)
    return out
