"""One of a run's caches as a source of targets. All caches in a run hold the same views.

In: positions in the order of the run's first cache. Out: this cache's records for the same views, with their targets.
Invariant: each record from the other caches has the same key, label, view and pixel digest as the first cache's record,
so every teacher's targets belong to the pixels that the student sees.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import LogitCodec, logit_codec_from_config
from scalekd_cache.codec.pooled import second_codec_from_config
from scalekd_cache.codec.recomputed import RecomputedLogits
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.loader.order import Ids
from scalekd_cache.store.base import Parts, Record
from scalekd_cache.store.growing import GrowingCache, Report
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import pixel_identity

PART_NAMES = {
    Parts.LABEL: "label", Parts.FEATURES: "features", Parts.LOGITS: "logits", Parts.SECOND: "pooled embedding"
}  # fmt: skip
"""Names of a record's optional parts, for messages."""


class TargetCodecs(NamedTuple):
    """How a cache stores its teacher's targets."""

    features: FeatureCodec
    logits: LogitCodec
    second: FeatureCodec | None
    """Codec for pooled embeddings; None if the cache has none."""

    @property
    def row_bytes(self) -> int:
        """Decompressed size in bytes of a sample's features and pooled embedding."""
        return self.features.bytes_per_view + (0 if self.second is None else self.second.bytes_per_view)


def target_codecs(cache: Cache) -> TargetCodecs:
    """A cache's codecs."""
    facts = cache.manifest.facts
    return TargetCodecs(
        codec_from_config(facts.codec, cache.root),
        logit_codec_from_config(facts.logit_codec),
        second_codec_from_config(facts.second_codec),
    )


class StoredTargets(NamedTuple):
    """One teacher's targets for a micro-batch, as stored in its cache. They are decoded on the training device."""

    codes: Tensor
    """(F, bytes_per_view) uint8: rows from the feature codec for the first F <= B samples."""
    logits: Tensor
    """(B, K) float32: decoded logits (K = 0 if the logit codec stores none)."""
    second: Tensor | None
    """(B, bytes_per_view) uint8: rows from the codec for pooled embeddings; None if the cache has none."""

    def to(self, device: torch.device) -> "StoredTargets":
        """Copy the targets to `device`, asynchronously if the memory is pinned."""
        codes, logits = (tensor.to(device, non_blocking=True) for tensor in (self.codes, self.logits))
        return StoredTargets(codes, logits, None if self.second is None else self.second.to(device, non_blocking=True))


class TargetCache:
    """One of a run's caches.

    Args:
        cache: the cache.
        features: number of samples in a micro-batch whose features are read, starting with the first.
        first: the run's first cache, which defines the positions (None: this cache).

    Raises:
        UserError: the two caches contain different views or images.
    """

    def __init__(self, cache: Cache, features: int, first: Cache | None = None) -> None:
        self.cache, self.features = cache, features
        self.codecs = target_codecs(cache)
        self.needed = Parts.LABEL if cache.manifest.facts.labeled else Parts(0)
        if self.codecs.second is not None:
            self.needed |= Parts.SECOND
        self._positions = None if first is None else SamePositions(first, cache)

    def wait_for(self, view: int, report: Report) -> None:
        """Wait for a view that stage 1 is still writing."""
        if isinstance(self.cache, GrowingCache):
            self.cache.wait_for(view, report)

    def is_loaded(self, view: int) -> bool:
        """Whether this process knows the view's units; with loader workers, only they wait for new ones."""
        return any(unit.group == self.cache.group_of(view) for unit in self.cache.manifest.units)

    def has_features(self, ids: Ids, view: int) -> NDArray[np.bool_]:
        """Which of these positions have features in this cache, (n,) bool."""
        return self.cache.has_features(self._own(ids, view), view)

    def read(self, ids: Ids, view: int) -> list[Record]:
        """The records for a micro-batch, with all parts that training needs.

        Raises:
            UserError: as for `Cache.read`, or a part is missing.
        """
        records = self.cache.read(self._own(ids, view), view)
        check_parts(records, self.needed, view, self.cache, features=self.features)
        return records

    def stored(self, records: Sequence[Record]) -> StoredTargets:
        """The targets of these records."""
        second: Tensor | None = None
        if self.codecs.second is not None:
            second = torch.from_numpy(self.codecs.second.unpack([record.second for record in records]))
        return StoredTargets(
            codes=torch.from_numpy(self.codecs.features.unpack([one.features for one in records[: self.features]])),
            logits=torch.from_numpy(np.stack([self.codecs.logits.decode(record.logits) for record in records])),
            second=second,
        )

    def _own(self, ids: Ids, view: int) -> Ids:
        return ids if self._positions is None else self._positions(ids, view)


def feature_counts(caches: Sequence[Cache], features: Sequence[int] | None, there: int, micro_batch: int) -> list[int]:
    """For each cache, the number of samples per micro-batch whose features are read: `features` (None: `there`, the
    samples with features in all caches).

    A cache that stores the classifier instead of logits has features for all samples, and all of them are read (none
    for 0, without targets).
    """
    configs = [cache.manifest.facts.logit_codec for cache in caches]
    recomputed = [isinstance(logit_codec_from_config(config), RecomputedLogits) for config in configs]
    given = features or [there] * len(caches)
    return [micro_batch if whole and count else count for whole, count in zip(recomputed, given, strict=True)]


class SamePositions:
    """Maps record positions in one cache to positions in another cache with the same views.
    Positions are equal if both caches have the same view groups; otherwise, they are looked up by key, once per pair of
    groups.
    """

    def __init__(self, first: Cache, other: Cache) -> None:
        self._first, self._other = first, other
        self._found: dict[tuple[int, int], Ids | None] = {}
        fields = [cache.manifest.facts.fingerprint_fields for cache in (first, other)]
        fix = rebuild(first)
        if pixel_identity(fields[0]) != pixel_identity(fields[1]):
            different = [name for name in ("data", "views") if fields[0][name] != fields[1][name]]
            what = {"data": "datasets", "views": "views"}
            raise UserError(
                f"the caches were made with different {' and different '.join(what[name] for name in different)}, "
                "so they cannot be used in one run",
                where=f"{first.root} and {other.root}",
                fix=fix,
            )
        if len(first) != len(other):
            raise UserError(
                "the caches contain different numbers of images, because they skipped different ones",
                got=f"{counted(len(other), 'image')} in {other.root}",
                expected=f"{counted(len(first), 'image')}, as in {first.root}",
                fix=fix,
            )
        self._of(0)

    def __call__(self, ids: Ids, view: int) -> Ids:
        """Positions (n,) in the other cache that correspond to these positions in a view."""
        found = self._of(view)
        return ids if found is None else found[ids]

    def _of(self, view: int) -> Ids | None:
        groups = self._first.group_of(view), self._other.group_of(view)
        if groups not in self._found:
            self._found[groups] = self._match(*groups)
        return self._found[groups]

    def _match(self, group: int, other: int) -> Ids | None:
        """For each position, the position in the other cache; None if all are equal."""
        if self._first.key_files(group) == self._other.key_files(other):
            return None
        keys, others = (np.array(cache.keys(at)) for cache, at in ((self._first, group), (self._other, other)))
        if np.array_equal(keys, others):
            return None
        by_key, by_other = np.argsort(keys), np.argsort(others)
        if not np.array_equal(keys[by_key], others[by_other]):
            key = (set(keys.tolist()) ^ set(others.tolist())).pop()
            raise UserError(
                "the caches contain different images",
                got=f"{key} is in only one of them",
                where=f"{self._first.root} and {self._other.root}",
                fix=rebuild(self._first),
            )
        found: Ids = np.empty(len(keys), np.int64)
        found[by_key] = by_other
        return found


def check_joinable(first: Cache, other: Cache) -> None:
    """Check that both caches can provide targets for one student.

    Raises:
        UserError: the caches contain different views or images, or store features for different samples.
    """
    positions = SamePositions(first, other)
    shares = [cache.manifest.facts.features_every for cache in (first, other)]
    ids = np.arange(len(first))
    if min(shares) > 1 and not np.array_equal(first.has_features(ids, 0), other.has_features(positions(ids, 0), 0)):
        raise UserError(
            "both caches store features for only some samples, but not for the same ones",
            got=f"one in {shares[0]} samples in {first.root}, one in {shares[1]} in {other.root}",
            fix=f"{rebuild(first)} (with the same --stored-features)",
        )


def part_names(parts: Parts) -> list[str]:
    """The names of a record's optional parts, for messages."""
    return [name for part, name in PART_NAMES.items() if part in parts]


def check_parts(records: Sequence[Record], needed: Parts, view: int, cache: Cache, *, features: int = 0) -> None:
    """Raise `UserError` if a record lacks a needed part, or if any of the first `features` records has no features."""
    for number, record in enumerate(records):
        wanted = needed | (Parts.FEATURES if number < features else Parts(0))
        missing = wanted & ~record.parts
        if missing:
            raise UserError(
                "a record has no " + " or no ".join(part_names(missing)),
                got=" and ".join(part_names(record.parts)) or "none",
                expected=" and ".join(part_names(wanted)),
                where=f"view {view} of {record.key} in {cache.root}",
            )


def with_pixels(records: Sequence[Record], others: Sequence[Record], pixels: Cache, view: int) -> list[Record]:
    """The records with pixels taken from `others`, which come from the cache that stores the shared pixels.

    Raises:
        UserError: the two sets of records belong to different views.
    """
    check_same_views(records, others, pixels, view, "use the cache given as --pixels-from when this cache was made")
    return [record._replace(pixels=other.pixels) for record, other in zip(records, others, strict=True)]


def rebuild(first: Cache) -> str:
    """How to fix a cache whose views differ from the first cache's."""
    again = shell_command("cache-teacher", pixels_from=first.root, teacher="NAME", cache="FOLDER")
    return f"rebuild the other cache from the first one's views: {again}"


def check_same_views(first: Sequence[Record], records: Sequence[Record], cache: Cache, view: int, fix: str) -> None:
    """Check that these records from `cache` belong to the same views as `first`.

    Raises:
        UserError: a key, label, view or pixel digest differs.
    """
    for expected, got in zip(first, records, strict=True):
        fields = ("digest", "label", "view", "key")
        if name := next((name for name in fields if getattr(got, name) != getattr(expected, name)), None):
            raise UserError(
                "two caches contain different records at the same position",
                got=f"{got.key}, {name} {getattr(got, name)}",
                expected=f"{expected.key}, {name} {getattr(expected, name)}",
                where=f"view {view} of {cache.root}",
                fix=fix,
            )
