"""Stage 1: images and a teacher -> committed work units and a manifest.

In: a `CacheTeacherConfig`. Out: a complete cache. Invariant: a unit's bytes depend on its images, the view recipe, the
teacher and the codec, never on which rank made it; what is committed is never touched again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import EncodedView, SampledViews, Unit, views_of_units
from scalekd_cache.caching.skips import SkipPolicy
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import Teacher, TeacherOutput
from scalekd_cache.store.background import Behind, CommitQueue
from scalekd_cache.store.base import Record
from scalekd_cache.store.fidelity_summary import summarize
from scalekd_cache.store.image_digests import ImageFiles
from scalekd_cache.store.unit import UnitWriter

NOTHING: Mapping[str, str] = {}
BATCHES_BEHIND = 2
"""Batches that wait to be encoded and appended, or are: with two a GPU has the next one's work when it ends one."""


def unit_ranges(source: Source | PixelCache, samples_per_shard: int) -> list[range]:
    """The ranges of images that units are made of, the same in every group of views."""
    return source.ranges() if isinstance(source, PixelCache) else source.ranges(samples_per_shard)


def plan_units(source: Source | PixelCache, groups: Sequence[Sequence[int]], samples_per_shard: int) -> list[Unit]:
    """All work units of a cache, in the order they are handed out."""
    ranges = unit_ranges(source, samples_per_shard)
    return [
        Unit(group=group, range_id=range_id, positions=positions, views=tuple(views))
        for group, views in enumerate(groups)
        for range_id, positions in enumerate(ranges)
    ]


class Stage(NamedTuple):
    """What every unit is made with."""

    root: Path
    backend: str
    fingerprint: str
    source: Source | PixelCache
    views: ViewConfig
    teacher: Teacher
    codec: FeatureCodec
    logit_codec: LogitCodec
    batch_size: int
    device: torch.device
    versions: dict[str, str]
    """Library versions, kept in every unit."""


def make_units(
    stage: Stage, units: Sequence[Unit], claims: Iterator[int], workers: int, done: Callable[[Unit], None],
    skips: SkipPolicy | None = None,
) -> None:  # fmt: skip
    """Make the claimed units and commit each, while the next one is being made.

    Args:
        stage: what units are made with.
        units: all units of the cache.
        claims: numbers of the units that this process shall make; asked for one at a time, as late as possible.
        workers: processes that draw views.
        done: called after a unit is committed, with the one after it filled.
        skips: decides which images are left out and which units are put off (None: whatever cannot be decoded).
    """
    first = ImageFiles(stage.root, [(unit.group, unit.range_id) for unit in units if unit.group == 0])
    drawn_in_turn = views_of_units(stage.source, stage.views, units, claims, workers, first)
    with CommitQueue() as commits:
        for number, drawn in groupby(drawn_in_turn, key=lambda item: item.unit):
            left_out = skips.before(units[number]) if skips else {}
            writer, figures = fill_unit(stage, units[number], drawn, left_out)
            if skips and not skips.accepts(units[number], writer):
                writer.abort()
                continue
            commits.put(writer, figures, partial(done, units[number]))


def fill_unit(
    stage: Stage, unit: Unit, drawn: Iterator[SampledViews], left_out: Mapping[str, str] = NOTHING
) -> tuple[UnitWriter, dict[str, Any]]:
    """Run one unit through the teacher and the codecs into a writer; codecs and writer work behind the teacher.

    Args:
        stage: what units are made with.
        unit: the unit.
        drawn: its images with their views.
        left_out: sample keys that are skipped in any case, with the reasons.

    Returns:
        The writer and the unit's fidelity: `writer.commit(fidelity)` is left to do. After an error nothing is there.
    """
    figures: dict[str, list[float]] = {}
    writer = UnitWriter(
        stage.root,
        backend=stage.backend,
        group=unit.group,
        range_id=unit.range_id,
        start=unit.positions.start,
        stop=unit.positions.stop,
        views=unit.views,
        fingerprint=stage.fingerprint,
        versions=stage.versions,
    )
    try:
        with Behind("encode", BATCHES_BEHIND) as behind:
            for batch in _batches(stage, writer, drawn, left_out):
                for column, number in enumerate(unit.views):
                    views = [item.views[column] for item in batch]
                    pixels = torch.stack([item.pixels[column] for item in batch])
                    output = stage.teacher(_on_device(pixels, stage.device))
                    behind.put(_append_batch, stage, writer, number, batch, views, output, figures)
    except BaseException:
        writer.abort()
        raise
    return writer, summarize(figures)


def _batches(
    stage: Stage, writer: UnitWriter, drawn: Iterator[SampledViews], left_out: Mapping[str, str]
) -> Iterator[list[SampledViews]]:
    """Teacher batches of the unit's images; those left out or that could not be decoded are skipped in the writer."""
    batch: list[SampledViews] = []
    for item in drawn:
        reason = left_out.get(item.sample.key, item.reason)
        if reason:
            writer.skip(item.sample.key, reason)
            continue
        batch.append(item)
        if len(batch) == stage.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _on_device(images: Tensor, device: torch.device) -> Tensor:
    """A copy that a GPU makes on its own, while this thread goes on."""
    return images.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else images.to(device)


@torch.no_grad()
def _append_batch(
    stage: Stage,
    writer: UnitWriter,
    number: int,
    batch: Sequence[SampledViews],
    views: Sequence[EncodedView],
    output: TeacherOutput,
    figures: dict[str, list[float]],
) -> None:
    """What the teacher said of a view of some images, encoded and appended; `figures` gathers fidelity a view."""
    _check_finite(output.features, output.logits, batch, number)
    seeds = torch.tensor([dither_seed(item.sample.key, number) for item in batch])
    codes = stage.codec.encode(output.features, seeds)
    close = fidelity(output.features, stage.codec.decode(codes).features)
    for name, values in zip(close._fields, close, strict=True):
        figures.setdefault(name, []).extend(values.tolist())
    logits = stage.logit_codec.encode(output.logits)
    for item, view, code, logit in zip(batch, views, stage.codec.pack(codes.cpu().numpy()), logits, strict=True):
        record = Record(
            key=item.sample.key,
            label=item.sample.label,
            view=view.view,
            digest=view.digest,
            pixels=view.encoded,
            features=code,
            logits=logit,
        )
        writer.append(number, record, item.image)


def _check_finite(features: Tensor, logits: Tensor, batch: Sequence[SampledViews], view: int) -> None:
    finite = features.flatten(1).isfinite().all(1) & logits.isfinite().all(1)
    if not bool(finite.all()):
        bad = [item.sample.key for item, ok in zip(batch, finite.tolist(), strict=True) if not ok]
        raise UserError(
            "the teacher's output is not finite",
            got=f"NaN or infinity for {len(bad)} images, the first is {bad[0]}",
            where=f"view {view}",
            fix="try --teacher.precision float32, or check the teacher's weights",
        )
