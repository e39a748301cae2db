"""Subtractive dither that makes quantization unbiased. Writer and reader use the same numbers.

In: one seed per record. Out: one number in [-1/2, 1/2] per coefficient. Invariant: dither depends only on
(seed, position) and is identical on all devices. Over all seeds, each position takes every level in the table equally
often, so its mean is exactly zero, and any two positions are uncorrelated.

Rounding x + u and then subtracting u leaves an error that is uniform and independent of x (Schuchman 1964), so the mean
of the decoded value over all seeds is x. A record's dither is a window into a cyclic table, so readers copy it instead
of computing it.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 2**32 - 1


def dither_seed(key: str, view: int) -> int:
    """A record's seed (0 to 2^32 - 1), a hash of the sample key and view number."""
    digest = hashlib.blake2b(f"{view}\0{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def dither_table(count: int) -> Tensor:
    """Dither table for records with `count` coefficients: P float32 numbers, followed by the first `count` of them.

    P is the smallest power of two that is at least `count` and at least 2^16. The P numbers are the levels
    (k + 1/2) / P - 1/2, sorted by a 32-bit hash of k. All positions in a record have different numbers.
    """
    period = max(1 << 16, 1 << (count - 1).bit_length())
    levels = _mix(torch.arange(1, period + 1, dtype=torch.int64)).sort(stable=True).indices
    table = (levels.double() + 0.5) / period - 0.5
    return torch.cat((table, table[:count])).float()


def dither(seeds: Tensor, table: Tensor, count: int) -> Tensor:
    """Float32 dither (B, count) for int64 seeds (B,): the windows that start at seed mod P."""
    period = len(table) - count
    return table.as_strided((period, count), (1, 1))[seeds % period]


def subtract_dither(symbols: Tensor, seeds: Tensor, table: Tensor) -> None:
    """Subtract `dither(seeds, table, count)` in place from float32 symbols (B, count)."""
    count = symbols.shape[1]
    if symbols.device.type != "cpu":
        symbols.sub_(dither(seeds, table, count))
        return
    for row, start in zip(symbols, (seeds % (len(table) - count)).tolist(), strict=True):
        row.sub_(table[start : start + count])  # avoids copying the windows


def _mix(values: Tensor) -> Tensor:
    """A 32-bit integer hash based on Wellons' lowbias32, with factors whose products fit into 63 bits."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (16, 1)):
        values = (values ^ (values >> shift)) * factor & _MASK
    return values
