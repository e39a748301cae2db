"""The codec of pooled embeddings, the second target of a cache without labels (`second` in a record and a manifest).

In: the id of the codec of the cache's maps and the width P of the embedding; or `second_codec` of a manifest.
Out: a feature codec of maps (P, 1, 1).
Invariant: pooled embeddings are stored at least as exactly as maps; a codec that must be fitted is never used for them.
"""

from collections.abc import Mapping
from typing import Any

from scalekd_cache.codec import FLOATS, codec_from_config, make_codec
from scalekd_cache.codec.base import FeatureCodec


def pooled_codec(maps: str, width: int) -> FeatureCodec | None:
    """The codec of pooled embeddings of `width` values, as (width, 1, 1) maps; None for width 0.

    Args:
        maps: id of the codec of the cache's maps. Floating-point codecs store the embeddings too; next to all others it
            is int8, which stores a float16 mean and an 8-bit difference of each value here.
        width: number of values.
    """
    return make_codec(maps if maps in FLOATS else "int8", (width, 1, 1)) if width else None


def second_codec_from_config(config: Mapping[str, Any]) -> FeatureCodec | None:
    """The codec of pooled embeddings, from `second_codec` of a manifest; None for an empty one.

    Raises:
        UserError: as `codec_from_config`.
    """
    return codec_from_config(config) if config else None
