"""Reads a stored record's pixels and features.

In: a record from a cache. Out: its view record; its uint8 pixels, decoded or replayed, and whether they match its
digest; its decoded feature map and pooled embedding.
Invariant: damaged or missing data raises an error and is never replaced.
"""

from collections.abc import Sequence

import torch

from scalekd_cache.codec.base import FeatureCodec, FeatureMap
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import decode_image
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import Record
from scalekd_cache.store.checked_files import parse_json
from scalekd_cache.store.reader import Cache
from scalekd_cache.views.pixels import Pixels, decode_pixels, pixel_digest
from scalekd_cache.views.view import View, apply_view


def record_view(record: Record) -> View:
    """The view in a stored record."""
    return View.from_json(parse_json(record.view.encode(), "a view record", record.key))


def decode_features(codec: FeatureCodec, records: Sequence[Record]) -> FeatureMap:
    """Feature maps (B, C, H, W) and norms (B, 2, H, W) from records; `UserError` if the features use a different
    codec."""
    return codec.decode(torch.from_numpy(codec.unpack([record.features for record in records])))


def decode_pooled(codec: FeatureCodec, records: Sequence[Record]) -> torch.Tensor:
    """Pooled embeddings (B, P) from records; `UserError` if they use a different codec."""
    return codec.decode(torch.from_numpy(codec.unpack([record.second for record in records]))).features.flatten(1)


class RecordPixels:
    """Provides records' pixels: decodes stored pixels, or regenerates the view from its image (replayed views).

    Args:
        views: the cache's view recipe.
        source: the dataset, for replayed views (None: not available).
    """

    def __init__(self, views: ViewConfig, source: Source | None = None) -> None:
        self.views, self.source = views, source
        self._index = {} if source is None else {sample.key: at for at, sample in enumerate(source.samples)}

    def __call__(self, record: Record) -> Pixels | None:
        """(size, size, 3) uint8; None for a replayed view if the dataset is not available.

        Raises:
            UserError: the pixels are damaged, or the dataset lacks the image.
            UnreadableImage: the image cannot be decoded.
        """
        if self.views.pixels == "baked":
            return decode_pixels(record.pixels, self.views.size)
        if self.source is None:
            return None
        if record.key not in self._index:
            raise UserError(
                "the source image of a replayed view is not in the dataset",
                got=f"no sample {record.key}",
                where=self.source.name,
                fix="set --data to the dataset that the cache was made from",
            )
        image = decode_image(self.source.read(self._index[record.key]), record.key)
        return apply_view(record_view(record), image, self.views)


def wrong_digest(record: Record, pixels: Pixels) -> str | None:
    """The pixels' digest if it differs from the record's; otherwise None."""
    found = pixel_digest(pixels)
    return None if found == record.digest else found


def verified_pixels(pixels_of: RecordPixels, record: Record, cache: Cache, view: int, *, check: bool) -> Pixels:
    """A record's pixels. With `check`, they are compared with the digest of the teacher's input.

    Raises:
        UserError: as for `RecordPixels`, or the digest differs.
    """
    pixels = pixels_of(record)
    assert pixels is not None, "the dataset for replayed views is open"
    wrong = wrong_digest(record, pixels) if check else None
    if wrong is not None:
        replayed = pixels_of.source is not None
        raise UserError(
            "a view's pixels differ from the teacher's input",
            got=f"digest {wrong}",
            expected=f"digest {record.digest}",
            where=f"view {view} of {record.key} in {cache.root}",
            fix=("restore the image if it was replaced after stage 1, or " if replayed else "")
            + "use the library versions that wrote the cache: "
            + ", ".join(f"{name} {version}" for name, version in cache.manifest.facts.versions.items()),
        )
    return pixels
