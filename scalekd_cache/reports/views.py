"""Some views of a cache, looked at closely: what a report shows and what it searches for outliers.

In: a finished cache. Out: `Look`s: record, pixels, the teacher's stored answer, a small vector to compare maps by.
Invariant: a seed chooses the views; a record that cannot be read is named, not left out in silence; memory is that of
one batch and of the vectors.
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
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.loader.pixels import decode_features, record_view
from scalekd_cache.store.base import Record
from scalekd_cache.store.reader import Cache

BATCH = 32
POOLED = 2
"""Maps are compared by their means over a grid of this side."""
PALETTE_VIEWS = 24


class Answer(NamedTuple):
    """One of the classes that the teacher gives a view."""

    name: str
    percent: float


@dataclass(frozen=True, kw_only=True)
class Look:
    """One view."""

    key: str
    view: int
    position: int
    label: int
    label_name: str
    answers: list[Answer]
    """The largest logits; empty for a teacher without a classifier."""
    answered: int | None
    """Class of the largest logit."""
    words: str
    """The augmentation in words."""
    digest: str

    @property
    def place(self) -> tuple[int, int]:
        """(view, position)"""
        return self.view, self.position

    @property
    def disagrees(self) -> bool:
        """Whether the teacher says something else than the label."""
        return self.answered is not None and self.answered != self.label


class Scan(NamedTuple):
    """Many views."""

    looks: list[Look]
    vectors: NDArray[np.float32]
    """(N, D) unit vectors of their maps."""
    unreadable: list[str]
    """What cannot be read, in words."""


def choose(cache: Cache, count: int, seed: int) -> list[tuple[int, int]]:
    """(view, position) of at most `count` views, drawn without repeats and in reading order."""
    total = len(cache) * cache.manifest.num_views
    chosen = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False)
    return [divmod(int(place), len(cache)) for place in np.sort(chosen)]


def scan(cache: Cache, checker: RecordChecker, places: Sequence[tuple[int, int]]) -> Scan:
    """Look at these views."""
    looks, vectors, unreadable = list[Look](), list[torch.Tensor](), list[str]()
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
        looks += [
            _look(record, place, row, cache.manifest.class_names)
            for (place, record), row in zip(batch, logits, strict=True)
        ]
        vectors.append(F.adaptive_avg_pool2d(features, POOLED).flatten(1))
    if not vectors:
        return Scan([], np.zeros((0, 1), np.float32), unreadable)
    joined = torch.cat(vectors)
    unit: NDArray[np.float32] = F.normalize(joined - joined.mean(0), dim=1).numpy()
    return Scan(looks, unit, unreadable)


def read_one(cache: Cache, checker: RecordChecker, view: int, position: int) -> tuple[Record | None, str]:
    """A record that can be decoded, or why there is none."""
    try:
        record = cache.read([position], view)[0]
        record_view(record)
    except UserError as error:
        return None, f"view {view}, position {position}: {str(error).splitlines()[0]}"
    return (record, "") if checker.usable(record) else (None, f"view {view}, {record.key}: it cannot be decoded")


def _look(record: Record, place: tuple[int, int], logits: NDArray[np.float32], names: Sequence[str]) -> Look:
    known = 0 <= record.label < len(names)
    top = top_logits(logits, names)
    answers = [Answer(row["class"] or f"class {row['index']}", 100 * row["probability"]) for row in top]
    return Look(
        key=record.key,
        view=place[0],
        position=place[1],
        label=record.label,
        label_name=names[record.label] if known else f"class {record.label}",
        answers=answers,
        answered=top[0]["index"] if top and len(logits) == len(names) else None,
        words=describe_view_record(record_view(record)),
        digest=record.digest,
    )


def pixels_of_view(checker: RecordChecker, record: Record, place: tuple[int, int]) -> NDArray[np.uint8] | None:
    """The pixels of a view, None where they are not at hand or damaged."""
    try:
        return checker.picture(record, *place)
    except (UserError, UnreadableImage):
        return None


class Pair(NamedTuple):
    """Two views whose maps are alike."""

    first: int
    second: int
    """Their places in the scan."""
    cosine: float
    same_pixels: bool


def closest_pairs(found: Scan, count: int) -> list[Pair]:
    """The `count` closest pairs, closest first; every view is in one of them at most."""
    if len(found.looks) < 2:
        return []
    cosine = found.vectors @ found.vectors.T
    rows, columns = np.triu_indices(len(cosine), 1)
    order = np.argsort(-cosine[rows, columns], kind="stable")[: 20 * count]
    used, pairs = set[int](), list[Pair]()
    for first, second in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if len(pairs) < count and not used & {first, second}:
            used |= {first, second}
            same = found.looks[first].digest == found.looks[second].digest
            pairs.append(Pair(first, second, float(cosine[first, second]), same))
    return pairs
