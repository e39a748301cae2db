"""Reads a sample of a cache's views and looks for outliers.

In: a finished cache, and view positions. Out: `ViewInfo`s with labels and stored predictions, and one vector per
feature map.
Invariant: unreadable records are reported by name. Only one batch and all vectors are kept in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from scalekd_cache.audit.describe import describe_view_record, top_logits
from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.data.base import key_text
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.loader.record_pixels import decode_features, record_view
from scalekd_cache.store.base import NO_LABEL, Record
from scalekd_cache.store.reader import Cache

BATCH = 32
POOLED = 2
"""Side length of the grid over which feature maps are averaged for comparison."""
PALETTE_VIEWS = 24


class ClassProbability(NamedTuple):
    """A class predicted by the teacher for a view."""

    name: str
    percent: float


@dataclass(frozen=True, kw_only=True)
class ViewInfo:
    """Information about a view."""

    key: str
    view: int
    position: int
    label: int
    label_name: str
    """Label name; empty for an image without a label."""
    top_classes: list[ClassProbability]
    """The classes with the largest logits; empty for a teacher without a classifier."""
    predicted: int | None
    """The class with the largest logit."""
    words: str
    """The view record as text."""
    digest: str

    @property
    def place(self) -> tuple[int, int]:
        """(view, position)"""
        return self.view, self.position

    @property
    def disagrees(self) -> bool:
        """Whether the teacher predicts a class other than the label."""
        return self.predicted is not None and self.predicted != self.label


class ViewSample(NamedTuple):
    """A sample of views."""

    views: list[ViewInfo]
    vectors: NDArray[np.float32]
    """Unit vectors (N, D) that represent the maps."""
    unreadable: list[str]
    """Unreadable records, with the reasons."""


def read_sample(cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]]) -> ViewSample:
    """Read and decode these views."""
    views, vectors, unreadable = list[ViewInfo](), list[torch.Tensor](), list[str]()
    for start in range(0, len(places), BATCH):
        batch = []
        for view, position in places[start : start + BATCH]:
            record, what = read_one(cache, checker, view, position)
            if record is None:
                unreadable.append(what)
            else:
                batch.append(((view, position), record))
        if not batch:
            continue
        features = decode_features(checker.codec, [record for _, record in batch]).features
        logits = checker.logits([record for _, record in batch], features)
        views += [
            _view_info(record, place, row, cache.manifest.facts.class_names)
            for (place, record), row in zip(batch, logits, strict=True)
        ]
        vectors.append(F.adaptive_avg_pool2d(features, POOLED).flatten(1))
    if not vectors:
        return ViewSample([], np.zeros((0, 1), np.float32), unreadable)
    joined = torch.cat(vectors)
    unit: NDArray[np.float32] = F.normalize(joined - joined.mean(0), dim=1).numpy()
    return ViewSample(views, unit, unreadable)


def read_one(cache: Cache, checker: RecordChecker, view: int, position: int) -> tuple[Record | None, str]:
    """The record if it can be decoded; otherwise None and the reason."""
    try:
        record = cache.read([position], view)[0]
        record_view(record)
    except UserError as error:
        return None, f"view {view}, position {position}: {str(error).splitlines()[0]}"
    return (record, "") if checker.usable(record) else (None, f"view {view}, {key_text(record.key)}: cannot decode it")


def _view_info(record: Record, place: tuple[int, int], logits: NDArray[np.float32], names: Sequence[str]) -> ViewInfo:
    known = 0 <= record.label < len(names)
    top = top_logits(logits, names)
    top_classes = [ClassProbability(row["class"] or f"class {row['index']}", 100 * row["probability"]) for row in top]
    return ViewInfo(
        key=key_text(record.key),
        view=place[0],
        position=place[1],
        label=record.label,
        label_name="" if record.label == NO_LABEL else names[record.label] if known else f"class {record.label}",
        top_classes=top_classes,
        predicted=top[0]["index"] if top and len(logits) == len(names) else None,
        words=describe_view_record(record_view(record)),
        digest=record.digest,
    )


def pixels_of_view(checker: RecordChecker, record: Record, place: tuple[int, int]) -> NDArray[np.uint8] | None:
    """A view's pixels; None if they are unavailable or damaged."""
    try:
        return checker.picture(record, *place)
    except (UserError, UnreadableImage):
        return None


class Pair(NamedTuple):
    """Two views with similar feature maps."""

    first: int
    second: int
    """Both fields are indices into `ViewSample.views`."""
    cosine: float
    same_pixels: bool


def closest_pairs(sample: ViewSample, count: int) -> list[Pair]:
    """The `count` most similar pairs, most similar first. Each view occurs in at most one pair."""
    if len(sample.views) < 2:
        return []
    cosine = sample.vectors @ sample.vectors.T
    rows, columns = np.triu_indices(len(cosine), 1)
    order = np.argsort(-cosine[rows, columns], kind="stable")[: 20 * count]
    used, pairs = set[int](), list[Pair]()
    for first, second in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if len(pairs) < count and not used & {first, second}:
            used |= {first, second}
            same = sample.views[first].digest == sample.views[second].digest
            pairs.append(Pair(first, second, float(cosine[first, second]), same))
    return pairs
