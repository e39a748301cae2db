"""Taps on a teacher: the maps around its tail, recorded during a forward pass, and their shapes.

In: a timm model and its `TailParts`. Out: `Taps`; (C, H, W) of the tail's input and of the features.
Invariant: the hooks are removed even if the forward pass fails.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalekd_cache.codec import Shape
from scalekd_cache.errors import UserError
from scalekd_cache.models.tail import TailParts, features_of, to_map

POOLED_TOLERANCE = 1e-4
"""Maximum difference at which a pooled embedding and the mean of the map count as equal, relative to the mean's largest
value. Float32 rounding gives about 1e-6."""


class Taps(NamedTuple):
    """Results of a forward pass. Maps are in the model's own layout."""

    before: Tensor
    """Input to the tail's first module."""
    after: Tensor
    """Output of the tail's last module."""
    logits: Tensor
    pooled: Tensor | None = None
    """The model's pooled output in timm, if requested."""


def run_with_taps(model: nn.Module, parts: TailParts, x: Tensor, *, pooled: bool = False) -> Taps:
    """Run the model and record the maps before and after the tail's body with hooks.

    With `pooled`, the head runs a second time, only up to the pooled embedding as defined by timm. This also works for
    models with multiple classifiers or an attention pool.
    """
    seen: dict[str, Tensor] = {}
    first = parts.body[0].register_forward_pre_hook(lambda _, args: seen.__setitem__("before", args[0]))
    last = parts.body[-1].register_forward_hook(lambda _module, _args, out: seen.__setitem__("after", out))
    embedding: Tensor | None = None
    try:
        if pooled:
            timm_model: Any = model
            features = timm_model.forward_features(x)
            logits, embedding = timm_model.forward_head(features), timm_model.forward_head(features, pre_logits=True)
        else:
            logits = model(x)
    finally:
        first.remove()
        last.remove()
    return Taps(seen["before"], seen["after"], logits, embedding)


@torch.no_grad()
def pooled_width(model: nn.Module, parts: TailParts, grid: tuple[int, int], image_size: int) -> int:
    """P, the width of the pooled embedding; 0 if the model has none, or if it equals the mean of the map.

    It is measured on a noise image in float32. A model has no pooled embedding if it lacks timm's `forward_head` or if
    its pooling keeps positions (`global_pool=""`, as in SAM's encoder).
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        return 0
    noise = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    taps = run_with_taps(model, parts, noise, pooled=True)
    assert taps.pooled is not None
    if taps.pooled.dim() != 2:
        return 0
    mean = features_of(parts, taps.after, grid).mean((2, 3))
    same = taps.pooled.shape == mean.shape
    if same and bool((taps.pooled - mean).abs().max() <= POOLED_TOLERANCE * mean.abs().max()):
        return 0
    return int(taps.pooled.shape[1])


def usable_shapes(taps: Taps, parts: TailParts, name: str, image_size: int) -> tuple[Shape, Shape]:
    """`map_shapes` of a teacher at this image size. Raises `UserError` if the features have only one position."""
    shapes = map_shapes(taps, parts)
    if shapes[1][1:] == (1, 1):
        raise UserError(
            "the teacher's last feature map is 1x1, but feature distillation needs a spatial grid",
            got=f"{name} at {image_size} pixels",
            expected="at least 2x2",
            fix="choose a larger views.size",
        )
    return shapes


def map_shapes(taps: Taps, parts: TailParts) -> tuple[Shape, Shape]:
    """Shapes of the tail's input, (C3, H3, W3), and the features, (C, H, W). Token grids are square, as images are."""
    grids = []
    for x, unrolled in ((taps.before, parts.unrolled[0]), (taps.after, parts.unrolled[1])):
        side = math.isqrt(x.shape[1] - parts.prefix) if parts.layout in ("tokens", "unrolled") else 0
        grids.append(to_map(x, parts.layout, parts.prefix, (side, side), unrolled).shape)
    (_, before, *grid), (_, _, height, width) = grids
    channels = features_of(parts, taps.after, (height, width)).shape[1]  # SAM's neck changes the number of channels
    return (before, grid[0], grid[1]), (channels, height, width)
