"""Views as cards: pixels, the stored map as colors, the teacher's own map beside it where it was asked.

In: an open cache, views. Out: `Card`s for the page, all in the same colors.
Invariant: what the teacher is shown is what the cache holds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.loader.pixels import decode_features
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.reports.colors import Palette, fit_palette, overlay, paint
from scalekd_cache.reports.page import SIDE, Picture, picture
from scalekd_cache.reports.views import BATCH, Look, pixels_of_view, read_one, scan
from scalekd_cache.store.base import Record
from scalekd_cache.store.reader import Cache


class Card(NamedTuple):
    """A view, as the page shows it."""

    look: Look
    pixels: Picture | None
    stored: Picture
    """The decoded map as colors over the pixels."""
    fresh: Picture | None
    """The teacher's own map, in the same colors."""
    note: str
    """Why it is here, or how close the two maps are."""


class TeacherOutputs(NamedTuple):
    """What the teacher says when it sees views again."""

    cosines: dict[tuple[int, int], float]
    """Mean-removed cosine of fresh and stored maps, by (view, position)."""
    maps: dict[tuple[int, int], Tensor]
    """Fresh maps (C, H, W) of the views that were asked to be kept."""


def ask(
    cache: Cache,
    checker: RecordChecker,
    teacher: Teacher,
    places: Sequence[tuple[int, int]],
    keep: set[tuple[int, int]],
) -> TeacherOutputs:
    """Show views to the teacher again; views without pixels here are left out."""
    outputs = TeacherOutputs({}, {})
    wanted = sorted(set(places))
    for start in range(0, len(wanted), BATCH):
        batch: list[tuple[tuple[int, int], Record, NDArray[np.uint8]]] = []
        for place in wanted[start : start + BATCH]:
            record, _ = read_one(cache, checker, *place)
            pixels = None if record is None else pixels_of_view(checker, record, place)
            if record is not None and pixels is not None:
                batch.append((place, record, pixels))
        if not batch:
            continue
        images = torch.from_numpy(np.stack([pixels for *_, pixels in batch])).permute(0, 3, 1, 2).contiguous()
        fresh = teacher(images).features.cpu()
        stored = decode_features(checker.codec, [record for _, record, _ in batch]).features
        close = fidelity(fresh, stored).cosine_mean_removed.tolist()
        for (place, *_), cosine, features in zip(batch, close, fresh, strict=True):
            outputs.cosines[place] = cosine
            if place in keep:
                outputs.maps[place] = features
    return outputs


class Gallery:
    """Makes cards; all of a report in the same colors."""

    def __init__(
        self, cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]], outputs: TeacherOutputs
    ) -> None:
        self.cache, self.checker, self.outputs = cache, checker, outputs
        self.looks = load_views(cache, checker, places)
        maps = [self._map(look) for look in self.looks]
        self.palette: Palette | None = fit_palette(torch.stack(maps)) if maps else None

    def _record(self, look: Look) -> Record:
        return self.cache.read([look.position], look.view)[0]

    def _map(self, look: Look) -> Tensor:
        return decode_features(self.checker.codec, [self._record(look)]).features[0]

    def cards(self, looks: Sequence[tuple[Look, str]]) -> list[Card]:
        """A card for each view, with its note."""
        return [self._card(look, note) for look, note in looks] if self.palette is not None else []

    def _card(self, look: Look, note: str) -> Card:
        assert self.palette is not None
        pixels = pixels_of_view(self.checker, self._record(look), look.place)
        what = f"{look.key}, view {look.view}"
        fresh = self.outputs.maps.get(look.place)
        return Card(
            look,
            None if pixels is None else picture(pixels, f"The view {what}, labeled {look.label_name}: {look.words}"),
            self._painted(self._map(look), pixels, f"The stored feature map of {what} as colors over its picture"),
            None if fresh is None else self._painted(fresh, pixels, f"The teacher's own feature map of {what}"),
            note,
        )

    def _painted(self, features: Tensor, pixels: NDArray[np.uint8] | None, alt: str) -> Picture:
        assert self.palette is not None
        return picture(overlay(pixels, paint(self.palette, features), SIDE), alt)


def load_views(cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]]) -> list[Look]:
    """The looks of these views that can be read."""
    return scan(cache, checker, places).looks
