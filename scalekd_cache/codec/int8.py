"""Features as int8 with one float16 scale for every 64 channels at each grid position: the default codec.

In and out: see `base.py`. A row: scales float16 (H*W, ceil(C/64)), codes int8 (H*W, C), norms float16 (2, H*W).
Invariant: a scale is the group's largest magnitude over 127, rounded *up* in float16, so codes never clip and every
value is within half a scale of the original.
"""

import torch
from torch import Tensor

from scalekd_cache.codec.base import FeatureCodec, as_bytes, fresh

GROUP = 64
"""Channels that share a scale."""
LEVELS = 127
"""Codes run from -127 to 127."""


def round_up_to_float16(values: Tensor) -> Tensor:
    """The smallest float16 that is not below a non-negative float32 (up to the largest finite float16)."""
    nearest = values.to(torch.float16)
    # The bit patterns of non-negative floats are ordered as integers: the next one up is the next float16.
    bits = nearest.view(torch.int16) + (nearest.float() < values).to(torch.int16)
    return bits.view(torch.float16)


class Int8Codec(FeatureCodec):
    """See the module's text; Swin-L at 224 px: 2,352 + 75,264 + 196 = 77,812 bytes a view."""

    id = "int8"

    @property
    def groups(self) -> int:
        """Scales at a position; the last one covers fewer than 64 channels when C is not a multiple of 64."""
        return -(-self.channels // GROUP)

    @property
    def value_bytes(self) -> int:
        return self.tokens * (2 * self.groups + self.channels)

    def _scales(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C) -> values in groups (B, T, G, 64), zero-padded, and float16 scales (B, T, G)."""
        padding = self.groups * GROUP - self.channels
        grouped = torch.nn.functional.pad(values, (0, padding)).view(*values.shape[:2], self.groups, GROUP)
        return grouped, round_up_to_float16(grouped.abs().amax(dim=3) / LEVELS)

    def encode_values(self, values: Tensor) -> Tensor:
        grouped, scales = self._scales(values)
        divisor = torch.where(scales > 0, scales.float(), 1.0)
        codes = torch.round(grouped / divisor[..., None]).to(torch.int8).flatten(2)[..., : self.channels]
        return torch.cat((as_bytes(scales.flatten(1)), as_bytes(codes.flatten(1))), dim=1)

    def decode_values(self, codes: Tensor) -> Tensor:
        batch, split = len(codes), 2 * self.tokens * self.groups
        scales = fresh(codes[:, :split]).view(torch.float16).float().view(batch, self.tokens, self.groups)
        values = codes[:, split:].view(torch.int8).float().view(batch, self.tokens, self.channels)
        if self.channels % GROUP == 0:
            values.view(batch, self.tokens, self.groups, GROUP).mul_(scales[..., None])
        else:
            values.mul_(scales.repeat_interleave(GROUP, dim=2)[..., : self.channels])
        return values

    def error_bound(self, features: Tensor) -> Tensor:
        """Half a scale (the float16 rounding of the scale is part of it), plus float32 rounding of the product."""
        values = features.permute(0, 2, 3, 1).reshape(len(features), self.tokens, self.channels)
        _, scales = self._scales(values)
        half = scales.float().repeat_interleave(GROUP, dim=2)[..., : self.channels] / 2
        bound = half.view(len(features), self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return bound + features.abs() * 2.0**-22
