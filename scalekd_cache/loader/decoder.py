"""Decodes records for other data pipelines: webdataset, Hugging Face `datasets`, or a map-style dataset.

In: a sample that `webdataset` read from a cache's tar, or positions in a view. Out: a dict of arrays and strings.
Invariant: records pass the same checks as in training: checksum, required parts, labels, pixel digests. The pipeline
is responsible for the order and completeness of each epoch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.loader.loader import DIGEST_EVERY
from scalekd_cache.loader.record_pixels import RecordPixels, decode_features, decode_pooled, verified_pixels
from scalekd_cache.loader.target_cache import check_parts, target_codecs, with_pixels
from scalekd_cache.store.base import Parts, Record
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.store.streamed import TarSamples


class RecordDecoder:
    """Decodes a cache's records for a data pipeline other than `CachedTargets`.

    Call it on samples from `webdataset`: `wds.WebDataset(tars).map(RecordDecoder(cache))`. `read` takes positions and
    works with any cache. A decoded record is a dict:

    | name | value |
    |---|---|
    | `key` | sample key |
    | `view` | view record as JSON text: crop, flip, operations |
    | `image` | (3, H, W) uint8: the teacher's input pixels, not normalized |
    | `label` | class index; absent in a cache without labels |
    | `features` | (C, H, W) float32: the teacher's feature map; None if a sparse cache stores none for this view |
    | `norms` | (2, H, W) float32: exact token norms, raw and mean-removed; None if `features` is None |
    | `logits` | (K,) float32; for top-k logits, log-probabilities with -inf for the other classes; absent if K = 0 |
    | `pooled` | (P,) float32: pooled embedding; absent if the cache stores none |

    Args:
        cache: a finished cache, its folder or its URL.
        pixels_from: folder or URL of the cache that stores the shared pixels (None: as recorded).
        data: the images, for a cache without pixels (None: the path used in stage 1).

    Raises:
        UserError: the cache is not finished or is damaged; shared pixels or the images are missing.
    """

    def __init__(self, cache: Cache | Path | str, *, pixels_from: str | None = None, data: str | None = None) -> None:
        self.cache = cache if isinstance(cache, Cache) else Cache.open(cache)
        manifest = self.cache.manifest
        facts = manifest.facts
        self._codec, self._logit_codec, self._second_codec = target_codecs(self.cache)
        recomputed = isinstance(self._logit_codec, RecomputedLogits)
        self._classifier = load_classifier(facts.logit_codec, self.cache.root) if recomputed else None
        views = ViewConfig(**from_plain(facts.view_recipe))
        self._replayed = views.pixels == "replayed"
        self._pixels = RecordPixels(views, open_cache_source(facts.data, data, "train") if self._replayed else None)
        self._shared = open_shared_pixels(self.cache, pixels_from, manifest.num_views)
        self.num_classes = facts.num_classes
        """Number of classes for a student: the dataset's or, without labels, the teacher's; 0 if there are none."""
        self.feature_shape = self._codec.shape
        """Shape of the teacher's feature map, (C, H, W)."""
        self._needed = Parts.LABEL if facts.labeled else Parts(0)
        self._needed |= Parts.FEATURES if facts.features_every == 1 else Parts(0)
        self._needed |= Parts(0) if self._second_codec is None else Parts.SECOND
        self._tars: TarSamples | None = None
        self._decoded = 0

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Decode a sample that webdataset read from one of the cache's tars, before any `.decode()`.

        Raises:
            UserError: the sample has already been decoded, is not from one of this cache's tars, or has a damaged
                record.
        """
        if self._tars is None:
            self._tars = TarSamples(self.cache)
        record, position, view = self._tars(sample)
        return self._decode([record], [position], view)[0]

    def read(self, positions: ArrayLike, view: int) -> list[dict[str, Any]]:
        """The decoded records at these positions in a view, in this order. Arguments and errors are as for
        `Cache.read`."""
        return self._decode(self.cache.read(positions, view), positions, view)

    @torch.no_grad()
    def _decode(self, records: list[Record], positions: ArrayLike, view: int) -> list[dict[str, Any]]:
        check_parts(records, self._needed, view, self.cache)
        if self._shared is not None:
            records = with_pixels(records, self._shared.read(positions, view), self._shared, view)
        decoded = [{"key": record.key, "view": record.view, "image": self._image(record, view)} for record in records]
        columns = self._targets(records)
        if self.cache.manifest.facts.labeled:
            columns["label"] = [record.label for record in records]
        for number, one in enumerate(decoded):
            one.update({name: values[number] for name, values in columns.items()})
        return decoded

    def _image(self, record: Record, view: int) -> NDArray[np.uint8]:
        """(3, H, W) uint8."""
        check = self._replayed or self._decoded % DIGEST_EVERY == 0
        self._decoded += 1
        return verified_pixels(self._pixels, record, self.cache, view, check=check).transpose(2, 0, 1)

    def _targets(self, records: Sequence[Record]) -> dict[str, Sequence[Any]]:
        """The teacher's targets, keyed by name; each has one value per record."""
        there = [number for number, record in enumerate(records) if len(record.features)]
        features: list[NDArray[np.float32] | None] = [None] * len(records)
        norms, columns = features.copy(), dict[str, Sequence[Any]]()
        if there:
            maps = decode_features(self._codec, [records[number] for number in there])
            for row, number in enumerate(there):
                features[number], norms[number] = maps.features[row].numpy(), maps.norms[row].numpy()
        columns["features"], columns["norms"] = features, norms
        if self._classifier is not None:
            columns["logits"] = list(self._classifier(maps.features.mean((2, 3))).numpy())
        elif self._logit_codec.num_classes:
            columns["logits"] = [self._logit_codec.decode(record.logits) for record in records]
        if self._second_codec is not None:
            columns["pooled"] = list(decode_pooled(self._second_codec, records).numpy())
        return columns
