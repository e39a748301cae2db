"""Features as plain floating-point numbers: the reference codecs.

In and out: see `base.py`. Invariant: float32 is exact; float16 and bfloat16 round once, to nearest even.
"""

import torch
from torch import Tensor

from scalekd_cache.codec.base import FLOAT16_MAX, RowCodec, as_bytes

FLOAT32_NORM_MAX = 1.8e19  # the square of a larger value is infinite in float32


class _PlainCodec(RowCodec):
    dtype: torch.dtype
    half_step: float
    """Half of the distance between neighbours, relative to the value."""
    half_subnormal: float
    """Half of the smallest subnormal: the bound next to zero."""

    @property
    def value_bytes(self) -> int:
        return self.tokens * self.channels * self.dtype.itemsize

    def encode_values(self, values: Tensor) -> Tensor:
        return as_bytes(values.to(self.dtype).flatten(1))

    def decode_values(self, codes: Tensor) -> Tensor:
        return codes.view(self.dtype).float().view(len(codes), self.tokens, self.channels)

    def error_bound(self, features: Tensor) -> Tensor:
        return features.abs() * self.half_step + self.half_subnormal


class Float32Codec(_PlainCodec):
    """Exact; norms are computed again from the values instead of being stored."""

    id = "float32"
    stores_norms = False
    dtype = torch.float32
    half_step = 0.0
    half_subnormal = 0.0

    def largest(self) -> float:
        return FLOAT32_NORM_MAX


class Float16Codec(_PlainCodec):
    """11 significant bits, values and norms up to 65,504."""

    id = "float16"
    dtype = torch.float16
    half_step = 2.0**-11
    half_subnormal = 2.0**-25


class BFloat16Codec(_PlainCodec):
    """8 significant bits; norms, which are float16, up to 65,504."""

    id = "bfloat16"
    dtype = torch.bfloat16
    half_step = 2.0**-8
    half_subnormal = 2.0**-126

    def largest(self) -> float:
        return FLOAT16_MAX
