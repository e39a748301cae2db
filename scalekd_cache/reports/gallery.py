"""Makes cards for views, with pixels, the stored feature map as colors and, if the teacher was run, the live map.

In: an open cache, and views. Out: `Card`s for the page, all with the same palette.
Invariant: the teacher runs on the cached pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.audit.rerun_teacher import Place, rerun_teacher
from scalekd_cache.loader.record_pixels import decode_features
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.reports.colors import Palette, fit_palette, overlay, paint
from scalekd_cache.reports.page import SIDE, Picture, picture
from scalekd_cache.reports.views import ViewInfo, pixels_of_view, read_sample
from scalekd_cache.store.base import Record
from scalekd_cache.store.reader import Cache


class Card(NamedTuple):
    """A view on the page."""

    info: ViewInfo
    pixels: Picture | None
    stored: Picture
    """The decoded map as colors over the pixels."""
    fresh: Picture | None
    """The live map in the same colors."""
    note: str
    """The cosine between the two maps; empty without a live map."""


class TeacherOutputs(NamedTuple):
    """Results of re-running the teacher on views."""

    cosines: dict[Place, float]
    """Mean-removed cosine between live and stored maps, keyed by (view, position)."""
    maps: dict[Place, Tensor]
    """Live maps (C, H, W) for the views in the gallery."""


def rerun_on_views(
    cache: Cache, checker: RecordChecker, teacher: Teacher, places: Sequence[Place], keep: set[Place]
) -> TeacherOutputs:
    """Re-run the teacher on views, keeping the live maps for the views in `keep`. Views without pixels are skipped."""
    outputs = TeacherOutputs({}, {})
    for batch in rerun_teacher(cache, teacher, checker, sorted(set(places))):
        cosines = batch.close.cosine_mean_removed.tolist()
        for place, cosine, features in zip(batch.places, cosines, batch.output.features, strict=True):
            outputs.cosines[place] = cosine
            if place in keep:
                outputs.maps[place] = features
    return outputs


class Gallery:
    """Makes all cards in a report with the same palette."""

    def __init__(
        self, cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]], outputs: TeacherOutputs
    ) -> None:
        self.cache, self.checker, self.outputs = cache, checker, outputs
        self.views = load_views(cache, checker, places)
        maps = [self._map(info) for info in self.views]
        self.palette: Palette | None = fit_palette(torch.stack(maps)) if maps else None

    def _record(self, info: ViewInfo) -> Record:
        return self.cache.read([info.position], info.view)[0]

    def _map(self, info: ViewInfo) -> Tensor:
        return decode_features(self.checker.codec, [self._record(info)]).features[0]

    def cards(self, views: Sequence[tuple[ViewInfo, str]]) -> list[Card]:
        """One card per view, with its note."""
        return [self._card(info, note) for info, note in views] if self.palette is not None else []

    def _card(self, info: ViewInfo, note: str) -> Card:
        assert self.palette is not None
        pixels = pixels_of_view(self.checker, self._record(info), info.place)
        what = f"{info.key}, view {info.view}"
        labeled = f", labeled {info.label_name}" if info.label_name else ""
        fresh = self.outputs.maps.get(info.place)
        return Card(
            info,
            None if pixels is None else picture(pixels, f"The view {what}{labeled}: {info.words}"),
            self._painted(self._map(info), pixels, f"Stored feature map of {what} as colors over its pixels"),
            None if fresh is None else self._painted(fresh, pixels, f"Live feature map of {what}"),
            note,
        )

    def _painted(self, features: Tensor, pixels: NDArray[np.uint8] | None, alt: str) -> Picture:
        assert self.palette is not None
        return picture(overlay(pixels, paint(self.palette, features), SIDE), alt)


def load_views(cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]]) -> list[ViewInfo]:
    """The readable views at these positions."""
    return read_sample(cache, checker, places).views
