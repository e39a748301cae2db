"""What a cache is going to take, measured on a small one.

In: options of stage 1, a data set, the teacher or, without one, the shape of its features. Out: `Sizes`, `SizeProbe`.
Invariant: every byte is one that stage 1's own code wrote: a unit of a few real images, and a unit of none, whose
files tell what an image costs from what a shard costs. The folder they are written to is removed.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.caching.make_units import Stage, fill_unit, unit_ranges
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import SampledViews, Unit, ViewDataset, views_of_units
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.data.base import Source
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import Teacher, TeacherOutput
from scalekd_cache.store.formats.zarr import padding
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

VIEWS = 48
"""About so many views go through the teacher and the codecs."""
PIXEL_IMAGES = 256
"""Images of which one view is drawn for the size of its pixels: they differ more than anything else."""
PARTS = ("features", "target", "pixels", "index")


@dataclass(frozen=True)
class PlaceholderTeacher:
    """In place of a teacher that is not at hand: made-up features of its shape. Sizes of fixed-size codecs hold."""

    feature_shape: tuple[int, int, int]
    num_classes: int

    def __call__(self, images: Tensor) -> TeacherOutput:
        """Normal numbers, a function of the batch's size."""
        generator = torch.Generator().manual_seed(len(images))
        features = torch.randn(len(images), *self.feature_shape, generator=generator)
        return TeacherOutput(features, torch.randn(len(images), self.num_classes, generator=generator))


class SizeProbe(NamedTuple):
    """What a small unit showed."""

    per_view: dict[str, float]
    """Bytes of a view, by part, without what a shard costs."""
    per_shard: dict[str, float]
    """Bytes of a shard and its share of its unit, by part."""
    draw_s: float
    """Seconds of one core for a view: reading, decoding, drawing, encoding."""
    teacher_s: float
    """Seconds of the teacher, codec and store for a view, here."""
    images: int
    views: int

    def bytes_of(self, ranges: Sequence[range], num_views: int) -> dict[str, float]:
        """Bytes of a whole cache by part, all that lies in units."""
        images = sum(map(len, ranges))
        return {part: num_views * (images * self.per_view[part] + len(ranges) * self.per_shard[part]) for part in PARTS}


def measure_sizes(
    config: CacheTeacherConfig,
    source: Source | PixelCache,
    teacher: Teacher | PlaceholderTeacher,
    codec: FeatureCodec,
    logit_codec: LogitCodec,
    device: torch.device,
    *,
    num_views: int = VIEWS,
    pixel_images: int = PIXEL_IMAGES,
) -> SizeProbe:
    """Make a small unit and an empty one where temporary files go, and measure them.

    Args:
        config: all options of stage 1.
        source: images, or another cache's views of them.
        teacher: the teacher, or made-up features.
        codec: of features.
        logit_codec: of logits.
        device: the teacher's.
        num_views: about so many views go through the teacher.
        pixel_images: images of which one view is drawn for the size of its pixels.

    Raises:
        UserError: no image can be decoded, or the codec refuses what the teacher says.
    """
    views = tuple(range(min(config.cache.num_views, config.cache.views_per_group)))
    started = time.perf_counter()
    drawn = _drawn(config, source, views, num_views)
    draw_s = (time.perf_counter() - started) / (len(drawn) * len(views))
    pixels = _pixel_bytes(config, source, drawn, pixel_images)
    with tempfile.TemporaryDirectory(prefix="scalekd-plan-") as folder:
        stage = Stage(
            Path(folder), config.cache.backend, "0" * 64, source, config.views, cast(Teacher, teacher), codec,
            logit_codec, config.teacher.batch_size, device, {},
        )  # fmt: skip
        full, empty, teacher_s = _small_units(stage, drawn, views)
    count = len(drawn) * len(views)
    per_view = {part: (full[part] - empty[part]) / count for part in PARTS}
    if per_view["pixels"]:
        per_view["pixels"] *= pixels / float(np.mean([len(view.encoded) for item in drawn for view in item.views]))
    return SizeProbe(per_view, {part: empty[part] / len(views) for part in PARTS}, draw_s, teacher_s, len(drawn), count)


def _small_units(
    stage: Stage, drawn: Sequence[SampledViews], views: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Write a unit of these views and one of none: bytes of each by part, and seconds of a view of the first."""
    started = time.perf_counter()
    with torch.no_grad():
        unit = Unit(group=0, range_id=0, positions=range(len(drawn)), views=views)
        writer, figures = fill_unit(stage, unit, iter(drawn))
        writer.commit(figures)
    teacher_s = (time.perf_counter() - started) / (len(drawn) * len(views))
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
    empty["index"] += usual_zeros  # what a shard costs, in both
    full["index"] += usual_zeros - zeros
    empty["index"] += full_json - empty_json  # the sidecar of a real unit: fidelity, all files
    return full, empty, teacher_s


def _parts(root: Path, range_id: int) -> tuple[dict[str, float], int]:
    """Bytes of a unit by part, and those of its sidecar."""
    folder = unit_folder(root, 0, range_id)
    info, data = read_unit(folder)
    total = len(data) + sum(fact.bytes for fact in info.files.values())
    payload = {part: float(info.payload_bytes[part]) for part in ("features", "target", "pixels")}
    return {**payload, "index": total - sum(payload.values())}, len(data)


def _drawn(
    config: CacheTeacherConfig, source: Source | PixelCache, views: tuple[int, ...], num_views: int
) -> list[SampledViews]:
    """Some images spread over the data set, with the views of a group, as stage 1 draws them."""
    images = max(4, -(-num_views // len(views)))
    if isinstance(source, PixelCache):
        ranges = unit_ranges(source, config.cache.samples_per_shard)
        unit = Unit(group=0, range_id=0, positions=ranges[0], views=views)
        items = views_of_units(source, config.views, [unit], iter([0]), 0)
    else:
        unit = Unit(group=0, range_id=0, positions=range(len(source.samples)), views=views)
        drawing = ViewDataset(source, config.views, [unit])
        spread = np.linspace(0, len(source.samples) - 1, min(2 * images, len(source.samples))).astype(int)
        # Twice as many as are wanted, in an order that stays spread: some may be unreadable.
        items = (drawing[0, int(index)] for index in [*spread[::2], *spread[1::2]])
    drawn = list(islice((item for item in items if not item.reason), images))
    if not drawn:
        raise UserError("no image of the data set could be decoded", where=config.data.source, fix="check DATA=")
    return drawn


def _pixel_bytes(
    config: CacheTeacherConfig, source: Source | PixelCache, drawn: Sequence[SampledViews], pixel_images: int
) -> float:
    """Mean bytes of a view's stored pixels, over many more images than go through the teacher."""
    if isinstance(source, PixelCache) or config.views.pixels != "baked":
        return 0.0
    drawing = ViewDataset(source, config.views, [Unit(group=0, range_id=0, positions=range(1), views=(0,))])
    count = min(pixel_images, len(source.samples))
    items = (drawing[0, int(index)] for index in np.linspace(0, len(source.samples) - 1, count).astype(int))
    sizes = [len(item.views[0].encoded) for item in items if not item.reason]
    sizes += [len(view.encoded) for item in drawn for view in item.views[1:]]
    return float(np.mean(sizes))
