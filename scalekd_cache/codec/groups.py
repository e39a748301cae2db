"""Stores features as 8-bit or 4-bit differences from the channel mean, with one float16 scale per 128 channels.

In and out: see `base.py`. A row consists of float16 means (C), float16 scales (H*W, ceil(C/128)), codes (H*W, C) and
float16 norms (2, H*W). Invariant: a scale is the group's largest magnitude divided by the largest code, rounded *up* to
float16, so codes are never clipped.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from scalekd_cache.codec.base import RowCodec, as_bytes, channel_means, contiguous_copy

GROUP = 128
"""Channels per scale."""


def round_up_to_float16(values: Tensor) -> Tensor:
    """Round non-negative float32 values up to float16. They must not exceed the largest finite float16."""
    nearest = values.to(torch.float16)
    # The bit patterns of non-negative floats have the same order as integers, so adding 1 gives the next float16.
    bits = nearest.view(torch.int16) + (nearest.float() < values).to(torch.int16)
    return bits.view(torch.float16)


class GroupScaledCodec(RowCodec):
    """Base class. A subclass sets the largest code and converts values, in units of the scale, to bytes and back."""

    largest_code: ClassVar[float]

    @abstractmethod
    def pack_codes(self, codes: Tensor) -> Tensor:
        """(B, T * C) float32 in units of the scale -> uint8 (B, code_bytes)."""

    @abstractmethod
    def unpack_codes(self, packed: Tensor) -> Tensor:
        """uint8 (B, code_bytes) -> (B, T * C) float32 in units of the scale."""

    @property
    @abstractmethod
    def code_bytes(self) -> int:
        """Code bytes per row."""

    @property
    def groups(self) -> int:
        """Number of scales per position. The last one covers fewer than 128 channels unless 128 divides C."""
        return -(-self.channels // GROUP)

    @property
    def value_bytes(self) -> int:
        return 2 * self.channels + 2 * self.tokens * self.groups + self.code_bytes

    def _scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> zero-padded groups of values (B, T, G, 128), and float16 scales (B, T, G)."""
        padding = self.groups * GROUP - self.channels
        grouped = torch.nn.functional.pad(values, (0, padding)).view(*values.shape[:2], self.groups, GROUP)
        return grouped, round_up_to_float16(grouped.abs().amax(dim=3) / self.largest_code)

    def encode_values(self, values: Tensor) -> Tensor:
        means = channel_means(values)
        grouped, scales = self._scales(values - means.float())
        divisor = torch.where(scales > 0, scales.float(), 1.0)
        codes = (grouped / divisor[..., None]).flatten(2)[..., : self.channels]
        return torch.cat(
            (as_bytes(means.flatten(1)), as_bytes(scales.flatten(1)), self.pack_codes(codes.flatten(1))), dim=1
        )

    def decode_values(self, codes: Tensor) -> Tensor:
        batch, start = len(codes), 2 * self.channels
        split = start + 2 * self.tokens * self.groups
        means = contiguous_copy(codes[:, :start]).view(torch.float16).float()
        scales = (
            contiguous_copy(codes[:, start:split]).view(torch.float16).float().view(batch, self.tokens, self.groups)
        )
        values = self.unpack_codes(codes[:, split:]).view(batch, self.tokens, self.channels)
        if self.channels % GROUP == 0:
            values.view(batch, self.tokens, self.groups, GROUP).mul_(scales[..., None])
        else:
            values.mul_(scales.repeat_interleave(GROUP, dim=2)[..., : self.channels])
        return values.add_(means[:, None])

    def scale_of_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Each value's scale (B, C, H, W) and each channel's float16 mean (B, C, 1, 1), both as float32."""
        values = features.permute(0, 2, 3, 1).reshape(len(features), self.tokens, self.channels)
        means = channel_means(values).float()
        _, scales = self._scales(values - means)
        spread = scales.float().repeat_interleave(GROUP, dim=2)[..., : self.channels]
        grid = spread.reshape(len(features), self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return grid, means.view(len(features), self.channels, 1, 1)
