"""Dither: numbers between -1/2 and 1/2, the same for writer and reader, that make quantisation unbiased.

In: a seed a record. Out: one number a coefficient. Invariant: a function of (seed, position) in whole numbers, the same
on every device; over seeds each position is uniform and any two positions are uncorrelated.

Rounding x + u and subtracting u again leaves an error that is uniform and independent of x (Schuchman 1964), so the
mean over seeds of what a reader decodes is x itself.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 2**32 - 1


def dither_seed(key: str, view: int) -> int:
    """The seed of a record, 0 to 2^32 - 1: a hash of the sample key and the view number."""
    digest = hashlib.blake2b(f"{view}\0{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def dither_table(count: int) -> tuple[Tensor, Tensor]:
    """Two int64 numbers a position: an offset below 2^32 and an odd factor below 2^31."""
    positions = torch.arange(1, count + 1, dtype=torch.int64)
    return _mix(positions), _mix(positions + count) >> 1 | 1


def dither(seeds: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
    """(B,) int64 seeds below 2^32 and the table (n,) -> (B, n) float32: multiples of 2^-24 between -1/2 and 1/2."""
    mixed = torch.addcmul(offset, factor, seeds[:, None]).bitwise_and_(_MASK)
    return mixed.bitwise_right_shift_(8).float().mul_(2.0**-24).sub_(0.5 - 2.0**-25)


def _mix(values: Tensor) -> Tensor:
    """A 32-bit integer hash (after Wellons' lowbias32, with factors whose products fit 63 bits)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D), (16, 1)):
        values = (values ^ (values >> shift)) * factor & _MASK
    return values
