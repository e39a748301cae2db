"""The codec for pooled embeddings, the second target in an unlabeled cache (`second` in records and manifests).

In: the id of the cache's feature codec and the embedding width P; or `second_codec` from a manifest.
Out: a feature codec for maps (P, 1, 1).
Invariant: pooled embeddings are stored at least as accurately as maps, and never with a codec that must be fitted.
"""

from collections.abc import Mapping
from typing import Any

from scalekd_cache.codec import FLOATS, codec_from_config, make_codec
from scalekd_cache.codec.base import FeatureCodec


def pooled_codec(maps: str, width: int) -> FeatureCodec | None:
    """The codec for pooled embeddings with `width` values, as (width, 1, 1) maps; None if the width is 0.

    Args:
        maps: id of the cache's feature codec. A floating-point codec is also used for the embeddings. Otherwise, they
            use int8, with a float16 mean and an 8-bit difference per value.
        width: number of values.
    """
    return make_codec(maps if maps in FLOATS else "int8", (width, 1, 1)) if width else None


def second_codec_from_config(config: Mapping[str, Any]) -> FeatureCodec | None:
    """The codec for pooled embeddings, from `second_codec` in a manifest; None if that is empty.

    Raises:
        UserError: as in `codec_from_config`.
    """
    return codec_from_config(config) if config else None
