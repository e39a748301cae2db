"""Measures bytes and seconds per view on a small unit.

In: a `Stage`. Out: `SizeProbe`.
Invariant: the measured units are written by the stage-1 code. One has a few real images and the other is empty, which
separates the cost per shard from the cost per image. The temporary folder is removed.
"""

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.caching.make_units import Stage, fill_unit
from scalekd_cache.caching.sample_views import SampledViews, Unit, spread_views
from scalekd_cache.codec import FITTED
from scalekd_cache.config.stage1 import StoreConfig
from scalekd_cache.store.formats.zarr import padding
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

VIEWS = 48
"""Approximate number of views to run through the teacher and the codecs."""
PIXEL_IMAGES = 256
"""Number of images encoded to measure the pixel size, which varies the most between images."""
TEACHER_S = 20.0
"""Time limit for the teacher in seconds. It applies to fixed-size codecs, for which a few views give the exact size."""
LEAST_IMAGES = 2
PARTS = ("features", "target", "pixels", "index")


class SizeProbe(NamedTuple):
    """Sizes and times measured on a small unit."""

    per_view: dict[str, float]
    """Bytes per view, by part, without the shard overhead."""
    per_shard: dict[str, float]
    """Overhead bytes per shard, by part, including the shard's share of the unit's overhead."""
    sample_s: float
    """Seconds per view on one core to read, decode, sample and encode."""
    teacher_s: float
    """Seconds per view for the teacher, codec and store on this machine, after a warm-up pass."""
    unit_s: float
    """Seconds per unit to commit its files on this machine."""
    pass_s: float
    """The teacher's seconds per image."""
    images: int
    views: int

    def bytes_of(self, ranges: Sequence[range], num_views: int) -> dict[str, float]:
        """Total bytes in a cache's units, by part."""
        images = sum(map(len, ranges))
        return {part: num_views * (images * self.per_view[part] + len(ranges) * self.per_shard[part]) for part in PARTS}


def measure_sizes(
    stage: Stage,
    cache: StoreConfig,
    *,
    num_views: int = VIEWS,
    pixel_images: int = PIXEL_IMAGES,
    teacher_s: float = TEACHER_S,
) -> SizeProbe:
    """Make a small unit and an empty one in a temporary folder and measure both.

    Args:
        stage: the inputs shared by all units.
        cache: the cache's options.
        num_views: approximate number of views to run through the teacher.
        pixel_images: number of images to encode to measure the pixel size.
        teacher_s: time limit for the teacher in seconds; with a fixed-size codec, it can reduce the number of views.

    Raises:
        UserError: none of the images can be decoded, or the codec rejects the teacher's output.
    """
    views = group_views(cache)
    started = time.perf_counter()
    images = list(spread_views(stage.source, stage.views, views, max(4, -(-num_views // len(views)))))
    sample_s = (time.perf_counter() - started) / (len(images) * len(views))
    pass_s = _pass_s(stage, images[0].pixels[:1])
    images = images[: images_within(stage, len(views), teacher_s, pass_s)]
    count = len(images) * len(views)
    with tempfile.TemporaryDirectory(prefix="scalekd-plan-") as folder:
        small = dataclasses.replace(stage, root=Path(folder), fingerprint="0" * 64)
        full, empty = _small_units(small, images, views)
    per_view = {part: (full.sizes[part] - empty.sizes[part]) / count for part in PARTS}
    if per_view["pixels"]:
        of_these = float(np.mean([len(view.encoded) for item in images for view in item.views]))
        per_view["pixels"] *= _pixel_bytes(stage, images, pixel_images) / of_these
    per_shard = {part: empty.sizes[part] / len(views) for part in PARTS}
    view_s = max(0.0, full.seconds - empty.seconds) / count
    return SizeProbe(per_view, per_shard, sample_s, view_s, empty.seconds, pass_s, len(images), count)


def group_views(cache: StoreConfig) -> tuple[int, ...]:
    """View numbers in the small unit, chosen so that the fraction of views with stored features is exact."""
    every = cache.features_every
    return tuple(range(-(-min(cache.num_views, cache.views_per_group) // every) * every))


def images_within(stage: Stage, views: int, teacher_s: float, pass_s: float) -> int:
    """Maximum number of images whose views the teacher can process in about `teacher_s` seconds."""
    return sys.maxsize if stage.codec.id in FITTED else max(LEAST_IMAGES, int(teacher_s / (pass_s * views)))


@torch.no_grad()
def _pass_s(stage: Stage, pixels: Tensor) -> float:
    """Forward-pass seconds per image. Short passes are repeated, because a model's first pass also sets up kernels."""
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        stage.teacher(pixels.to(stage.device)).features.cpu()
        seconds = min(seconds, time.perf_counter() - started)
        if seconds > 1:
            break
    return seconds


class _Unit(NamedTuple):
    """Bytes by part, and seconds."""

    sizes: dict[str, float]
    seconds: float


def _small_units(stage: Stage, images: Sequence[SampledViews], views: tuple[int, ...]) -> tuple[_Unit, _Unit]:
    """Write a unit with these views and an empty unit."""
    started = time.perf_counter()
    with torch.no_grad():
        unit = Unit(group=0, range_id=0, positions=range(len(images)), views=views)
        [(writer, figures)] = fill_unit([stage], unit, iter(images))
        writer.commit(figures)
    written = time.perf_counter()
    with UnitWriter(
        stage.root,
        backend=stage.backend,
        group=0,
        range_id=1,
        start=0,
        stop=1,
        views=views,
        fingerprint=stage.fingerprint,
    ) as writer:
        writer.skip("none", "none")
        writer.commit({})
    emptied = time.perf_counter()
    full, full_json = _parts(stage.root, 0)
    empty, empty_json = _parts(stage.root, 1)
    zeros, usual_zeros = padding(unit_folder(stage.root, 0, 0))
    empty["index"] += usual_zeros  # cost per shard, in both units
    full["index"] += usual_zeros - zeros
    empty["index"] += full_json - empty_json  # a real unit's sidecar also lists fidelity and all files
    return _Unit(full, written - started), _Unit(empty, emptied - written)


def _parts(root: Path, range_id: int) -> tuple[dict[str, float], int]:
    """A unit's bytes by part, and its sidecar's size in bytes."""
    folder = unit_folder(root, 0, range_id)
    info, data = read_unit(folder)
    total = len(data) + sum(fact.bytes for fact in info.files.values())
    payload = {part: float(info.payload_bytes[part]) for part in ("features", "target", "pixels")}
    return {**payload, "index": total - sum(payload.values())}, len(data)


def _pixel_bytes(stage: Stage, images: Sequence[SampledViews], count: int) -> float:
    """Mean stored pixel bytes per view, measured on many more images than the teacher processes."""
    more = spread_views(stage.source, stage.views, (0,), count)
    sizes = [len(item.views[0].encoded) for item in more]
    sizes += [len(view.encoded) for item in images for view in item.views[1:]]
    return float(np.mean(sizes))
