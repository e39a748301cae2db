"""Makes work units: runs sampled views through the teacher and the codecs and commits the results.

In: one `Stage` per teacher and the units to make. Out: committed units.
Invariant: a unit's bytes depend only on its images, the view recipe, the teacher and the codec, never on the rank that
made it. Batch size and GPU model can change the last bits of the teacher's output. A committed unit never changes.
Every view group has the same images as the first one (`SkipPolicy`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.caching.encode_batch import (
    HostBatch,
    PixelBuffers,
    compare,
    encode_batch,
    page_locked,
    pooled_maps,
)
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import EncodedView, SampledViews, Unit, views_of_units
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import Fidelity
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.teacher import Teacher, TeacherOutput
from scalekd_cache.store.background import BackgroundWriter, CommitQueue, FilledUnit, abort_all
from scalekd_cache.store.base import Record, stores_features
from scalekd_cache.store.fidelity_summary import POOLED_COSINE, summarize
from scalekd_cache.store.image_digests import ImageFiles
from scalekd_cache.store.resume import CommittedUnits, some_keys
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.store.verify import unit_name

NO_SKIPS: Mapping[str, str] = {}
NO_PIXELS = torch.empty(0, dtype=torch.uint8)
QUEUED_BATCHES = 2
"""Number of batches queued for writing. With two, the GPU does not wait between batches."""


def unit_ranges(source: Source | PixelCache, samples_per_shard: int) -> list[range]:
    """The image ranges, one per unit, which are the same in every view group."""
    return source.shared.ranges if isinstance(source, PixelCache) else source.ranges(samples_per_shard)


def plan_units(ranges: Sequence[range], groups: Sequence[Sequence[int]]) -> list[Unit]:
    """All work units for a cache, in assignment order."""
    return [
        Unit(group=group, range_id=range_id, positions=positions, views=tuple(views))
        for group, views in enumerate(groups)
        for range_id, positions in enumerate(ranges)
    ]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The inputs shared by all units."""

    root: Path
    backend: str
    fingerprint: str
    source: Source | PixelCache
    views: ViewConfig
    teacher: Teacher
    codec: FeatureCodec
    logit_codec: LogitCodec
    second_codec: FeatureCodec | None = None
    """Codec for pooled embeddings (None: not stored)."""
    batch_size: int
    shares_pixels: bool = False
    """Whether pixels and image digests are stored only in another cache."""
    features_every: int = 1
    """Features are stored for one in this many views of each image (`stores_features` in `store/base.py`)."""
    device: torch.device
    versions: dict[str, str]
    """Library versions, recorded in every unit."""


class SkipPolicy:
    """Decides which images a unit skips, and defers units that would skip the wrong ones.

    Every view group must skip exactly the images that could not be decoded for the first group. A unit that violates
    this rule is not committed. It is retried at the end of the job, when the images may be readable again; if it still
    violates the rule, `check` raises.

    Args:
        root: the cache folder.
        source: the images. A `PixelCache` already skips the same images in every group.
        ledger: the cache's committed units.
        follows: whether the ledger belongs to another, finished cache. All groups then skip the same images as that
            cache's first group.
    """

    def __init__(
        self, root: Path, source: Source | PixelCache, ledger: CommittedUnits, *, follows: bool = False
    ) -> None:
        self._root, self._source, self._ledger, self._follows = root, source, ledger, follows
        self._deferred: dict[tuple[int, int], dict[str, str]] = {}
        self._last_pass = False

    def required_skips(self, unit: Unit) -> Mapping[str, str]:
        """Keys of the samples that a unit must skip even if they can be decoded, with the reasons."""
        return {} if self._decides(unit) else self._ledger.skipped_images() or {}

    def accepts(self, unit: Unit, writer: UnitWriter) -> bool:
        """Whether a filled unit can be committed; if not, it is deferred."""
        wrong = {} if isinstance(self._source, PixelCache) else self._wrong_skips(unit, writer)
        if wrong:
            place = unit.group, unit.range_id
            self._deferred[place] = wrong
            if not self._last_pass:
                print(f"{unit_name(place)} will be rebuilt at the end of this job: {some_keys(wrong)}", flush=True)
        return not wrong

    def start_last_pass(self) -> None:
        """Start the last pass, in which deferred units are an error."""
        self._deferred, self._last_pass = {}, True

    def check(self) -> None:
        """Raise `UserError` if units were deferred in the last pass."""
        if not self._deferred:
            return
        keys = {key for wrong in self._deferred.values() for key in wrong}
        held = ", ".join(unit_name(place) for place in self._ledger.units_with(keys))
        raise UserError(
            "cannot decode some images that were decoded for the first view group",
            got="; ".join(f"{unit_name(place)}: {some_keys(wrong)}" for place, wrong in self._deferred.items()),
            expected="the same images in every view group",
            where=self._root,
            fix="restore these image files and rerun (finished units are kept). If a file is lost, delete the units "
            f"that contain its image ({held}) and rerun: the image is then skipped in all views",
        )

    def _decides(self, unit: Unit) -> bool:
        return unit.group == 0 and not self._follows

    def _wrong_skips(self, unit: Unit, writer: UnitWriter) -> dict[str, str]:
        if self._decides(unit):
            readable = [] if self._last_pass else self._readable_now(unit, writer.skipped)
            return {key: f"{writer.skipped[key]}; it can be decoded now" for key in readable}
        first = self._ledger.skipped_images()
        if first is None:  # the first group is incomplete and may or may not contain these images
            return dict(writer.skipped)
        wrong = {key: reason for key, reason in writer.skipped.items() if key not in first}
        return wrong | dict.fromkeys(writer.keys & first.keys(), "skipped in view group 0")

    def _readable_now(self, unit: Unit, skipped: Mapping[str, str]) -> Iterator[str]:
        """The skipped images that can now be decoded."""
        assert not isinstance(self._source, PixelCache)
        order = self._source.order(unit.group)
        for position in unit.positions if skipped else []:
            index = int(order[position])
            key = self._source.samples[index].key
            if key in skipped:
                try:
                    decode_image(self._source.read(index), key)
                except UnreadableImage:
                    continue
                yield key


def make_units(
    stage: Stage,
    units: Sequence[Unit],
    claims: Iterator[int],
    workers: int,
    done: Callable[[Unit], None],
    skips: SkipPolicy | None = None,
    arrived: Callable[[int], None] = lambda views: None,
    others: Callable[[Unit], Sequence[Stage]] = lambda unit: (),
) -> None:
    """Make the claimed units. Each unit is committed while the next one is being made.

    Args:
        stage: the inputs shared by all units.
        units: all units in the cache.
        claims: numbers of the units claimed by this process. Each is claimed as late as possible.
        workers: number of processes that sample views.
        done: called after a unit is committed, when the next one has already been filled.
        skips: decides which images are skipped and which units are deferred (None: skip undecodable images).
        arrived: called with the number of views just passed to the teacher.
        others: returns additional stages that make the same unit from the same views. Their units are committed after
            the first stage's unit, and only if it was committed.
    """
    first = ImageFiles(stage.root, [(unit.group, unit.range_id) for unit in units if unit.group == 0])
    all_views = views_of_units(stage.source, stage.views, units, claims, workers, first)
    buffers = PixelBuffers(stage.device)
    with CommitQueue() as commits:
        for number, sampled in groupby(all_views, key=lambda item: item.unit):
            left_out = skips.required_skips(units[number]) if skips else {}
            sampled = _counted(sampled, partial(arrived, len(units[number].views)))
            filled = fill_unit([stage, *others(units[number])], units[number], sampled, left_out, buffers)
            if skips and not skips.accepts(units[number], filled[0].writer):
                abort_all(filled)
                continue
            commits.put(filled, partial(done, units[number]))


def _counted(sampled: Iterator[SampledViews], count: Callable[[], None]) -> Iterator[SampledViews]:
    for item in sampled:
        yield item
        count()


def fill_unit(
    stages: Sequence[Stage],
    unit: Unit,
    sampled: Iterator[SampledViews],
    left_out: Mapping[str, str] = NO_SKIPS,
    buffers: PixelBuffers | None = None,
) -> list[FilledUnit]:
    """Run a unit's views through the teachers and codecs. A background thread writes the records.

    Args:
        stages: the inputs for each teacher; they differ only in teacher, codecs and cache.
        unit: the unit.
        sampled: the unit's images with their views.
        left_out: keys of samples that are always skipped, with the reasons.
        buffers: pixel buffers reused across units (None: allocate new ones).

    Returns:
        For each stage, the writer, which the caller must commit, and the unit's fidelity. After an error, no files
        remain.
    """
    first, writers = stages[0], list[UnitWriter]()
    figures: list[dict[str, list[float]]] = [{} for _ in stages]
    buffers = buffers or PixelBuffers(first.device)
    try:
        for stage in stages:
            writers.append(_unit_writer(stage, unit))
        with BackgroundWriter("encode", QUEUED_BATCHES) as background:
            start = 0
            for batch, pixels in _batches(first, writers, sampled, left_out, buffers):
                rows = np.arange(start, start + len(batch))
                for column, number in enumerate(unit.views):
                    images = pixels[column].to(first.device, non_blocking=True)
                    there = stores_features(rows, number, first.features_every)
                    seeds = _seeds(batch, number, there, first.device)
                    views = list(zip(batch, [item.views[column] for item in batch], there.tolist(), strict=True))
                    for stage, writer, found in zip(stages, writers, figures, strict=True):
                        output = stage.teacher(images)
                        stored = _stored_features(output.features, there)
                        codecs = stage.codec, stage.logit_codec
                        encoded = encode_batch(*codecs, output, stored, seeds, stage.second_codec)
                        rest = (output._replace(features=stored), encoded, found)
                        background.submit(_append_batch, stage, writer, number, views, *rest)
                buffers.sent()
                start += len(batch)
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return [FilledUnit(writer, summarize(found)) for writer, found in zip(writers, figures, strict=True)]


def _unit_writer(stage: Stage, unit: Unit) -> UnitWriter:
    return UnitWriter(
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


def _batches(
    stage: Stage,
    writers: Sequence[UnitWriter],
    sampled: Iterator[SampledViews],
    left_out: Mapping[str, str],
    buffers: PixelBuffers,
) -> Iterator[tuple[list[SampledViews], Tensor]]:
    """Yield teacher batches: the images without pixels, and a uint8 tensor (V, B, 3, size, size) with their pixels.

    The tensor stays valid until two more batches have been taken. Each image is copied once, when it is received. This
    frees its shared memory and makes each view's pixels contiguous. The writers skip images that are left out or
    undecodable.
    """
    batch: list[SampledViews] = []
    pixels = NO_PIXELS
    for item in sampled:
        reason = left_out.get(item.sample.key, item.reason)
        if reason:
            for writer in writers:
                writer.skip(item.sample.key, reason)
            continue
        if not batch:
            views, *shape = item.pixels.shape
            pixels = buffers.take((views, stage.batch_size, *shape))
        pixels[:, len(batch)] = item.pixels
        batch.append(item._replace(pixels=NO_PIXELS))
        if len(batch) == stage.batch_size:
            yield batch, pixels
            batch = []
    if batch:
        yield batch, pixels[:, : len(batch)]


def _seeds(batch: Iterable[SampledViews], number: int, there: Iterable[bool], device: torch.device) -> Tensor:
    """(F,) int64 on the device: one view's dither seeds for the samples selected by `there`."""
    seeds = [dither_seed(item.sample.key, number) for item, is_there in zip(batch, there, strict=True) if is_there]
    return torch.tensor(seeds, dtype=torch.int64, pin_memory=page_locked(device)).to(device, non_blocking=True)


def _stored_features(features: Tensor, there: NDArray[np.bool_]) -> Tensor:
    """Select the batch's feature maps to store, (F, C, H, W)."""
    if there.all():
        return features
    places = torch.tensor(np.flatnonzero(there), pin_memory=page_locked(features.device))
    return features[places.to(features.device, non_blocking=True)]


@torch.no_grad()
def _append_batch(
    stage: Stage,
    writer: UnitWriter,
    number: int,
    views: Sequence[tuple[SampledViews, EncodedView, bool]],
    output: TeacherOutput,
    arriving: HostBatch,
    figures: dict[str, list[float]],
) -> None:
    """Append one view of a batch once its encoded rows are on the host, and add its fidelity to `figures`.

    Args:
        stage: the inputs shared by all units.
        writer: the unit's writer.
        number: view number.
        views: sample, encoded view, and whether its features are stored.
        output: the teacher's output, with the features (F, C, H, W) to store.
        arriving: the encoded batch.
        figures: fidelity values by metric.
    """
    arriving.arrived.synchronize()
    encoded, stored = arriving.encoded, output.features
    batch, _, there = zip(*views, strict=True)
    _check_finite(encoded.finite, batch, number)
    codes, similarity = encoded.codes, encoded.similarity
    if not encoded.final.all():  # rare: some rows must be re-encoded or cannot be stored
        codes = stage.codec.encode(stored, _seeds(batch, number, there, stored.device))
        similarity = torch.stack(compare(stage.codec, stored, codes)).cpu()
    for name, values in zip(Fidelity._fields, similarity, strict=True):
        figures.setdefault(name, []).extend(values.tolist())
    seconds = _pooled_rows(stage, output, arriving, figures)
    rows = iter(stage.codec.pack(codes.cpu().numpy()) if len(codes) else [])
    logits = stage.logit_codec.pack(encoded.logits.numpy())
    for (item, view, has_features), logit, second in zip(views, logits, seconds or [b""] * len(views), strict=True):
        record = Record(
            key=item.sample.key,
            label=item.sample.label,
            view=view.view,
            digest=view.digest,
            pixels=b"" if stage.shares_pixels else view.encoded,
            features=next(rows) if has_features else b"",
            logits=logit,
            second=second,
        )
        writer.append(number, record, "" if stage.shares_pixels else item.image)


def _pooled_rows(
    stage: Stage, output: TeacherOutput, arrived: HostBatch, figures: dict[str, list[float]]
) -> list[bytes]:
    """A batch's encoded pooled embeddings (empty if none are stored). Adds their fidelity to `figures`."""
    codec, pooled = stage.second_codec, arrived.pooled
    if codec is None or pooled is None:
        return []
    if not pooled.final.all():
        codec.require_storable(pooled_maps(output))
    figures.setdefault(POOLED_COSINE, []).extend(pooled.cosine.tolist())
    return codec.pack(pooled.codes.numpy())


def _check_finite(finite: Tensor, batch: Sequence[SampledViews], view: int) -> None:
    if not finite.all():
        bad = [item.sample.key for item, ok in zip(batch, finite.tolist(), strict=True) if not ok]
        raise UserError(
            "the teacher's output contains NaN or Inf",
            got=f"NaN or Inf for {counted(len(bad), 'image')}; the first is {bad[0]}",
            where=f"view {view}",
            fix="try --teacher.precision float32, or check the teacher's weights",
        )
