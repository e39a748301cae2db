"""Pixel normalization: converts uint8 images to the value range and size that a model expects.

In: images (B, 3, H, W) and a model's image size, channel means and standard deviations. Out: float32.
Invariant: the order of operations never changes, because it affects rounding, and thus the cached bytes and the losses
for a fixed seed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) in [0, 255] -> (B, 3, size, size) float32, bicubic with antialiasing.

    Images that already have this size are returned unchanged.
    """
    if images.shape[2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    return resized.clamp_(0, 255)  # bicubic overshoots at edges


def student_input(images: Tensor, size: int, normalize: nn.Module) -> Tensor:
    """(B, 3, H, W) uint8 -> a student's normalized input (B, 3, size, size), always in the same memory layout, because
    convolutions round differently in other layouts."""
    pixels: Tensor = normalize(resize(images, size))
    return pixels.contiguous(memory_format=torch.channels_last)


class Normalize(nn.Module):
    """Subtracts channel means and divides by channel standard deviations, both for pixel values in [0, 1].

    Args:
        mean: three channel means.
        std: three channel standard deviations.
        folded: fold the factor 255 into the constants: (x - 255 mean) / (255 std) instead of (x / 255 - mean) / std.
            Training uses this because it saves a pass over the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, folded: bool = False) -> None:
        super().__init__()
        self.folded = folded
        for name, values in (("mean", mean), ("std", std)):
            constants = torch.tensor(values).view(1, 3, 1, 1) * (255 if folded else 1)
            self.register_buffer(name, constants, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the constants' device -> float32."""
        return self.standardize(images.float() if self.folded else images.float() / 255)

    def standardize(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) float32 on the same scale as the constants -> float32."""
        return (x - self.mean) / self.std
