"""Pixels and features of one stored record.

In: a record of a cache. Out: its uint8 pixels, decoded or replayed; its feature map, decoded.
Invariant: nothing is returned that does not belong to the record.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from scalekd_cache.codec.base import FeatureCodec, FeatureMap
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import decode_image
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import Record
from scalekd_cache.store.checked_files import parse_json
from scalekd_cache.views.pixels import decode_pixels
from scalekd_cache.views.view import View, apply_view


def record_view(record: Record) -> View:
    """The view record that a stored record carries."""
    return View.from_json(parse_json(record.view.encode(), "a view record", record.key))


def decode_features(codec: FeatureCodec, records: Sequence[Record]) -> FeatureMap:
    """Maps (B, C, H, W) and norms (B, 2, H, W) of records; `UserError` for features of another codec."""
    return codec.decode(torch.from_numpy(codec.unpack([record.features for record in records])))


def view_pixels(
    record: Record, views: ViewConfig, source: Source | None, index: Mapping[str, int]
) -> NDArray[np.uint8] | None:
    """The (size, size, 3) uint8 pixels of a view; drawn again when they are not stored, None without the images."""
    if views.pixels == "baked":
        return decode_pixels(record.pixels, views.size)
    if source is None:
        return None
    if record.key not in index:
        raise UserError("the image of a view is not in the data set", got=record.key, where=source.name)
    image = decode_image(source.read(index[record.key]), record.key)
    return apply_view(record_view(record), image, views)
