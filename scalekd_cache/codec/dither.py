"""Dither: numbers between -1/2 and 1/2, equal for writer and reader, that make quantization unbiased.

In: one seed per record. Out: one number per coefficient. Invariant: a function of (seed, position), the same on every
device; over all seeds each position takes every level of the table equally often, so its mean is zero exactly, and any
two positions are uncorrelated.

Rounding x + u and subtracting u again leaves an error that is uniform and independent of x (Schuchman 1964), so the
mean of the decoded value over seeds is x. A record's dither is a window of one cyclic table: a reader copies it instead
of computing it.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 2**32 - 1


def dither_seed(key: str, view: int) -> int:
    """The seed of a record, 0 to 2^32 - 1: a hash of the sample key and the view number."""
    digest = hashlib.blake2b(f"{view}\0{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def dither_table(count: int) -> Tensor:
    """The table of records of `count` coefficients, float32: P + count numbers, the first `count` again at the end.

    P is the least power of two that is at least `count` and 2^16; the P numbers are its levels (k + 1/2) / P - 1/2 in
    the order of a 32-bit hash of k. No two positions of a record share a number.
    """
    period = max(1 << 16, 1 << (count - 1).bit_length())
    levels = _mix(torch.arange(1, period + 1, dtype=torch.int64)).sort(stable=True).indices
    table = (levels.double() + 0.5) / period - 0.5
    return torch.cat((table, table[:count])).float()


def dither(seeds: Tensor, table: Tensor, count: int) -> Tensor:
    """(B,) int64 seeds -> (B, count) float32: the window that begins at seed mod P."""
    period = len(table) - count
    return table.as_strided((period, count), (1, 1))[seeds % period]


def subtract_dither(symbols: Tensor, seeds: Tensor, table: Tensor) -> None:
    """Symbols (B, count) float32 less `dither(seeds, table, count)`, in place."""
    count = symbols.shape[1]
    if symbols.device.type != "cpu":
        symbols.sub_(dither(seeds, table, count))
        return
    for row, start in zip(symbols, (seeds % (len(table) - count)).tolist(), strict=True):
        row.sub_(table[start : start + count])  # no copy of the windows


def _mix(values: Tensor) -> Tensor:
    """A 32-bit integer hash (after Wellons' lowbias32, with factors whose products fit 63 bits)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (16, 1)):
        values = (values ^ (values >> shift)) * factor & _MASK
    return values
