"""The transform codec's lossless stage, which groups symbols into classes by variance, with one zstd block per class.

In: fixed-size rows (a head, a plane of packed symbols, a list of escapes). Out: variable-length records, and back.
Invariant: `unpack(pack(rows))` equals `rows`. A record that declares the wrong size raises an error before allocation.

A zstd block has a single Huffman table, so the encoder ends a block at the end of each class. A Huffman code takes at
least one bit per byte, so low-entropy classes pack two or four symbols into a byte. Classes with large values take two
bytes per symbol. The few symbols outside their class's range are escapes: the plane contains a zero, and the list
contains their position and value. Any zstd decoder can read a record's frame in a single call.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec.base import as_bytes, contiguous_copy, damaged_record
from scalekd_cache.errors import counted

LEVEL = 1
LARGEST = {16: 32767, 8: 127, 4: 7, 2: 1}
"""Largest symbol magnitude for each number of bits per symbol."""
ESCAPE_BYTES = 6
"""Bytes per escape: an int32 position and an int16 value."""


class Segment(NamedTuple):
    """A class: a range of consecutive symbols."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which is not used
    """Number of symbols."""
    bits: int
    """Bits per symbol in the plane: 16, 8, 4 or 2."""

    @property
    def bytes(self) -> int:
        """Size of this class in the plane, in bytes."""
        return -(-self.count * self.bits // 8)


def escape_count(count: int) -> int:
    """Maximum number of escapes in a row of `count` symbols."""
    return min(count, max(64, count // 32))


def pack_symbols(symbols: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Pack int64 symbols (B, n) into uint8 (B, plane + list): the plane, then the escapes' positions and values."""
    beyond = symbols.abs() > _limits(tuple(segments), symbols.device)
    # A stable sort moves the escapes to the front, ordered by position.
    places = beyond.byte().sort(dim=1, descending=True, stable=True).indices[:, : escape_count(symbols.shape[1])]
    values = (symbols * beyond).gather(1, places)
    places = places.masked_fill(values == 0, 0)
    plane = pack_plane(symbols.masked_fill(beyond, 0), segments)
    return torch.cat((plane, as_bytes(places.int()), as_bytes(values.short())), dim=1)


def pack_plane(symbols: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Pack int64 symbols (B, n) into uint8 (B, plane). Each symbol must be in its class's range."""
    parts, start = [], 0
    for segment in segments:
        part, bits = symbols[:, start : start + segment.count], segment.bits
        start += segment.count
        if bits >= 8:  # low bytes, then high bytes
            parts += [(part >> place & 255).to(torch.uint8) for place in range(0, bits, 8)]
            continue
        shared = 8 // bits
        padded = torch.nn.functional.pad(part, (0, segment.bytes * shared - segment.count)) + (1 << bits - 1)
        shifts = torch.arange(0, 8, bits, device=symbols.device)[:, None]
        parts.append((padded.view(len(symbols), shared, segment.bytes) << shifts).sum(1).to(torch.uint8))
    return torch.cat(parts, dim=1)


def unpack_symbols(planes: Tensor, segments: Sequence[Segment], symbols: Tensor) -> None:
    """Invert `pack_symbols`, writing to `symbols` (B, n), whose dtype must be able to represent 16-bit integers."""
    start, low = 0, 0
    for segment in segments:
        part, into = planes[:, low : low + segment.bytes], symbols[:, start : start + segment.count]
        start, low = start + segment.count, low + segment.bytes
        if segment.bits == 16:
            into.copy_(part[:, segment.count :].view(torch.int8)).mul_(256).add_(part[:, : segment.count])
        elif segment.bits == 8:
            into.copy_(part.view(torch.int8))
        else:
            offset, mask = 1 << segment.bits - 1, (1 << segment.bits) - 1
            for place, piece in enumerate(torch.split(into, segment.bytes, dim=1)):
                digit, shift = part[:, : piece.shape[1]], segment.bits * place
                if shift:
                    digit = digit >> shift
                if shift < 8 - segment.bits:  # the top digit needs no mask
                    digit = digit & mask
                piece.copy_(digit.view(torch.int8).sub_(offset))
    assert symbols.shape[1] == start, (symbols.shape, start)
    split = low + 4 * escape_count(start)
    places = contiguous_copy(planes[:, low:split]).view(torch.int32)
    values = contiguous_copy(planes[:, split:]).view(torch.int16)
    if (
        planes.device.type == "cpu"
    ):  # the list is mostly empty; a GPU processes all of it, because this check would synchronize
        taken = values.any(0).nonzero()
        used = int(taken[-1]) + 1 if len(taken) else 0
        places, values = places[:, :used], values[:, :used]
    symbols.scatter_add_(1, places.long().clamp_(0, start - 1), values.to(symbols.dtype))


def fits(symbols: Tensor, segments: Sequence[Segment]) -> Tensor:
    """(B,) bool: whether each row of float64 symbols (B, n) can be stored."""
    beyond = (symbols.abs() > _limits(tuple(segments), symbols.device)).sum(1)
    return (beyond <= escape_count(symbols.shape[1])) & (symbols.abs().amax(1) <= LARGEST[16])


@functools.lru_cache(maxsize=16)
def _limits(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """Largest magnitude of each symbol in the plane, int64 (n,). Cached to avoid waiting for a GPU copy per batch."""
    counts = torch.tensor([segment.count for segment in segments])
    largest = torch.tensor([LARGEST[segment.bits] for segment in segments])
    return largest.repeat_interleave(counts).to(device)


class BlockPacker:
    """Converts rows to records and back. A record has `head` plain bytes and a zstd frame with one block per class."""

    def __init__(self, segments: Sequence[Segment], head: int) -> None:
        self.head = head
        escapes = ESCAPE_BYTES * escape_count(sum(segment.count for segment in segments))
        parts = [part for segment in segments for part in _parts(segment)]
        self._cuts = np.cumsum([0, *parts, escapes]).tolist()
        self.row_bytes = head + self._cuts[-1]

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """Convert uint8 rows (B, row_bytes) to records."""
        return [self._pack_one(np.ascontiguousarray(row)) for row in rows]

    def _pack_one(self, row: NDArray[np.uint8]) -> bytes:
        planes = row[self.head :].data
        compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=len(planes))
        parts = [row[: self.head].tobytes()]
        for start, stop in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            parts += [compressor.compress(planes[start:stop]), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        return b"".join((*parts, compressor.flush()))

    def unpack(self, records: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
        """Convert records to uint8 rows (B, row_bytes). Raises `UserError` if this codec did not write them."""
        rows = np.empty((len(records), self.row_bytes), np.uint8)
        decompressor = zstandard.ZstdDecompressor()
        for row, record in zip(rows, records, strict=True):
            frame = memoryview(record)[self.head :]
            try:
                declared = zstandard.frame_content_size(frame)
                if declared != self.row_bytes - self.head:
                    raise damaged_record(f"a frame with {counted(declared, 'byte')}", self.row_bytes - self.head)
                data = decompressor.decompress(frame)
            except zstandard.ZstdError as error:
                raise damaged_record(str(error), "a zstd frame") from error
            row[: self.head] = np.frombuffer(record, np.uint8, self.head)
            row[self.head :] = np.frombuffer(data, np.uint8)
        return rows


def _parts(segment: Segment) -> list[int]:
    """Block sizes for a class. The low and high bytes of 16-bit symbols get separate blocks."""
    return [segment.count] * 2 if segment.bits == 16 else [segment.bytes]
