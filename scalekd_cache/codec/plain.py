"""Stores features as floating-point numbers: float32, float16 or bfloat16.

In and out: see `base.py`. A float32 row consists only of the values (H*W, C). The other rows consist of float16 means
(C), the values' differences from the means (H*W, C) and float16 norms (2, H*W). Invariant: float32 is exact; float16
and bfloat16 round once, to nearest even.
"""

from typing import ClassVar

import torch
from torch import Tensor

from scalekd_cache.codec.base import FLOAT16_MAX, RowCodec, as_bytes, channel_means, contiguous_copy

FLOAT32_NORM_MAX = 1.8e19  # the square of a larger value overflows float32


class _PlainCodec(RowCodec):
    stores_means: ClassVar[bool] = False
    """Whether values are stored as differences from the channel mean, so that a large mean costs no precision."""
    dtype: torch.dtype
    half_step: float
    """Half the spacing of adjacent floats, relative to the value."""
    half_subnormal: float
    """Half the smallest subnormal: the error bound near zero."""

    @property
    def mean_bytes(self) -> int:
        """Bytes per row used by the means."""
        return 2 * self.channels if self.stores_means else 0

    @property
    def value_bytes(self) -> int:
        return self.mean_bytes + self.tokens * self.channels * self.dtype.itemsize

    def encode_values(self, values: Tensor) -> Tensor:
        if not self.stores_means:
            return as_bytes(values.to(self.dtype).flatten(1))
        means = channel_means(values)
        differences = (values - means.float()).to(self.dtype)
        return torch.cat((as_bytes(means.flatten(1)), as_bytes(differences.flatten(1))), dim=1)

    def decode_values(self, codes: Tensor) -> Tensor:
        stored = contiguous_copy(codes[:, self.mean_bytes :]).view(self.dtype).float()
        values = stored.view(len(codes), self.tokens, self.channels)
        if not self.stores_means:
            return values
        means = contiguous_copy(codes[:, : self.mean_bytes]).view(torch.float16).float()
        return values.add_(means[:, None])

    def error_bound(self, features: Tensor) -> Tensor:
        """Half a step of the rounded value, plus float32 rounding of the difference and sum if there are means."""
        if not self.stores_means:
            return features.abs() * self.half_step + self.half_subnormal
        means = channel_means(features.flatten(2).transpose(1, 2)).float().transpose(1, 2)[..., None]
        rounding = (features.abs() + means.abs()) * 2.0**-22
        return (features - means).abs() * self.half_step + self.half_subnormal + rounding


class Float32Codec(_PlainCodec):
    """Exact values. Norms are not stored but computed from the values."""

    id = "float32"
    stores_norms = False
    dtype = torch.float32
    half_step = 0.0
    half_subnormal = 0.0

    def largest(self) -> float:
        return FLOAT32_NORM_MAX


class Float16Codec(_PlainCodec):
    """11 significant bits; values and norms are at most 65,504."""

    id = "float16"
    version = 2
    stores_means = True
    dtype = torch.float16
    half_step = 2.0**-11
    half_subnormal = 2.0**-25


class BFloat16Codec(_PlainCodec):
    """8 significant bits. Norms and means are float16, so they are at most 65,504."""

    id = "bfloat16"
    version = 2
    stores_means = True
    dtype = torch.bfloat16
    half_step = 2.0**-8
    half_subnormal = 2.0**-126

    def largest(self) -> float:
        return FLOAT16_MAX
