"""Stage 1: images and a teacher -> committed work units and a manifest.

In: a `CacheTeacherConfig`. Out: a complete cache. Invariant: a unit's bytes depend on its images, the view recipe, the
teacher and the codec, never on which rank made it; what is committed is never touched again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.fidelity import fidelity, summarise
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.config import ViewConfig
from scalekd_cache.errors import UserError
from scalekd_cache.images import SampleRef, Source, UnreadableImage, decode_image
from scalekd_cache.store import Record, UnitWriter
from scalekd_cache.teacher import Teacher
from scalekd_cache.views import apply_view, decode_pixels, encode_pixels, pixel_digest, sample_view


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
    """(3, size, size) uint8: what the teacher sees; decoded from `encoded` when pixels are baked."""
    encoded: bytes
    """JPEG or PNG bytes; empty when pixels are replayed."""
    view: str
    """The view record, JSON."""
    digest: str
    """Digest of the pixels."""


class Drawn(NamedTuple):
    """All views of a unit's group of one image; `reason` says why there are none."""

    unit: int
    sample: SampleRef
    views: list[DrawnView]
    reason: str


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
            json.dumps(view.to_json(), separators=(",", ":")),
            pixel_digest(pixels),
        )


def plan_units(source: Source, groups: Sequence[Sequence[int]], samples_per_shard: int) -> list[Unit]:
    """All work units of a cache, in the order they are handed out."""
    ranges = source.ranges(samples_per_shard)
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
    source: Source
    views: ViewConfig
    teacher: Teacher
    codec: FeatureCodec
    logit_codec: LogitCodec
    batch_size: int
    device: torch.device
    versions: dict[str, str]
    """Library versions, kept in every unit."""


def make_units(
    stage: Stage, units: Sequence[Unit], claims: Iterator[int], workers: int, done: Callable[[Unit], None]
) -> None:
    """Make the claimed units and commit each.

    Args:
        stage: what units are made with.
        units: all units of the cache.
        claims: numbers of the units that this process shall make; asked for one at a time, as late as possible.
        workers: processes that draw views.
        done: called after a unit is committed.
    """
    dataset = Drawing(stage.source, stage.views, units)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Places(stage.source, units, claims),
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=32 if workers else None,
        worker_init_fn=_one_thread,
    )
    for number, drawn in groupby(loader, key=lambda item: item.unit):
        make_unit(stage, units[number], drawn)
        done(units[number])


def make_unit(stage: Stage, unit: Unit, drawn: Iterator[Drawn]) -> bool:
    """Run one unit through the teacher and the codecs into the store.

    Returns:
        False when another process committed the same unit first.
    """
    figures: dict[str, list[float]] = {}
    with UnitWriter(
        stage.root,
        backend=stage.backend,
        group=unit.group,
        range_id=unit.range_id,
        start=unit.positions.start,
        stop=unit.positions.stop,
        views=unit.views,
        fingerprint=stage.fingerprint,
        versions=stage.versions,
    ) as writer:
        batch: list[Drawn] = []
        for item in drawn:
            if item.reason:
                writer.skip(item.sample.key, item.reason)
                continue
            batch.append(item)
            if len(batch) == stage.batch_size:
                _append_batch(stage, unit, writer, batch, figures)
                batch = []
        if batch:
            _append_batch(stage, unit, writer, batch, figures)
        return writer.commit(summarise(figures))


def _append_batch(
    stage: Stage, unit: Unit, writer: UnitWriter, batch: Sequence[Drawn], figures: dict[str, list[float]]
) -> None:
    """One teacher batch a view number: features and logits of the same images; `figures` gathers fidelity a view."""
    for column, number in enumerate(unit.views):
        drawn = [item.views[column] for item in batch]
        output = stage.teacher(torch.stack([view.pixels for view in drawn]).to(stage.device))
        _check_finite(output.features, output.logits, batch, number)
        codes = stage.codec.encode(output.features)
        close = fidelity(output.features, stage.codec.decode(codes).features)
        for name, values in zip(close._fields, close, strict=True):
            figures.setdefault(name, []).extend(values.tolist())
        logits = stage.logit_codec.encode(output.logits)
        for item, view, code, logit in zip(batch, drawn, codes.cpu().numpy(), logits, strict=True):
            record = Record(
                key=item.sample.key,
                label=item.sample.label,
                view=view.view,
                digest=view.digest,
                pixels=view.encoded,
                features=code.tobytes(),
                logits=logit,
            )
            writer.append(number, record)


def _check_finite(features: Tensor, logits: Tensor, batch: Sequence[Drawn], view: int) -> None:
    finite = features.flatten(1).isfinite().all(1) & logits.isfinite().all(1)
    if not bool(finite.all()):
        bad = [item.sample.key for item, ok in zip(batch, finite.tolist(), strict=True) if not ok]
        raise UserError(
            "the teacher's output is not finite",
            got=f"NaN or infinity for {len(bad)} images, the first is {bad[0]}",
            where=f"view {view}",
            fix="try --teacher.precision float32, or check the teacher's weights",
        )


class _Places:
    """A sampler of (unit number, image index) that claims a unit when it is needed, not before."""

    def __init__(self, source: Source, units: Sequence[Unit], claims: Iterator[int]) -> None:
        self._source = source
        self._units = units
        self._claims = claims

    def __iter__(self) -> Iterator[tuple[int, int]]:
        orders: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = {}
        for number in self._claims:
            unit = self._units[number]
            if unit.group not in orders:
                orders = {unit.group: self._source.order(unit.group)}
            for position in unit.positions:
                yield number, int(orders[unit.group][position])


def _as_it_is(item: Any) -> Any:
    return item


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
