"""Codecs: float32 pseudo-gradients as bytes of exactly known size; hostile bytes are refused. Knows nothing of rounds.

Values are cut in chunks of CHUNK_VALUES and each chunk is encoded on its own, so a slice of the bytes at chunk
boundaries is the encoding of that slice of the values. Encoding what was decoded gives the same bytes again.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from protocol.errors import Code, Refused
from protocol.limits import CHUNK_VALUES, PARAMETERS_MAX

assert sys.byteorder == "little", "encoded bytes are the machine's own words; no big-endian machine trains models today"

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Octets = npt.NDArray[np.uint8]
Data = bytes | bytearray | memoryview

BLOCK_VALUES: Final = 64  # values that share a scale: 0.25 bits each for the fp16 scale
SPARSE_VALUES: Final = 4096  # values of which sparse2 keeps one in SPARSE_SHARE
SPARSE_SHARE: Final = 64
_HALF_MAX: Final = np.float32(65504)  # largest finite fp16
_HALF_INFINITE: Final = 0x7C00  # bits of fp16 infinity; NaNs, and anything negative, are above
_FLOAT_INFINITE: Final = 0x7F800000  # bits of float32 infinity; NaNs are above
_HALF_STEP: Final = 2.0**-24  # smallest fp16 above zero
_EVEN_BYTES: Final = np.uint64(0x00FF00FF00FF00FF)
_ONES: Final = np.uint64(0x0001000100010001)  # a word times this has the sum of the word's quarters in its highest


class _Room:
    """Working memory of one call, reused for every chunk: fresh pages cost more than the arithmetic."""

    def __init__(self, values: int) -> None:
        size = _blocks(min(values, CHUNK_VALUES)) * BLOCK_VALUES
        self.values: Floats = np.empty(size, np.float32)
        self.octets: Octets = np.empty(size, np.uint8)
        self.pairs: npt.NDArray[np.uint16] = np.empty(size // 2, np.uint16)
        self.magnitudes: npt.NDArray[np.int32] = np.empty(size, np.int32)


class Codec(ABC):
    """One way to write float32 values. Sizes depend on the number of values only."""

    name: ClassVar[str]
    bits: ClassVar[float]  # per value, in whole chunks
    sparse: ClassVar[bool] = False  # leaves most values out: without feedback they would be lost

    def encoded_bytes(self, values: int) -> int:
        """Exact size of `values` encoded values; at a chunk boundary also the offset where the next chunk begins."""
        assert 0 <= values <= PARAMETERS_MAX
        chunks, rest = divmod(values, CHUNK_VALUES)
        return chunks * self._chunk_bytes(CHUNK_VALUES) + self._chunk_bytes(rest)

    def encode(self, values: Floats) -> bytes:
        out = np.empty(self.encoded_bytes(values.size), np.uint8)
        self.encode_into(values, out)
        return out.tobytes()

    def encode_into(self, values: Floats, out: Octets) -> None:
        _assert_vector(values)
        assert out.size == self.encoded_bytes(values.size)
        room = _Room(values.size)
        for start, stop, begin, end in self._chunks(values.size):
            self._encode_chunk(values[start:stop], out[begin:end], room)

    def decode(self, data: Data, values: int) -> Floats:
        self._check_size(data, values)
        out = np.empty(values, np.float32)
        self.decode_into(data, out)
        return out

    def decode_into(self, data: Data, out: Floats) -> None:
        _assert_vector(out)
        self._check_size(data, out.size)
        room = _Room(out.size)
        octets = np.frombuffer(data, np.uint8)
        for start, stop, begin, end in self._chunks(out.size):
            self._check_chunk(octets[begin:end], stop - start, room)
            self._decode_chunk(octets[begin:end], out[start:stop], room)

    def decode_chunks(self, data: Data, values: int) -> Iterator[tuple[int, Floats]]:
        """Where each chunk starts, and its values. They are only lent: the next chunk overwrites them."""
        self._check_size(data, values)
        room, out = _Room(values), np.empty(min(values, CHUNK_VALUES), np.float32)
        octets = np.frombuffer(data, np.uint8)
        for start, stop, begin, end in self._chunks(values):
            self._check_chunk(octets[begin:end], stop - start, room)
            self._decode_chunk(octets[begin:end], out[: stop - start], room)
            yield start, out[: stop - start]

    def check(self, data: Data, values: int) -> None:
        """Refuse what decode would refuse, without decoding."""
        self._check_size(data, values)
        room = _Room(values)
        octets = np.frombuffer(data, np.uint8)
        for start, stop, begin, end in self._chunks(values):
            self._check_chunk(octets[begin:end], stop - start, room)

    def squares(self, data: Data, values: int) -> float:
        """The sum of the squares of what decode gives, to the same bits on every machine. The caller has checked `data`.

        In float64, halves added to halves: a library's sum adds in whatever order suits the processor."""
        self._check_size(data, values)
        room = _Room(values)
        octets = np.frombuffer(data, np.uint8)
        total = 0.0
        for start, stop, begin, end in self._chunks(values):
            total += halved(self._chunk_squares(octets[begin:end], stop - start, room))
        return total

    @abstractmethod
    def error_max(self, peak: float) -> float:
        """How far a decoded value may be from the original where the block's largest magnitude is `peak`."""

    @abstractmethod
    def _chunk_bytes(self, values: int) -> int: ...

    @abstractmethod
    def _encode_chunk(self, values: Floats, out: Octets, room: _Room) -> None: ...

    @abstractmethod
    def _check_chunk(self, octets: Octets, values: int, room: _Room) -> None: ...

    @abstractmethod
    def _decode_chunk(self, octets: Octets, out: Floats, room: _Room) -> None: ...

    @abstractmethod
    def _chunk_squares(self, octets: Octets, values: int, room: _Room) -> Doubles:
        """Numbers that add up to the sum of a chunk's squares, each of them exact."""

    def _chunks(self, values: int) -> Iterator[tuple[int, int, int, int]]:
        """For each chunk: its values [start, stop) and its bytes [begin, end)."""
        begin = 0
        for start in range(0, values, CHUNK_VALUES):
            stop = min(start + CHUNK_VALUES, values)
            end = begin + self._chunk_bytes(stop - start)
            yield start, stop, begin, end
            begin = end

    def _check_size(self, data: Data, values: int) -> None:
        size, expected = memoryview(data).nbytes, self.encoded_bytes(values)
        if size != expected:
            raise Refused(
                Code.UPDATE_BAD, f"{self.name} update of {size} bytes, expected {expected} for {values} values"
            )


class Half(Codec):
    """IEEE half precision. Values beyond its range become its largest."""

    name = "fp16"
    bits = 16.0

    def error_max(self, peak: float) -> float:
        return peak * 2.0**-11 + _HALF_STEP

    def _chunk_bytes(self, values: int) -> int:
        return 2 * values

    def _encode_chunk(self, values: Floats, out: Octets, room: _Room) -> None:
        halves = out.view(np.float16)
        with np.errstate(over="ignore"):
            np.copyto(halves, values, casting="same_kind")
        if self._finite(out):
            return
        if not np.isfinite(values).all():
            raise Refused(Code.UPDATE_BAD, "a value to encode is NaN or infinite")
        np.copyto(halves, np.clip(values, -_HALF_MAX, _HALF_MAX), casting="same_kind")

    def _check_chunk(self, octets: Octets, values: int, room: _Room) -> None:
        if not self._finite(octets):
            raise Refused(Code.UPDATE_BAD, f"fp16 update of {values} values holds NaN or infinity")

    def _decode_chunk(self, octets: Octets, out: Floats, room: _Room) -> None:
        np.copyto(out, octets.view(np.float16))

    def _chunk_squares(self, octets: Octets, values: int, room: _Room) -> Doubles:
        return np.square(octets.view(np.float16), dtype=np.float64)

    def _finite(self, octets: Octets) -> bool:
        words = np.bitwise_and(octets.view(np.uint16), 0x7FFF)
        return bool(words.max(initial=0) < _HALF_INFINITE)


class _Blockwise(Codec):
    """An fp16 scale per block of 64 values, then small integers around zero.

    The scale is absmax / top rounded towards zero, so the largest value always gets the code `top`; that is what
    makes encoding what was decoded exact. What lies beyond `top` is cut to it.
    """

    top: ClassVar[int]  # largest code

    def error_max(self, peak: float) -> float:
        return peak * (0.5 + 2.0**-10) / self.top + self.top * _HALF_STEP

    def _chunk_bytes(self, values: int) -> int:
        return 2 * _blocks(values) + self._code_bytes(values)

    @abstractmethod
    def _code_bytes(self, values: int) -> int: ...

    @abstractmethod
    def _pack(self, quotients: Floats, out: Octets, room: _Room) -> None:
        """Write the nearest codes of whole blocks of quotients, as many as fit in `out`."""

    @abstractmethod
    def _check_codes(self, codes: Octets, values: int, room: _Room) -> None: ...

    @abstractmethod
    def _unpack(self, codes: Octets, out: Floats) -> None: ...

    @abstractmethod
    def _code_squares(self, codes: Octets, blocks: int, room: _Room) -> npt.NDArray[np.int64]:
        """The sum of the squares of each block's codes, as whole numbers."""

    def _encode_chunk(self, values: Floats, out: Octets, room: _Room) -> None:
        blocks = _blocks(values.size)
        table = _whole_blocks(values).reshape(blocks, BLOCK_VALUES)
        quotients = room.values[: table.size].reshape(table.shape)
        peaks = _peaks(table, quotients.view(np.int32))
        scales = self._scales(peaks)
        inverse = np.zeros(blocks, np.float32)
        np.divide(np.float32(1), scales, out=inverse, where=scales > 0, dtype=np.float32)
        np.multiply(table, inverse[:, None], out=quotients)
        if (peaks * inverse).max() >= self.top + 0.5:  # only where fp16 is too coarse or too short for the scale
            np.clip(quotients, -self.top, self.top, out=quotients)
        out[: 2 * blocks].view(np.float16)[:] = scales
        self._pack(quotients.reshape(-1), out[2 * blocks :], room)

    def _scales(self, peaks: Floats) -> npt.NDArray[np.float16]:
        scales: npt.NDArray[np.float16] = np.minimum(peaks / np.float32(self.top), _HALF_MAX).astype(np.float16)
        above = scales.astype(np.float32) * np.float32(self.top) > peaks
        scales.view(np.uint16)[above] -= 1
        return scales

    def _check_chunk(self, octets: Octets, values: int, room: _Room) -> None:
        split = 2 * _blocks(values)
        if octets[:split].view(np.uint16).max() >= _HALF_INFINITE:
            raise Refused(Code.UPDATE_BAD, f"{self.name} update holds a scale that is negative, NaN or infinite")
        self._check_codes(octets[split:], values, room)

    def _decode_chunk(self, octets: Octets, out: Floats, room: _Room) -> None:
        blocks = _blocks(out.size)
        table = room.values[: blocks * BLOCK_VALUES].reshape(blocks, BLOCK_VALUES)
        self._unpack(octets[2 * blocks :], table.reshape(-1))
        scales = octets[: 2 * blocks].view(np.float16).astype(np.float32)[:, None]
        if out.size == table.size:
            np.multiply(table, scales, out=out.reshape(table.shape))
        else:
            np.multiply(table, scales, out=table)
            out[:] = table.reshape(-1)[: out.size]

    def _chunk_squares(self, octets: Octets, values: int, room: _Room) -> Doubles:
        blocks = _blocks(values)
        scales = octets[: 2 * blocks].view(np.float16).astype(np.float64)
        squares: Doubles = scales * scales * self._code_squares(octets[2 * blocks :], blocks, room)
        return squares


class Int8(_Blockwise):
    """Codes -127..127, one byte each: 8.25 bits."""

    name = "int8"
    bits = 8.25
    top = 127

    def _code_bytes(self, values: int) -> int:
        return values

    def _pack(self, quotients: Floats, out: Octets, room: _Room) -> None:
        np.rint(quotients, out=quotients)
        np.copyto(out.view(np.int8), quotients[: out.size], casting="unsafe")

    def _check_codes(self, codes: Octets, values: int, room: _Room) -> None:
        if codes.view(np.int8).min() < -self.top:
            raise Refused(Code.UPDATE_BAD, f"int8 update of {values} values holds a code below -127")

    def _unpack(self, codes: Octets, out: Floats) -> None:
        np.copyto(out[: codes.size], codes.view(np.int8))
        out[codes.size :] = 0

    def _code_squares(self, codes: Octets, blocks: int, room: _Room) -> npt.NDArray[np.int64]:
        table = room.magnitudes[: blocks * BLOCK_VALUES]
        np.copyto(table[: codes.size], codes.view(np.int8))
        table[codes.size :] = 0
        np.multiply(table, table, out=table)
        sums: npt.NDArray[np.int64] = np.add.reduce(table.reshape(blocks, BLOCK_VALUES), axis=1, dtype=np.int64)
        return sums


class Int4(_Blockwise):
    """Codes 1..15 around 8, the first of two in the low half of a byte: 4.25 bits."""

    name = "int4"
    bits = 4.25
    top = 7

    _middle: ClassVar[int] = 8
    # both values of a byte as one word: half as many look-ups
    _pairs: ClassVar[npt.NDArray[np.uint64]] = (
        np.stack([(np.arange(256) & 15) - 8, (np.arange(256) >> 4) - 8], axis=1)
        .astype(np.float32)
        .view(np.uint64)
        .reshape(-1)
    )

    def _code_bytes(self, values: int) -> int:
        return (values + 1) // 2

    def _pack(self, quotients: Floats, out: Octets, room: _Room) -> None:
        codes, shifted = room.octets[: quotients.size], room.pairs[: quotients.size // 2]
        quotients += np.float32(self._middle + 0.5)
        np.copyto(codes, quotients, casting="unsafe")  # cuts off the fraction
        words = codes.view(np.uint16)
        np.right_shift(words, 4, out=shifted)
        np.bitwise_or(words, shifted, out=shifted)
        np.copyto(out, shifted[: out.size], casting="unsafe")  # keeps the low byte

    def _check_codes(self, codes: Octets, values: int, room: _Room) -> None:
        low = room.octets[: codes.size]
        np.bitwise_and(codes, 15, out=low)
        if codes.min() < 16 or low.min() < 1:
            raise Refused(Code.UPDATE_BAD, "int4 update holds the code 0")
        if values % 2 and codes[-1] >> 4 != self._middle:
            raise Refused(Code.UPDATE_BAD, "int4 update holds a value after its last")

    def _unpack(self, codes: Octets, out: Floats) -> None:
        np.take(self._pairs, codes, out=out.view(np.uint64)[: codes.size], mode="clip")
        out[2 * codes.size :] = 0

    def _code_squares(self, codes: Octets, blocks: int, room: _Room) -> npt.NDArray[np.int64]:
        """The squares of both values of a byte fit in it; eight bytes are added in one word, then its quarters."""
        both, low = room.octets[: blocks * BLOCK_VALUES].reshape(2, -1)
        np.right_shift(codes, 4, out=both[: codes.size])
        np.bitwise_and(codes, 15, out=low[: codes.size])
        for halves in (both, low):
            halves[codes.size :] = self._middle
            halves -= self._middle
            halves *= halves
        both += low
        words = both.view(np.uint64).reshape(blocks, BLOCK_VALUES // 16)
        quarters = (words & _EVEN_BYTES) + (words >> np.uint64(8) & _EVEN_BYTES)
        sums = quarters[:, 0] + quarters[:, 1] + quarters[:, 2] + quarters[:, 3]
        return (sums * _ONES >> np.uint64(48)).astype(np.int64)


class Sparse2(Codec):
    """The largest 64 of every 4096 values at 2 bits each: 0.164 bits (SparseLoCo, arXiv 2508.15706, section 3).

    Of a block, in this order: two magnitudes in fp16, the smaller first; the positions; the 2-bit codes, sign and which
    magnitude. Positions p[0] < p[1] < … cost exactly 8 bits each where their entropy is 7.4 (Elias 1974, "Efficient
    storage and retrieval by content and address of static files"): p[i] // 64 as a one at bit p[i] // 64 + i of 2 k bits,
    p[i] % 64 as 6 bits. So the size depends on nothing but the number of values. A last, shorter block of n values keeps
    ceil(n / 64) of them. All whole blocks of a chunk are written together: their magnitudes, then their highs, and so on.
    """

    name = "sparse2"
    bits = 8 * 84 / SPARSE_VALUES
    sparse = True

    def error_max(self, peak: float) -> float:
        return peak

    def _chunk_bytes(self, values: int) -> int:
        return max((end for *_, end in _sparse_tables(values)), default=0)

    def _encode_chunk(self, values: Floats, out: Octets, room: _Room) -> None:
        for start, stop, rows, width, begin, end in _sparse_tables(values.size):
            table = values[start:stop]
            if missing := rows * width - table.size:
                table = np.concatenate([table, np.zeros(missing, np.float32)])
            _sparse_encode(table.reshape(rows, width), out[begin:end], room)

    def _check_chunk(self, octets: Octets, values: int, room: _Room) -> None:
        for _ in self._blocks_of(octets, values):
            pass

    def _decode_chunk(self, octets: Octets, out: Floats, room: _Room) -> None:
        out.fill(0)
        for start, positions, kept in self._blocks_of(octets, out.size):
            out[start + positions] = kept

    def _chunk_squares(self, octets: Octets, values: int, room: _Room) -> Doubles:
        sums: list[Doubles] = []
        for _, _, rows, width, begin, end in _sparse_tables(values):
            kept, block = width // SPARSE_SHARE, octets[begin:end]
            levels = np.square(block[: 4 * rows].view(np.float16).reshape(rows, 2), dtype=np.float64)
            codes = block[block.size - rows * -(-kept // 4) :].reshape(rows, -1)
            large = np.add.reduce(np.bitwise_count(codes & 0xAA), axis=1, dtype=np.int64)  # the second bit of each code
            sums += [levels[:, 0] * (kept - large), levels[:, 1] * large]
        return np.concatenate(sums)

    def _blocks_of(self, octets: Octets, values: int) -> Iterator[tuple[int, npt.NDArray[np.int64], Floats]]:
        """For the whole blocks, then for a shorter last one: where they begin, which positions are kept, as what."""
        for start, stop, rows, width, begin, end in _sparse_tables(values):
            positions, kept = _sparse_decode(octets[begin:end], rows, width)
            if positions[-1, -1] >= stop - start - (rows - 1) * width:
                raise Refused(Code.UPDATE_BAD, "sparse2 update holds a value after its last")
            positions += np.arange(0, rows * width, width)[:, None]
            yield start, positions.reshape(-1), kept.reshape(-1)


def halved(numbers: Doubles) -> float:
    """Their sum. Halves are added to halves: the same additions on every machine. `numbers` is changed."""
    while (size := numbers.size) > 1:
        half = size // 2
        numbers[:half] += numbers[size - half :]
        numbers = numbers[: size - half]
    return float(numbers[0]) if numbers.size else 0.0


_CODECS: Final[dict[str, Codec]] = {each.name: each for each in (Half(), Int8(), Int4(), Sparse2())}
NAMES: Final = tuple(_CODECS)


def codec(name: str) -> Codec:
    """The codec that a run file names; run files are checked against NAMES before."""
    return _CODECS[name]


def _blocks(values: int) -> int:
    return -(-values // BLOCK_VALUES)


def _assert_vector(values: Floats) -> None:
    assert values.dtype == np.float32 and values.ndim == 1 and values.flags.c_contiguous


def _whole_blocks(values: Floats) -> Floats:
    """The values, with zeros up to the end of their last block."""
    missing = -values.size % BLOCK_VALUES
    return np.concatenate([values, np.zeros(missing, np.float32)]) if missing else values


def _peaks(table: Floats, magnitudes: npt.NDArray[np.int32]) -> Floats:
    """The largest magnitude of each row; NaN and infinity refused. As integers, magnitudes sort alike and faster."""
    np.bitwise_and(table.view(np.int32), 0x7FFFFFFF, out=magnitudes)
    peaks: npt.NDArray[np.int32] = np.maximum.reduce(magnitudes, axis=1)
    if peaks.max() >= _FLOAT_INFINITE:
        raise Refused(Code.UPDATE_BAD, "a value to encode is NaN or infinite")
    return peaks.view(np.float32)


def _kept(values: int) -> int:
    """How many values sparse2 keeps of a block of so many."""
    return -(-values // SPARSE_SHARE)


def _sparse_bytes(kept: int) -> int:
    return 4 + 5 * -(-kept // 4)  # four values share a byte of highs, three of lows, and one of codes


def _sparse_tables(values: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """What is encoded together: values [start, stop), as so many blocks of so many, in the bytes [begin, end)."""
    rows, rest = divmod(values, SPARSE_VALUES)
    whole, end = rows * SPARSE_VALUES, rows * _sparse_bytes(_kept(SPARSE_VALUES))
    if rows:
        yield 0, whole, rows, SPARSE_VALUES, 0, end
    if rest:
        yield whole, values, 1, _kept(rest) * SPARSE_SHARE, end, end + _sparse_bytes(_kept(rest))


def _sparse_encode(table: Floats, out: Octets, room: _Room) -> None:
    """Each row is a block; of its 64 k values it keeps k."""
    rows, width = table.shape
    kept = width // SPARSE_SHARE
    while True:
        positions, values = _largest(table, kept, room)
        big, levels = _two_levels(np.minimum(np.abs(values), _HALF_MAX))
        vanished = (levels[:, :1] == 0) & ~big & (values != 0)
        if not vanished.any():
            break
        table = table.copy()
        table[np.nonzero(vanished)[0], positions[vanished]] = 0  # too small for fp16: they are zeros, then
    fours = -(-kept // 4)
    highs = np.zeros((rows, 8 * fours), np.bool_)
    np.put_along_axis(highs, (positions >> 6) + np.arange(kept), True, axis=1)
    quads = np.zeros((2, rows, 4 * fours), np.uint32)
    quads[0, :, :kept] = positions & 63
    quads[1, :, :kept] = (values < 0) | (big.astype(np.uint32) << 1)
    lows, codes = quads.reshape(2, rows, fours, 4)
    lows = lows[..., 0] | lows[..., 1] << 6 | lows[..., 2] << 12 | lows[..., 3] << 18
    codes = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    pieces = (
        levels.view(np.uint8),
        np.packbits(highs, axis=1, bitorder="little"),
        lows.astype("<u4").view(np.uint8).reshape(rows, fours, 4)[..., :3],
        codes.astype(np.uint8),
    )
    at = 0
    for piece in pieces:
        out[at : at + piece.size] = piece.reshape(-1)
        at += piece.size


def _largest(table: Floats, kept: int, room: _Room) -> tuple[npt.NDArray[np.int64], Floats]:
    """Positions and values of the largest magnitudes of each row, in the order of positions; of equals the first."""
    rows, width = table.shape
    magnitudes = room.magnitudes[: table.size].reshape(table.shape)
    np.bitwise_and(table.view(np.int32), 0x7FFFFFFF, out=magnitudes)
    if int(magnitudes.max()) >= _FLOAT_INFINITE:
        raise Refused(Code.UPDATE_BAD, "a value to encode is NaN or infinite")
    sorting = room.values.view(np.int32)[: table.size].reshape(table.shape)
    np.copyto(sorting, magnitudes)
    sorting.partition(width - kept, axis=1)
    least = sorting[:, width - kept, None]
    chosen = room.octets.view(np.bool_)[: table.size].reshape(table.shape)
    np.greater_equal(magnitudes, least, out=chosen)
    for row in np.flatnonzero(np.count_nonzero(chosen, axis=1) > kept):
        ties = np.flatnonzero(magnitudes[row] == least[row])
        chosen[row, ties[kept - np.count_nonzero(magnitudes[row] > least[row]) :]] = False
    flat = np.flatnonzero(chosen)
    positions = flat.reshape(rows, kept) - np.arange(0, rows * width, width)[:, None]
    return positions, table.reshape(-1)[flat].reshape(rows, kept)


def _two_levels(magnitudes: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16]]:
    """Which of each row's magnitudes are big, and the means of the small and of the big ones (Lloyd 1982, one step)."""
    middle = (magnitudes.min(axis=1) + magnitudes.max(axis=1)) / 2
    small, large = _means(magnitudes, magnitudes > middle[:, None])
    big = magnitudes > ((small + large) / 2)[:, None]
    small, large = _means(magnitudes, big)
    levels = np.stack([small, large], axis=1).astype(np.float16)
    big &= (levels[:, 0] < levels[:, 1])[:, None]
    return big, levels


def _means(magnitudes: Floats, big: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Of the small and of the big ones; where all are alike, both means are the same."""
    rows, kept = big.shape
    above = np.count_nonzero(big, axis=1).astype(np.float32)
    below = np.float32(kept) - above
    zero, small, large = np.float32(0), np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    np.divide(np.where(big, zero, magnitudes).sum(axis=1), below, out=small, where=below > 0)
    np.divide(np.where(big, magnitudes, zero).sum(axis=1), above, out=large, where=above > 0)
    return np.where(below > 0, small, large), np.where(above > 0, large, small)


def _sparse_decode(octets: Octets, rows: int, width: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Positions, each in its block, and values of `rows` blocks; whatever no encoder writes is refused."""
    kept, fours = width // SPARSE_SHARE, -(-(width // SPARSE_SHARE) // 4)
    cuts = np.cumsum([4 * rows, fours * rows, 3 * fours * rows])
    levels, highs, lows, codes = np.split(octets, cuts)
    halves = levels.view(np.uint16).reshape(rows, 2)
    if halves.max() >= _HALF_INFINITE or (halves[:, 0] > halves[:, 1]).any():
        raise Refused(Code.UPDATE_BAD, "sparse2 update holds magnitudes that are negative, NaN, infinite or reversed")
    ones = np.unpackbits(highs.reshape(rows, fours), axis=1, bitorder="little")
    if (np.count_nonzero(ones, axis=1) != kept).any() or ones[:, 2 * kept :].any():
        raise Refused(Code.UPDATE_BAD, f"sparse2 update holds a block without {kept} positions")
    bits = np.flatnonzero(ones).reshape(rows, kept) - np.arange(0, rows * 8 * fours, 8 * fours)[:, None]
    threes = lows.reshape(rows * fours, 3).astype(np.int64)
    words = threes[:, 0] | threes[:, 1] << 8 | threes[:, 2] << 16
    sixes = (words[:, None] >> np.array([0, 6, 12, 18]) & 63).reshape(rows, 4 * fours)
    pairs = (codes[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(rows, 4 * fours)
    if sixes[:, kept:].any() or pairs[:, kept:].any():
        raise Refused(Code.UPDATE_BAD, "sparse2 update holds bits after its last value")
    positions = (bits - np.arange(kept) << 6) + sixes[:, :kept]
    if (np.diff(positions, axis=1) <= 0).any():
        raise Refused(Code.UPDATE_BAD, "sparse2 update holds positions that do not rise")
    table = np.stack([halves, halves | 0x8000], axis=1)  # by magnitude, then by sign
    table = table.transpose(0, 2, 1).reshape(rows, 4).view(np.float16).astype(np.float32)
    return positions, np.take_along_axis(table, pairs[:, :kept].astype(np.int64), axis=1)
