"""The views of a work unit, ready for the teacher: drawn from images, or taken from a cache that has them.

In: a data set or a `PixelCache`, work units. Out: `Drawn` items, unit by unit, by worker processes when there are some.
Invariant: what the teacher is shown is what the student will be shown: decoded from the stored bytes when pixels are
baked, whichever cache stores them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scalekd_cache.config import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.images import SampleRef, Source, UnreadableImage, decode_image
from scalekd_cache.pixel_cache import PixelCache
from scalekd_cache.store import Record
from scalekd_cache.store.files import canonical_json
from scalekd_cache.stored_pixels import decode_pixels, encode_pixels, pixel_digest
from scalekd_cache.views import apply_view, sample_view

SPAN = 32
"""Records of a pixel cache that are read in one call."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work: some images, some view numbers."""

    group: int
    """Number of the view group."""
    range_id: int
    """Number of the range of images."""
    positions: range
    """Positions of the images in the group's canonical order."""
    views: tuple[int, ...]
    """View numbers of the group."""


class DrawnView(NamedTuple):
    """One view of one image, ready for the teacher and for the store."""

    pixels: Tensor
    """(3, size, size) uint8: what the teacher sees; decoded from stored bytes when pixels are baked."""
    encoded: bytes
    """JPEG or PNG bytes to store; empty when pixels are replayed, or shared with another cache."""
    view: str
    """The view record, canonical JSON."""
    digest: str
    """Digest of the pixels."""


class Drawn(NamedTuple):
    """All views of a unit's group of one image; `reason` says why there are none."""

    unit: int
    sample: SampleRef
    views: list[DrawnView]
    reason: str


def draw_units(
    source: Source | PixelCache, config: ViewConfig, units: Sequence[Unit], claims: Iterator[int], workers: int
) -> Iterator[Drawn]:
    """The images of the claimed units with their views, in order; a unit is claimed when it is needed, not before."""
    dataset: Dataset[Any]
    places: Iterator[Any]
    if isinstance(source, PixelCache):
        dataset, places = SharedViews(source, config, units), _spans(source, units, claims)
    else:
        dataset, places = Drawing(source, config, units), _places(source, units, claims)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Sampler(places),
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=(2 if isinstance(source, PixelCache) else SPAN) if workers else None,
        worker_init_fn=_one_thread,
    )
    for item in loader:
        if isinstance(item, Drawn):
            yield item
        else:
            yield from item


class Drawing(Dataset[Drawn]):
    """Draws the views of one image: what a stage-1 worker process does."""

    def __init__(self, source: Source, config: ViewConfig, units: Sequence[Unit]) -> None:
        self.source = source
        self.config = config
        self.units = units

    def __getitem__(self, place: tuple[int, int]) -> Drawn:
        number, index = place
        sample = self.source.samples[index]
        try:
            image = decode_image(self.source.read(index), sample.key)
        except UnreadableImage as error:
            return Drawn(number, sample, [], error.reason)
        views = [self._draw(image, sample.key, view) for view in self.units[number].views]
        return Drawn(number, sample, views, "")

    def _draw(self, image: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", key: str, number: int) -> DrawnView:
        view = sample_view(self.config, key, number, image.shape[1], image.shape[0])
        pixels = apply_view(view, image, self.config)
        encoded = b""
        if self.config.pixels == "baked":
            encoded = encode_pixels(pixels, self.config)
            pixels = decode_pixels(encoded, self.config.size)
        return DrawnView(
            torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            encoded,
            canonical_json(view.to_json()),
            pixel_digest(pixels),
        )


class SharedViews(Dataset[list[Drawn]]):
    """Takes the views of some neighbouring images from another cache; neither images nor augmentation are needed."""

    def __init__(self, pixels: PixelCache, config: ViewConfig, units: Sequence[Unit]) -> None:
        self.pixels = pixels
        self.config = config
        self.units = units

    def __getitem__(self, place: tuple[int, range]) -> list[Drawn]:
        number, positions = place
        unit = self.units[number]
        rows = zip(*(self.pixels.cache.read(positions, view) for view in unit.views), strict=True)
        return [
            Drawn(number, SampleRef(records[0].key, records[0].label), [self._view(record) for record in records], "")
            for records in rows
        ] + self._skipped(number, positions)

    def _view(self, record: Record) -> DrawnView:
        pixels = decode_pixels(record.pixels, self.config.size)
        if pixel_digest(pixels) != record.digest:
            raise UserError(
                "stored pixels decode to other values here than where they were made",
                got=f"digest {pixel_digest(pixels)}",
                expected=f"digest {record.digest}",
                where=f"{record.key} in {self.pixels.cache.root}",
                fix="use the Pillow of that cache: " + self.pixels.cache.manifest.versions.get("pillow", "unknown"),
            )
        return DrawnView(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), b"", record.view, record.digest)

    def _skipped(self, number: int, positions: range) -> list[Drawn]:
        """What the other cache skipped in this unit is skipped here; said with the unit's first images."""
        unit = self.units[number]
        if positions.start != self.pixels.records(unit.views[0], unit.range_id).start:
            return []
        skipped = self.pixels.skipped(unit.views[0], unit.range_id)
        return [Drawn(number, SampleRef(row["key"], -1), [], row["reason"]) for row in skipped]


def _places(source: Source, units: Sequence[Unit], claims: Iterator[int]) -> Iterator[tuple[int, int]]:
    """(unit number, image index) of every image of the claimed units."""
    orders: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
    for number in claims:
        unit = units[number]
        if unit.group not in orders:
            orders = {unit.group: source.order(unit.group)}
        for position in unit.positions:
            yield number, int(orders[unit.group][position])


def _spans(pixels: PixelCache, units: Sequence[Unit], claims: Iterator[int]) -> Iterator[tuple[int, range]]:
    """(unit number, positions in the pixel cache) of the claimed units, some neighbours at a time."""
    for number in claims:
        records = pixels.records(units[number].views[0], units[number].range_id)
        for start in range(records.start, max(records.stop, records.start + 1), SPAN):
            yield number, range(start, min(start + SPAN, records.stop))


class _Sampler:
    """A sampler over places that are made as they are needed."""

    def __init__(self, places: Iterator[Any]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[Any]:
        return self._places


def _as_it_is(item: Any) -> Any:
    return item


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
