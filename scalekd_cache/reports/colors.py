"""Feature maps as colors: equal colors where the teacher sees the same thing.

In: maps (B, C, H, W) and pixels. Out: uint8 pictures. Invariant: pictures made with one `Palette` can be compared.
The first principal component is brightness and the second runs from blue to yellow, which color-blind readers can tell
apart; the third, from green to purple, adds what is left.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

OPACITY = 0.65
"""Of the colors over the picture."""
MIX = np.array([[0.8, 0.8, 0.8], [0.25, 0.25, -0.5], [0.2, -0.2, 0.2]])
"""Red, green and blue of the three components."""


class Palette(NamedTuple):
    """Principal components of some maps' tokens."""

    mean: Tensor
    """(C,)"""
    basis: Tensor
    """(C, at most 3)"""
    low: Tensor
    """The 2nd percentile of each component."""
    high: Tensor
    """The 98th."""


def fit_palette(maps: Tensor) -> Palette:
    """The palette of maps (B, C, H, W)."""
    tokens = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = tokens.mean(0)
    count = min(3, *tokens.shape)
    _, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    basis = vectors[:, -count:].flip(1)
    basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, 1)  # a sign that does not depend on the library
    values = (tokens - mean) @ basis
    return Palette(mean, basis, values.quantile(0.02, 0), values.quantile(0.98, 0))


def paint(palette: Palette, features: Tensor) -> NDArray[np.uint8]:
    """(C, H, W) to (H, W, 3) uint8 colors."""
    tokens = features.permute(1, 2, 0).double()
    spread = (palette.high - palette.low).clamp_min(1e-12)
    values = (((tokens - palette.mean) @ palette.basis - palette.low) / spread).clamp(0, 1).numpy()
    mixed = 0.1 + values[..., :1] * MIX[0] + np.tensordot(values[..., 1:] - 0.5, MIX[1 : values.shape[-1]], 1)
    colors: NDArray[np.uint8] = (mixed.clip(0, 1) * 255).round().astype(np.uint8)
    return colors


def overlay(pixels: NDArray[np.uint8] | None, colors: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Colors (h, w, 3), enlarged, over a gray copy of the pixels; alone where there are none."""
    large = Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST)
    if pixels is None:
        return np.array(large)
    gray = Image.fromarray(pixels).convert("L").convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return np.array(Image.blend(gray, large, OPACITY))
