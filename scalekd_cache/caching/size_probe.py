"""Size of a cache, measured on a small unit of it.

In: a `Stage` with the teacher or a placeholder for it. Out: `SizeProbe`.
Invariant: stage 1's own code writes what is measured: one unit of a few real images, and one without images, which
separates the cost of a shard from that of an image. Their temporary folder is removed.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.caching.make_units import Stage, fill_unit
from scalekd_cache.caching.sample_views import SampledViews, Unit, spread_views
from scalekd_cache.codec import Shape
from scalekd_cache.config.stage1 import StoreConfig
from scalekd_cache.models.teacher import TeacherOutput
from scalekd_cache.store.formats.zarr import padding
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

VIEWS = 48
"""Approximate number of views that go through the teacher and the codecs."""
PIXEL_IMAGES = 256
"""Number of images whose pixels are encoded to measure their size, which varies most."""
PARTS = ("features", "target", "pixels", "index")


@dataclass(frozen=True)
class PlaceholderTeacher:
    """Random features of a teacher's shape, if its weights are not available. Sizes of fixed-size codecs are exact."""

    feature_shape: Shape
    num_classes: int
    pooled: int = 0

    def __call__(self, images: Tensor) -> TeacherOutput:
        """Standard normal features, logits and embeddings, seeded by the batch size."""
        generator = torch.Generator().manual_seed(len(images))
        features = torch.randn(len(images), *self.feature_shape, generator=generator)
        logits = torch.randn(len(images), self.num_classes, generator=generator)
        return TeacherOutput(features, logits, torch.randn(len(images), self.pooled, generator=generator))


class SizeProbe(NamedTuple):
    """Sizes and times measured on a small unit."""

    per_view: dict[str, float]
    """Bytes per view, by part, without the overhead of the shard."""
    per_shard: dict[str, float]
    """Overhead bytes per shard, including its share of the unit's overhead, by part."""
    sample_s: float
    """Seconds per view on one core: reading, decoding, sampling, encoding."""
    teacher_s: float
    """Seconds per view for teacher, codec and store on this machine."""
    images: int
    views: int

    def bytes_of(self, ranges: Sequence[range], num_views: int) -> dict[str, float]:
        """Bytes of all units of a cache, by part."""
        images = sum(map(len, ranges))
        return {part: num_views * (images * self.per_view[part] + len(ranges) * self.per_shard[part]) for part in PARTS}


def measure_sizes(
    stage: Stage, cache: StoreConfig, *, num_views: int = VIEWS, pixel_images: int = PIXEL_IMAGES
) -> SizeProbe:
    """Make a small unit and an empty one in a temporary folder, and measure them.

    Args:
        stage: what the cache's units are made with; its teacher may be a `PlaceholderTeacher`.
        cache: the cache's options.
        num_views: approximate number of views that go through the teacher.
        pixel_images: number of images whose pixels are encoded to measure their size.

    Raises:
        UserError: no image can be decoded, or the codec refuses the teacher's output.
    """
    every = cache.features_every
    views = tuple(range(-(-min(cache.num_views, cache.views_per_group) // every) * every))  # the share is exact then
    started = time.perf_counter()
    images = list(spread_views(stage.source, stage.views, views, max(4, -(-num_views // len(views)))))
    count = len(images) * len(views)
    sample_s = (time.perf_counter() - started) / count
    with tempfile.TemporaryDirectory(prefix="scalekd-plan-") as folder:
        small = dataclasses.replace(stage, root=Path(folder), fingerprint="0" * 64)
        full, empty, teacher_s = _small_units(small, images, views)
    per_view = {part: (full[part] - empty[part]) / count for part in PARTS}
    if per_view["pixels"]:
        of_these = float(np.mean([len(view.encoded) for item in images for view in item.views]))
        per_view["pixels"] *= _pixel_bytes(stage, images, pixel_images) / of_these
    return SizeProbe(
        per_view, {part: empty[part] / len(views) for part in PARTS}, sample_s, teacher_s, len(images), count
    )


def _small_units(
    stage: Stage, images: Sequence[SampledViews], views: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Write a unit of these views and an empty one: bytes of each by part, and seconds per view of the first."""
    started = time.perf_counter()
    with torch.no_grad():
        unit = Unit(group=0, range_id=0, positions=range(len(images)), views=views)
        [(writer, figures)] = fill_unit([stage], unit, iter(images))
        writer.commit(figures)
    teacher_s = (time.perf_counter() - started) / (len(images) * len(views))
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
    full, full_json = _parts(stage.root, 0)
    empty, empty_json = _parts(stage.root, 1)
    zeros, usual_zeros = padding(unit_folder(stage.root, 0, 0))
    empty["index"] += usual_zeros  # cost of a shard, in both units
    full["index"] += usual_zeros - zeros
    empty["index"] += full_json - empty_json  # sidecar of a real unit: fidelity, all files
    return full, empty, teacher_s


def _parts(root: Path, range_id: int) -> tuple[dict[str, float], int]:
    """Bytes of a unit by part, and the bytes of its sidecar."""
    folder = unit_folder(root, 0, range_id)
    info, data = read_unit(folder)
    total = len(data) + sum(fact.bytes for fact in info.files.values())
    payload = {part: float(info.payload_bytes[part]) for part in ("features", "target", "pixels")}
    return {**payload, "index": total - sum(payload.values())}, len(data)


def _pixel_bytes(stage: Stage, images: Sequence[SampledViews], count: int) -> float:
    """Mean bytes of stored pixels per view, over many more images than go through the teacher."""
    more = spread_views(stage.source, stage.views, (0,), count)
    sizes = [len(item.views[0].encoded) for item in more]
    sizes += [len(view.encoded) for item in images for view in item.views[1:]]
    return float(np.mean(sizes))
