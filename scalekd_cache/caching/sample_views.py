"""Provides the views in a work unit to the teacher, sampled from images or read from another cache.

In: a dataset or a `PixelCache`, and work units. Out: `SampledViews`, unit by unit, optionally from worker processes.
Invariant: teacher and student see the same pixels. If pixels are baked, both are decoded from the stored bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import SampleRef, Source, sample_indices
from scalekd_cache.data.images import UnreadableImage, decode_image, image_digest
from scalekd_cache.data.workers import bytes_per_worker, load_items, prefetch_count
from scalekd_cache.errors import UserError
from scalekd_cache.loader.record_pixels import wrong_digest
from scalekd_cache.store.base import Record
from scalekd_cache.store.durable_files import canonical_json
from scalekd_cache.store.image_digests import ImageFiles
from scalekd_cache.views.pixels import Pixels, decode_pixels, encode_pixels, pixel_digest
from scalekd_cache.views.view import apply_view, sample_view

SPAN = 32
"""Prefetch limit per worker, in images; also the number of pixel cache records read per call."""
IMAGES_PER_ITEM = 8
"""Number of images that a worker sends at once, because each message costs the main process about a millisecond."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A work unit: one range of images and one group of views."""

    group: int
    """View group number."""
    range_id: int
    """Image range number."""
    positions: range
    """Image positions in the group's canonical order."""
    views: tuple[int, ...]
    """View numbers in the group."""

    @property
    def num_views(self) -> int:
        """Total number of views of all images in the unit."""
        return len(self.positions) * len(self.views)


class EncodedView(NamedTuple):
    """One view of one image, ready for the store."""

    encoded: bytes
    """The JPEG, WebP or PNG bytes to store; empty if pixels are replayed or stored in another cache."""
    view: str
    """The view record as canonical JSON."""
    digest: str
    """Pixel digest."""


class SampledViews(NamedTuple):
    """All views of one image in a unit. A skipped image has no views, and `reason` is set."""

    unit: int
    sample: SampleRef
    image: str
    """Image file digest; empty if the views come from another cache."""
    pixels: Tensor
    """(V, 3, size, size) uint8: the teacher's input, decoded from the stored bytes if pixels are baked. A tensor from a
    worker is in shared memory, so copy it and keep no reference to it."""
    views: list[EncodedView]
    reason: str


def views_of_units(
    source: Source | PixelCache,
    config: ViewConfig,
    units: Sequence[Unit],
    claims: Iterator[int],
    workers: int,
    first: ImageFiles | None = None,
) -> Iterator[SampledViews]:
    """The views of all images in the claimed units, in order. Units are claimed only when needed.

    Args:
        source: the images, or another cache's views of them.
        config: the view recipe.
        units: all units.
        claims: numbers of the units to sample.
        workers: number of processes that sample views.
        first: image digests from the first view group, which later groups must match.

    Raises:
        UserError: an image file has changed, or shared memory is too small for the workers.
    """
    dataset: Dataset[Any]
    places: Iterator[Any]
    one = _image_bytes(units, config)
    span = max(1, min(SPAN, bytes_per_worker(workers) // (2 * one)))
    if isinstance(source, PixelCache):
        waiting = 2
        dataset, places = SharedViewDataset(source, config, units), _spans(source, units, claims, span)
    else:
        span = min(span, IMAGES_PER_ITEM)
        waiting = SPAN // span
        dataset, places = ViewDataset(source, config, units, first), _places(source, units, claims, span)
    for items in load_items(dataset, places, workers=workers, item_bytes=span * one, max_prefetch=waiting, borrow=True):
        yield from items


def spread_views(
    source: Source | PixelCache, config: ViewConfig, views: tuple[int, ...], count: int
) -> Iterator[SampledViews]:
    """Views of `count` images evenly spaced over the dataset, as stage 1 stores them. Other images replace unreadable
    ones.

    Args:
        source: the images, or another cache's views of them.
        config: the view recipe.
        views: view numbers.
        count: number of images; fewer are returned if the dataset is smaller or images are unreadable.

    Raises:
        UserError: none of the images can be decoded.
    """
    unit = Unit(group=0, range_id=0, positions=range(1), views=views)
    items: Iterator[SampledViews]
    if isinstance(source, PixelCache):
        shared = SharedViewDataset(source, config, [unit])
        items = (shared[0, range(at, at + 1)][0] for at in _with_spares(len(source.cache), count))
    else:
        dataset, order = ViewDataset(source, config, [unit]), source.order(0)
        items = (dataset[0, [int(order[at])]][0] for at in _with_spares(len(order), count))
    found, reason = 0, ""
    for item in items:
        if item.reason:
            reason = f"{item.sample.key}: {item.reason}"
            continue
        yield item
        found += 1
        if found == count:
            return
    if not found:
        where = source.cache.root if isinstance(source, PixelCache) else source.name
        raise UserError(
            "none of the images sampled from the dataset could be decoded",
            got=reason,
            where=where,
            fix="check the dataset's image files",
        )


def _with_spares(total: int, count: int) -> Iterator[int]:
    """`count` evenly spaced indices, then all others."""
    chosen = dict.fromkeys(sample_indices(total, count))
    yield from chosen
    yield from (index for index in range(total) if index not in chosen)


def check_worker_memory(units: Sequence[Unit], config: ViewConfig, workers: int) -> None:
    """Raise `UserError` if shared memory is too small for the workers' views."""
    prefetch_count(workers, _image_bytes(units, config), SPAN)


def _image_bytes(units: Sequence[Unit], config: ViewConfig) -> int:
    """Pixel bytes for one image's views in the largest group."""
    return max((len(unit.views) for unit in units), default=1) * 3 * config.size**2


class ViewDataset(Dataset[list[SampledViews]]):
    """Samples the views of a few images in a stage-1 worker process."""

    def __init__(
        self, source: Source, config: ViewConfig, units: Sequence[Unit], first: ImageFiles | None = None
    ) -> None:
        self.source = source
        self.config = config
        self.units = units
        self.first = first

    def __getitem__(self, place: tuple[int, Sequence[int]]) -> list[SampledViews]:
        number, indices = place
        return [self._image(number, index) for index in indices]

    def _image(self, number: int, index: int) -> SampledViews:
        sample = self.source.samples[index]
        data = self.source.read(index)
        try:
            image = decode_image(data, sample.key)
        except UnreadableImage as error:
            return _skipped(number, sample, error.reason)
        digest = image_digest(data)
        if self.first is not None and self.units[number].group > 0:
            self.first.check(sample.key, digest)
        views = [self._sample(image, sample.key, view) for view in self.units[number].views]
        return _sampled(number, sample, digest, views)

    def _sample(self, image: Pixels, key: str, number: int) -> tuple[Pixels, EncodedView]:
        view = sample_view(self.config, key, number, image.shape[1], image.shape[0])
        pixels = apply_view(view, image, self.config)
        encoded = b""
        if self.config.pixels == "baked":
            encoded = encode_pixels(pixels, self.config)
            pixels = decode_pixels(encoded, self.config.size)
        return pixels, EncodedView(encoded, canonical_json(view.to_json()), pixel_digest(pixels))


class SharedViewDataset(Dataset[list[SampledViews]]):
    """Reads the views of neighboring images from another cache, without opening or augmenting images."""

    def __init__(self, pixels: PixelCache, config: ViewConfig, units: Sequence[Unit]) -> None:
        self.pixels = pixels
        self.config = config
        self.units = units

    def __getitem__(self, place: tuple[int, range]) -> list[SampledViews]:
        number, positions = place
        unit = self.units[number]
        rows = zip(*(self.pixels.cache.read(positions, view) for view in unit.views), strict=True)
        return [
            _sampled(
                number, SampleRef(records[0].key, records[0].label), "", [self._view(record) for record in records]
            )
            for records in rows
        ] + self._skipped(number, positions)

    def _view(self, record: Record) -> tuple[Pixels, EncodedView]:
        pixels = decode_pixels(record.pixels, self.config.size)
        wrong = wrong_digest(record, pixels)
        if wrong is not None:
            raise UserError(
                "stored pixels no longer decode to the values they had when the cache was made",
                got=f"digest {wrong}",
                expected=f"digest {record.digest}",
                where=f"{record.key} in {self.pixels.cache.root}",
                fix="install the Pillow version that the cache was made with: "
                + self.pixels.cache.manifest.facts.versions.get("pillow", "unknown"),
            )
        return pixels, EncodedView(b"", record.view, record.digest)

    def _skipped(self, number: int, positions: range) -> list[SampledViews]:
        """Images that the other cache skipped in this unit, returned with the unit's first images."""
        unit = self.units[number]
        if positions.start != self.pixels.records(unit.views[0], unit.range_id).start:
            return []
        skipped = self.pixels.skipped(unit.views[0], unit.range_id)
        return [_skipped(number, SampleRef(row["key"], -1), row["reason"]) for row in skipped]


def _sampled(number: int, sample: SampleRef, image: str, views: Sequence[tuple[Pixels, EncodedView]]) -> SampledViews:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in views])).permute(0, 3, 1, 2).contiguous()
    return SampledViews(number, sample, image, pixels, [view for _, view in views], "")


def _skipped(number: int, sample: SampleRef, reason: str) -> SampledViews:
    return SampledViews(number, sample, "", torch.empty(0, dtype=torch.uint8), [], reason)


def _places(source: Source, units: Sequence[Unit], claims: Iterator[int], span: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (unit number, image indices) for the claimed units, a few images at a time."""
    orders: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    for number in claims:
        unit = units[number]
        if unit.group not in orders:
            orders = {unit.group: source.order(unit.group)}
        for start in range(unit.positions.start, unit.positions.stop, span):
            yield number, orders[unit.group][start : min(start + span, unit.positions.stop)].tolist()


def _spans(pixels: PixelCache, units: Sequence[Unit], claims: Iterator[int], span: int) -> Iterator[tuple[int, range]]:
    """Yield (unit number, pixel cache positions) for the claimed units, a few adjacent positions at a time."""
    for number in claims:
        records = pixels.records(units[number].views[0], units[number].range_id)
        for start in range(records.start, max(records.stop, records.start + 1), span):
            yield number, range(start, min(start + span, records.stop))
