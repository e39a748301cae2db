"""The method taken apart: which of the four feature terms are on, and the plain projector that CAP is compared with.

In: a `ScaleKDConfig`. Out: the weight of each term, 0 for what is switched off; a 1x1 convolution in place of CAP.
Invariant: with all switches at their defaults the weights are the configuration's own and nothing here is built.
docs/METHOD.md lists the rows of an ablation table with the switches that give them.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_cache.config.stage2 import ScaleKDConfig
from scalekd_cache.models.teacher_spec import Shape


class TermWeights(NamedTuple):
    """Weights of the four feature terms."""

    s3_spatial: float
    s3_frequency: float
    s4_spatial: float
    s4_frequency: float


def term_weights(config: ScaleKDConfig) -> TermWeights:
    """The weights that the switches leave."""
    s3, s4, frequency = float(config.s3), float(config.s4), float(config.frequency)
    return TermWeights(
        config.spatial_weight * s3,
        config.frequency_weight_s3 * s3 * frequency,
        config.spatial_weight * s4,
        config.frequency_weight_s4 * s4 * frequency,
    )


class LinearProjector(nn.Module):
    """Plain feature distillation: a student map (B, C', h, w), averaged onto the grid of `out`, by a 1x1 convolution.

    Args:
        in_channels: channels of the student's map.
        out: (C, H, W) of the output.
    """

    def __init__(self, in_channels: int, out: Shape) -> None:
        super().__init__()
        self.out = out
        self.proj = nn.Conv2d(in_channels, out[0], 1)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """(B, C', h, w) -> (B, C, H, W); a query is not used."""
        if x.shape[2:] != self.out[1:]:
            x = F.adaptive_avg_pool2d(x, self.out[1:])
        y: Tensor = self.proj(x)
        return y
