"""Checks the contents of records whose checksums are correct: decoding, finite values, labels, views, pixels.

In: records from a shard, and the cache's settings. Out: findings that name the part of the cache to repair.
Invariant: bad record contents never raise an exception but become findings. At most one batch is in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.codec.pooled import second_codec_from_config
from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.record_pixels import (
    RecordPixels,
    decode_features,
    decode_pooled,
    record_view,
    wrong_digest,
)
from scalekd_cache.store.base import NO_LABEL, Record, ShardId, stores_features, wrong_share
from scalekd_cache.store.manifest import FEATURES_EVERY
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify_unit import Part, RecordProblem
from scalekd_cache.views.pixels import decode_pixels

NOT_FINITE = "the pooled embedding contains NaN or Inf"


class RecordChecker:
    """Decodes records as training does and checks their contents.

    Args:
        fields: `fingerprint_fields` of a manifest or plan.
        root: the cache, from which the state of a fitted codec and the teacher's classifier are read.
        num_classes: number of classes in the dataset, if known; 0 if the dataset has no labels.
        source: the images from which replayed views are regenerated; without them, these views' pixels are not checked.
        pixels: for a cache that shares pixels, the cache that holds them; without it, pixels are not checked.

    Raises:
        UserError: this version does not support the codec or view recipe, or a codec file is damaged.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        root: StoredPath,
        num_classes: int | None,
        source: Source | None = None,
        pixels: PixelCache | None = None,
    ) -> None:
        self.codec: FeatureCodec = codec_from_config(fields["codec"], root)
        self.logit_codec = logit_codec_from_config(fields["logit_codec"])
        self.second_codec = second_codec_from_config(fields.get("second_codec", {}))
        recomputed = isinstance(self.logit_codec, RecomputedLogits)
        self.classifier = load_classifier(fields["logit_codec"], root) if recomputed else None
        self.views = ViewConfig(**from_plain(fields["views"]))
        self.num_classes, self.source, self.pixels = num_classes, source, pixels
        self.shares, self.features_every = "pixels" in fields, int(fields.get(FEATURES_EVERY, 1))
        self.record_pixels = RecordPixels(self.views, source)

    def __call__(self, records: list[Record], shard: ShardId, rows: list[int]) -> list[RecordProblem]:
        """All findings for these records; `rows` are their row numbers in the shard."""
        found: list[RecordProblem] = []
        checks = (self._label, self._logits, self._second, self._view, *(() if self.shares else (self._pixels,)))
        for record in records:
            for check in checks:
                try:
                    what = check(record, shard.view)
                except (UserError, UnreadableImage, ValueError) as error:
                    what = str(error)
                if what is not None:
                    found.append(RecordProblem(record.key, what))
        if self.pixels is not None:
            found += self._shared(self.pixels, records, shard, rows)
        there = stores_features(np.asarray(rows), shard.view, self.features_every).tolist()
        return found + self._features(records, there)

    def picture(self, record: Record, view: int, position: int) -> NDArray[np.uint8] | None:
        """A record's pixels, (size, size, 3) uint8; None if they are not available.

        Raises:
            UserError: the pixels are damaged.
        """
        if self.pixels is None:
            return None if self.shares else self.record_pixels(record)
        other = self.pixels.cache.read([position], view)[0]
        return decode_pixels(other.pixels, self.views.size)

    def _label(self, record: Record, _: int) -> str | None:
        classes = self.num_classes
        if classes == 0:
            return None if record.label == NO_LABEL else f"label {record.label}, but the dataset has no labels"
        if record.label < 0 or (classes is not None and record.label >= classes):
            return f"label {record.label} is out of range for {counted(classes or 0, 'class')}"
        return None

    def _logits(self, record: Record, _: int) -> str | None:
        logits = self.logit_codec.decode(record.logits)
        known = logits[logits > -np.inf] if self.logit_codec.partial else logits
        return None if np.isfinite(known).all() else "logits contain NaN or Inf"

    def _second(self, record: Record, _: int) -> str | None:
        if self.second_codec is None:
            return f"a {len(record.second)}-byte pooled embedding, expected none" if len(record.second) else None
        return None if bool(decode_pooled(self.second_codec, [record]).isfinite().all()) else NOT_FINITE

    def _view(self, record: Record, view: int) -> str | None:
        number = record_view(record).number
        return None if number == view else f"the view record belongs to view {number}, expected view {view}"

    def _pixels(self, record: Record, _: int) -> str | None:
        pixels = self.record_pixels(record)
        wrong = None if pixels is None else wrong_digest(record, pixels)
        return None if wrong is None else f"pixels have digest {wrong}, expected {record.digest}"

    def _shared(
        self, pixels: PixelCache, records: list[Record], shard: ShardId, rows: list[int]
    ) -> Iterator[RecordProblem]:
        """Compare these records with those of the cache that holds the pixels."""
        try:
            places = pixels.records(shard.view, shard.range_id)
        except (KeyError, IndexError):
            places = range(0)
        there = [(record, places[row]) for record, row in zip(records, rows, strict=True) if row < len(places)]
        for record in records[len(there) :]:
            yield RecordProblem(
                record.key, f"the cache that stores the pixels, {pixels.cache.root}, has no such record"
            )
        others = _read_each(pixels.cache, [position for _, position in there], shard.view)
        for (record, _), other in zip(there, others, strict=True):
            what = str(other) if isinstance(other, UserError) else self._own_digest(other)
            if what is not None:
                yield RecordProblem(
                    record.key, f"in the cache that stores the pixels, {pixels.cache.root}: {what}", Part.PIXELS
                )
                continue
            for name in ("key", "label", "view", "digest"):
                mine, theirs = getattr(record, name), getattr(other, name)
                if mine != theirs:
                    yield RecordProblem(
                        record.key, f"{name} is {mine}, but {theirs} in the cache that stores the pixels"
                    )

    def _own_digest(self, record: Record) -> str | None:
        """The problem with the pixels stored in a record, or None."""
        try:
            wrong = wrong_digest(record, decode_pixels(record.pixels, self.views.size))
        except (UserError, UnreadableImage) as error:
            return str(error)
        return None if wrong is None else f"pixels have digest {wrong}, expected {record.digest}"

    def _features(self, records: list[Record], there: list[bool]) -> list[RecordProblem]:
        """Problems with the features; `there` marks the records that should have features."""
        found, whole = list[RecordProblem](), list[Record]()
        for record, is_there in zip(records, there, strict=True):
            wrong = wrong_share(record, is_there)
            what = self._unpacking(record) if wrong is None and is_there else None
            if wrong is not None:
                what = "{}: got {}, expected {}".format(*wrong)
            if what is not None:
                found.append(RecordProblem(record.key, what))
            elif is_there:
                whole.append(record)
        if whole:
            decoded = decode_features(self.codec, whole)
            finite = decoded.features.flatten(1).isfinite().all(1) & decoded.norms.flatten(1).isfinite().all(1)
            found += [
                RecordProblem(record.key, "features contain NaN or Inf")
                for record, ok in zip(whole, finite.tolist(), strict=True)
                if not ok
            ]
        return found

    def _unpacking(self, record: Record) -> str | None:
        """Why the codec cannot unpack a record's features, or None."""
        try:
            self.codec.unpack([record.features])
        except UserError as error:
            return str(error)
        return None

    def logits(self, records: Sequence[Record], features: torch.Tensor | None) -> NDArray[np.float32]:
        """(B, K) logits for records with these decoded maps (B, C, H, W); -inf for classes that are not stored. Without
        maps, the logits must be stored.
        """
        if self.classifier is not None:
            assert features is not None
            recomputed: NDArray[np.float32] = self.classifier(features.mean((2, 3))).numpy()
            return recomputed
        return np.stack([self.logit_codec.decode(record.logits) for record in records])

    def usable(self, record: Record) -> bool:
        """Whether a record has features, and its features, logits and pooled embedding can be decoded."""
        try:
            self.logit_codec.decode(record.logits)
            if self.second_codec is not None:
                self.second_codec.unpack([record.second])
        except UserError:
            return False
        return self._unpacking(record) is None


def _read_each(cache: Cache, positions: list[int], view: int) -> list[Record | UserError]:
    """Each record, or the error from reading it. If nothing is damaged, a single call reads all records."""
    try:
        return list(cache.read(positions, view))
    except UserError:
        found: list[Record | UserError] = []
        for position in positions:
            try:
                found += cache.read([position], view)
            except UserError as error:
                found.append(error)
        return found
