"""Looks into records whose checksum is right: can everything in them be used, and is it what the teacher saw?

In: records of a shard, and what the cache was made with. Out: findings, each with what mends it.
Invariant: whatever a record holds, the outcome is a finding, never an exception; nothing larger than a batch is held.
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
from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.loader.pixels import RecordPixels, decode_features, record_view, wrong_digest
from scalekd_cache.store.base import Record, ShardId
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify_unit import Finding, Part
from scalekd_cache.views.pixels import decode_pixels


class RecordChecker:
    """Decodes records as a training run does, and compares what can be compared.

    Args:
        fields: `fingerprint_fields` of a manifest or plan.
        root: the cache, for the state of a fitted codec and the teacher's classifier.
        num_classes: classes of the data set, where they are known.
        source: the images, to draw replayed views again; without them their pixels are not looked at.
        pixels: of a cache that shares pixels, the one that holds them; without it they are not looked at.

    Raises:
        UserError: a codec or view recipe that this version does not know, or a codec's file that is damaged.
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
        recomputed = isinstance(self.logit_codec, RecomputedLogits)
        self.classifier = load_classifier(fields["logit_codec"], root) if recomputed else None
        self.views = ViewConfig(**from_plain(fields["views"]))
        self.num_classes, self.source, self.pixels = num_classes, source, pixels
        self.shares = "pixels" in fields
        self.record_pixels = RecordPixels(self.views, source)

    def __call__(self, records: list[Record], shard: ShardId, rows: list[int]) -> list[Finding]:
        """Every finding in the records that stand in these rows of a shard."""
        found: list[Finding] = []
        looks = (self._label, self._logits, self._view, *(() if self.shares else (self._pixels,)))
        for record in records:
            for look in looks:
                try:
                    what = look(record, shard.view)
                except (UserError, UnreadableImage, ValueError) as error:
                    what = str(error)
                if what is not None:
                    found.append(Finding(record.key, what))
        if self.pixels is not None:
            found += self._shared(self.pixels, records, shard, rows)
        return found + self._features(records)

    def picture(self, record: Record, view: int, position: int) -> NDArray[np.uint8] | None:
        """The (size, size, 3) uint8 pixels of a record at a position of a view; None where they cannot be had here.

        Raises:
            UserError: they are damaged.
        """
        if self.pixels is None:
            return None if self.shares else self.record_pixels(record)
        other = self.pixels.cache.read([position], view)[0]
        return decode_pixels(other.pixels, self.views.size)

    def _label(self, record: Record, _: int) -> str | None:
        if record.label < 0 or (self.num_classes is not None and record.label >= self.num_classes):
            return f"label {record.label} of {self.num_classes} classes"
        return None

    def _logits(self, record: Record, _: int) -> str | None:
        logits = self.logit_codec.decode(record.logits)
        known = logits[logits > -np.inf] if self.logit_codec.partial else logits
        return None if np.isfinite(known).all() else "logits are not finite"

    def _view(self, record: Record, view: int) -> str | None:
        number = record_view(record).number
        return None if number == view else f"the view record is that of view {number}, not {view}"

    def _pixels(self, record: Record, _: int) -> str | None:
        pixels = self.record_pixels(record)
        wrong = None if pixels is None else wrong_digest(record, pixels)
        return None if wrong is None else f"pixels have digest {wrong}, the teacher saw {record.digest}"

    def _shared(self, pixels: PixelCache, records: list[Record], shard: ShardId, rows: list[int]) -> Iterator[Finding]:
        """Compare with the records of the cache that holds the pixels."""
        try:
            places = pixels.records(shard.view, shard.range_id)
        except (KeyError, IndexError):
            places = range(0)
        there = [(record, places[row]) for record, row in zip(records, rows, strict=True) if row < len(places)]
        for record in records[len(there) :]:
            yield Finding(record.key, f"the cache whose pixels are shared, {pixels.cache.root}, has no such record")
        others = _read_each(pixels.cache, [position for _, position in there], shard.view)
        for (record, _), other in zip(there, others, strict=True):
            what = str(other) if isinstance(other, UserError) else self._own_digest(other)
            if what is not None:
                yield Finding(record.key, f"in {pixels.cache.root}, whose pixels are shared: {what}", Part.PIXELS)
                continue
            for name in ("key", "label", "view", "digest"):
                mine, theirs = getattr(record, name), getattr(other, name)
                if mine != theirs:
                    yield Finding(record.key, f"{name} is {mine}, in the cache whose pixels are shared {theirs}")

    def _own_digest(self, record: Record) -> str | None:
        """What is wrong with the pixels of a record that holds some."""
        try:
            wrong = wrong_digest(record, decode_pixels(record.pixels, self.views.size))
        except (UserError, UnreadableImage) as error:
            return str(error)
        return None if wrong is None else f"pixels have digest {wrong}, their record says {record.digest}"

    def _features(self, records: list[Record]) -> list[Finding]:
        found, whole = list[Finding](), list[Record]()
        for record in records:
            what = self._unpacking(record)
            if what is None:
                whole.append(record)
            else:
                found.append(Finding(record.key, what))
        if whole:
            decoded = decode_features(self.codec, whole)
            finite = decoded.features.flatten(1).isfinite().all(1) & decoded.norms.flatten(1).isfinite().all(1)
            found += [
                Finding(record.key, "features are not finite")
                for record, ok in zip(whole, finite.tolist(), strict=True)
                if not ok
            ]
        return found

    def _unpacking(self, record: Record) -> str | None:
        """Why the codec does not take a record's features."""
        try:
            self.codec.unpack([record.features])
        except UserError as error:
            return str(error)
        return None

    def logits(self, records: Sequence[Record], features: torch.Tensor) -> NDArray[np.float32]:
        """(B, K) logits of records with these decoded maps (B, C, H, W); -inf for classes that are not kept."""
        if self.classifier is not None:
            recomputed: NDArray[np.float32] = self.classifier(features.mean((2, 3))).numpy()
            return recomputed
        return np.stack([self.logit_codec.decode(record.logits) for record in records])

    def usable(self, record: Record) -> bool:
        """Whether a record's features and logits can be decoded."""
        try:
            self.logit_codec.decode(record.logits)
        except UserError:
            return False
        return self._unpacking(record) is None


def _read_each(cache: Cache, positions: list[int], view: int) -> list[Record | UserError]:
    """Records, or why they cannot be read; one call when all is well."""
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
