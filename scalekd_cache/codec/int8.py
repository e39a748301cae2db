"""Stores features as integers with group scales. int8 is the default codec; int4 is for comparison.

In and out: see `groups.py`. Invariant: every value is within half a scale of the original.
"""

import torch
from torch import Tensor

from scalekd_cache.codec.groups import GroupScaledCodec


class _IntegerCodec(GroupScaledCodec):
    def error_bound(self, features: Tensor) -> Tensor:
        """Half a float16 scale, plus float32 rounding of the difference, product and sum."""
        scales, means = self.scale_of_values(features)
        return scales / 2 + (features.abs() + means.abs()) * 2.0**-22


class Int8Codec(_IntegerCodec):
    """One-byte codes from -127 to 127. A Swin-L row at 224 px takes 3,072 + 1,176 + 75,264 + 196 = 79,708 bytes."""

    id = "int8"
    largest_code = 127.0

    @property
    def code_bytes(self) -> int:
        return self.tokens * self.channels

    def pack_codes(self, codes: Tensor) -> Tensor:
        return torch.round(codes).to(torch.int8).view(torch.uint8)

    def unpack_codes(self, packed: Tensor) -> Tensor:
        return packed.view(torch.int8).float()


class Int4Codec(_IntegerCodec):
    """Codes from -7 to 7, stored as 1 to 15, two per byte with the first in the low half. Odd counts are padded with
    8."""

    id = "int4"
    largest_code = 7.0

    @property
    def code_bytes(self) -> int:
        return -(-self.tokens * self.channels // 2)

    def pack_codes(self, codes: Tensor) -> Tensor:
        nibbles = (torch.round(codes) + 8).to(torch.uint8)
        pairs = torch.nn.functional.pad(nibbles, (0, nibbles.shape[1] % 2), value=8).view(len(codes), -1, 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def unpack_codes(self, packed: Tensor) -> Tensor:
        pairs = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
        return (pairs[:, : self.tokens * self.channels].float() - 8).contiguous()
