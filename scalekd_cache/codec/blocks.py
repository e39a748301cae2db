"""The lossless stage of the transform coder: symbols in classes of like variance, one zstd block a class.

In: rows of fixed size (a head, then two planes of bytes). Out: records of variable length, and back.
Invariant: `unpack(pack(rows))` is `rows`; a record that declares another size is refused before anything is allocated.

A zstd block carries one Huffman table, so a block holds symbols of one class; ending the block there is all it takes. A
Huffman code spends at least one bit a byte, so classes of little entropy put several symbols into one byte first. Any
zstd decoder reads the frame: one call a record.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec.base import damaged_record

LEVEL = 1
RADIX_OF = {1: 256, 2: 15, 3: 5, 5: 3}
"""Values that one symbol of a byte takes, by symbols a byte."""


class Segment(NamedTuple):
    """Neighbouring coefficients of one class."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """Coefficients."""
    per_byte: int
    """Symbols that share a byte."""

    @property
    def bytes(self) -> int:
        """Bytes of the low plane."""
        return -(-self.count // self.per_byte)


def split_symbols(symbols: Tensor, segments: Sequence[Segment]) -> Tensor:
    """(B, n) int64 symbols -> (B, low + n) uint8: packed low digits, then the rest, a signed byte a symbol."""
    low_parts, high_parts, start = [], [], 0
    for segment in segments:
        radix, part = RADIX_OF[segment.per_byte], symbols[:, start : start + segment.count]
        digit = (part + radix // 2) % radix
        high_parts.append((part + radix // 2 - digit) // radix)
        padded = torch.nn.functional.pad(digit, (0, segment.bytes * segment.per_byte - segment.count), value=radix // 2)
        weights = radix ** torch.arange(segment.per_byte, device=symbols.device)
        low_parts.append((padded.view(len(symbols), -1, segment.per_byte) * weights).sum(2).to(torch.uint8))
        start += segment.count
    return torch.cat((*low_parts, torch.cat(high_parts, 1).to(torch.int8).view(torch.uint8)), dim=1)


def join_symbols(planes: Tensor, segments: Sequence[Segment]) -> Tensor:
    """What `split_symbols` made -> (B, n) float32 symbols."""
    count, start, low_start = sum(segment.count for segment in segments), 0, 0
    high = planes[:, planes.shape[1] - count :].view(torch.int8).float()
    for segment in segments:
        radix, part = RADIX_OF[segment.per_byte], planes[:, low_start : low_start + segment.bytes]
        if segment.per_byte > 1:
            digits = [part // radix**place % radix for place in range(segment.per_byte)]
            part = torch.stack(digits, dim=2).flatten(1)[:, : segment.count]
        high[:, start : start + segment.count].mul_(radix).add_(part).sub_(radix // 2)
        start, low_start = start + segment.count, low_start + segment.bytes
    return high


def fits(symbols: Tensor, segments: Sequence[Segment]) -> Tensor:
    """(B, n) float64 symbols -> (B,) bool: whether every one is in the range of its class."""
    limits = [limit for segment in segments for limit in [127 * RADIX_OF[segment.per_byte]] * segment.count]
    return (symbols.abs() <= torch.tensor(limits, device=symbols.device)).all(1)


class BlockPacker:
    """Rows <-> records: `head` bytes as they are, then one zstd frame of both planes, a block a class."""

    def __init__(self, segments: Sequence[Segment], head: int) -> None:
        self.head = head
        low = [segment.bytes for segment in segments]
        wide = [segment.count for segment in segments if segment.per_byte == 1]
        rest = sum(segment.count for segment in segments) - sum(wide)
        sizes = [*low, *wide, *([rest] if rest else [])]
        self._cuts = np.cumsum([0, *sizes]).tolist()
        self.row_bytes = head + self._cuts[-1]

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """(B, row_bytes) uint8 -> a record each."""
        return [self._pack_one(np.ascontiguousarray(row)) for row in rows]

    def _pack_one(self, row: NDArray[np.uint8]) -> bytes:
        planes = row[self.head :].data
        compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=len(planes))
        parts = [row[: self.head].tobytes()]
        for start, stop in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            parts += [compressor.compress(planes[start:stop]), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        return b"".join((*parts, compressor.flush()))

    def unpack(self, records: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
        """Records -> (B, row_bytes) uint8. UserError for a record that is not one of this codec."""
        rows = np.empty((len(records), self.row_bytes), np.uint8)
        decompressor = zstandard.ZstdDecompressor()
        for row, record in zip(rows, records, strict=True):
            frame = memoryview(record)[self.head :]
            try:
                declared = zstandard.frame_content_size(frame)
                if declared != self.row_bytes - self.head:
                    raise damaged_record(f"a frame of {declared} bytes", self.row_bytes - self.head)
                data = decompressor.decompress(frame)
            except zstandard.ZstdError as error:
                raise damaged_record(str(error), "a zstd frame") from error
            row[: self.head] = np.frombuffer(record, np.uint8, self.head)
            row[self.head :] = np.frombuffer(data, np.uint8)
        return rows
