"""Renders feature maps as colors, so that similar features get similar colors.

In: maps (B, C, H, W) and pixels. Out: uint8 images. Invariant: images made with the same `Palette` are comparable.
The first principal component sets the brightness. The second runs from blue to yellow, which color-blind readers can
distinguish. The third runs from green to purple.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

OPACITY = 0.65
"""Opacity of the colors over the grayscale image."""
MIX = np.array([[0.8, 0.8, 0.8], [0.25, 0.25, -0.5], [0.2, -0.2, 0.2]])
"""(component, RGB) weights."""


class Palette(NamedTuple):
    """Principal components of the tokens in a set of maps."""

    mean: Tensor
    """(C,)"""
    basis: Tensor
    """(C, at most 3)"""
    low: Tensor
    """The 2nd percentile of each component."""
    high: Tensor
    """The 98th percentile of each component."""


def fit_palette(maps: Tensor) -> Palette:
    """Compute the palette for feature maps (B, C, H, W)."""
    tokens = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = tokens.mean(0)
    count = min(3, *tokens.shape)
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    basis = vectors[:, -count:].flip(1)
    basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, 1)  # fix the arbitrary sign of the eigenvectors
    values = (tokens - mean) @ basis
    return Palette(mean, basis, values.quantile(0.02, 0), values.quantile(0.98, 0))


def paint(palette: Palette, features: Tensor) -> NDArray[np.uint8]:
    """Convert a map (C, H, W) to uint8 colors (H, W, 3)."""
    tokens = features.permute(1, 2, 0).double()
    spread = (palette.high - palette.low).clamp_min(1e-12)
    values = (((tokens - palette.mean) @ palette.basis - palette.low) / spread).clamp(0, 1).numpy()
    mixed = 0.1 + values[..., :1] * MIX[0] + np.tensordot(values[..., 1:] - 0.5, MIX[1 : values.shape[-1]], 1)
    colors: NDArray[np.uint8] = (mixed.clip(0, 1) * 255).round().astype(np.uint8)
    return colors


def overlay(pixels: NDArray[np.uint8] | None, colors: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Enlarged colors (h, w, 3) over a grayscale copy of the pixels, or only the colors if there are no pixels."""
    large = Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST)
    if pixels is None:
        return np.array(large)
    gray = Image.fromarray(pixels).convert("L").convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return np.array(Image.blend(gray, large, OPACITY))
