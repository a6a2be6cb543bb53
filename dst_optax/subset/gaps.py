"""Sorted positions as gaps, a few per cent above the entropy of random positions.

A position is the gap to its predecessor: the number of entries skipped, ``g = p[i] - p[i-1] - 1``. With a
parameter r, ``g + 2**r`` has ``w >= r`` bits below its highest one. ``w - r`` is stored in unary, that many
zero bits and a one, then come the w bits: 1 + r bits for a gap below 2**r, two more for each doubling
beyond. A jump between clusters costs little, so clustered positions code smaller.

The stream is a sequence of segments of 131072 gaps (the last is shorter). All numbers are little-endian, all
bit strings start at the lowest bit of their first byte and are padded to a byte. A segment of k gaps is

  ==========  ===============================================
  ``uint32``  bytes of the unary part
  ``uint8``   r
  unary part  k ones and the zeros before them
  low bits    w bits of each gap, lowest first, without space
  ==========  ===============================================

References:
  Teuhola, *A compression method for clustered bit-vectors*, Information Processing Letters 7(6), 1978.
"""

import numpy as np

from dst_optax.subset.errors import SubsetError

SEGMENT = 2**17
MAX_WIDTH = 44
MAX_SIZE = 2**MAX_WIDTH  # entries of a tensor; a segment's gaps, each below 2**45, add up in int64


def position_dtype(size: int) -> np.dtype:
    """The dtype of positions in a tensor of ``size`` entries: int32 where it suffices, else int64."""
    return np.dtype(np.int32 if size <= 2**31 else np.int64)


def encode(positions: np.ndarray) -> bytes:
    """Codes strictly increasing positions.

    Args:
      positions: (k,) integers, strictly increasing, in [0, 2**44).

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
    last = -1
    for start in range(0, len(positions), SEGMENT):
        part = positions[start : start + SEGMENT].astype(np.int64)
        parts += _encode_segment(np.diff(part, prepend=last) - 1)
        last = part[-1]
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
        steps = _decode_segment(reader, min(SEGMENT, count - start))
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
    r = _best_parameter(gaps)
    values = gaps + 2**r
    widths = _log2(values)
    ends = np.cumsum(widths - (r - 1))
    unary = np.zeros(ends[-1], bool)
    unary[ends - 1] = True
    packed = np.packbits(unary, bitorder="little").tobytes()
    return [len(packed).to_bytes(4, "little"), bytes([r]), packed, _pack(values, widths)]


def _decode_segment(reader: _Reader, count: int) -> np.ndarray:
    """Distances of each position from the one before, (count,) int64."""
    unary_bytes, r = int(reader.take(4).view("<u4")[0]), int(reader.take(1)[0])
    ones = np.flatnonzero(np.unpackbits(reader.take(unary_bytes), bitorder="little").view(bool))
    if len(ones) != count or ones[-1] // 8 != unary_bytes - 1:
        raise SubsetError(f"the stream has {len(ones)} positions in a segment of {count}.")
    widths = ones + r
    widths[1:] -= ones[:-1] + 1
    if widths.max() > MAX_WIDTH:
        raise SubsetError(f"the stream has a gap of {widths.max()} bits; at most {MAX_WIDTH} are allowed.")
    ends = np.add(ones, r + (r - 1) * np.arange(count), out=ones)  # what the widths add up to
    low = np.append(reader.take(-(-int(ends[-1]) // 8)), np.zeros(8, np.uint8))
    starts = np.subtract(ends, widths, out=ends)
    highest = np.left_shift(1, widths, out=widths)
    steps = _unpack(low, starts, highest - 1)
    steps += highest
    steps -= 2**r - 1
    return steps


def _best_parameter(gaps: np.ndarray) -> int:
    """The r with the fewest bits, if gaps are spread evenly within each octave [2**k - 1, 2**(k+1) - 1)."""
    counts = np.bincount(_log2(gaps + 1), minlength=MAX_WIDTH + 1)
    r = np.arange(MAX_WIDTH + 1)
    k = r[:, None]
    zeros = np.where(k < r, 0, k - r + (2.0**r - 1) / 2.0**k)  # mean of w - r in octave k
    return int(np.argmin(2 * counts @ zeros + r * len(gaps)))


def _log2(x: np.ndarray) -> np.ndarray:
    """Base-2 logarithms of positive integers below 2**53, rounded down."""
    return (x.astype(np.float64).view(np.int64) >> 52) - 1023


def _pack(values: np.ndarray, widths: np.ndarray) -> bytes:
    """The lowest bits of each value, one after another."""
    ends = np.cumsum(widths)
    starts = ends - widths
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    bits = (values & (1 << widths) - 1).view(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))  # every word but the last has a value that starts in it
    last = np.append(first[1:], len(word)) - 1
    out = np.zeros(word[-1] + 2, "<u8")
    out[:-1] = np.add.reduceat(bits << shift, first)
    out[1:] += bits[last] >> np.uint64(1) >> np.uint64(63) - shift[last]  # what the last one has beyond
    return out.tobytes()[: -(-int(ends[-1]) // 8)]


def _unpack(packed: np.ndarray, starts: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Reads values of up to 57 bits, (k,) int64; eight bytes must follow the start of the last."""
    words = np.ndarray(len(packed) - 7, "<i8", packed, strides=(1,))  # one from every byte on
    out = words.take(starts >> 3)
    out >>= starts & 7
    out &= masks
    return out
