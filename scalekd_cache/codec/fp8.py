"""Stores features as 8-bit floats (E4M3) with group scales, for comparison with int8 at the same size.

In and out: see `groups.py`. Invariant: the relative error of a difference is at most 1/16. Near zero, the error is at
most 2^-10 times the scale.
"""

import torch
from torch import Tensor

from scalekd_cache.codec.groups import GroupScaledCodec


class Fp8Codec(GroupScaledCodec):
    """`torch.float8_e4m3fn`: 4 significant bits and a subnormal step of 2^-9. Group maxima map to 448, its maximum."""

    id = "fp8"
    largest_code = 448.0

    @property
    def code_bytes(self) -> int:
        return self.tokens * self.channels

    def pack_codes(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)

    def unpack_codes(self, packed: Tensor) -> Tensor:
        return packed.view(torch.float8_e4m3fn).float()

    def error_bound(self, features: Tensor) -> Tensor:
        """Half-step errors for a 4-bit significand and subnormals, plus float32 rounding of quotient and product."""
        scales, means = self.scale_of_values(features)
        rounding = (features.abs() + means.abs()) * 2.0**-22
        return (features - means).abs() * 2.0**-4 + rounding + scales * 2.0**-10
