"""Codecs convert teacher feature maps and logits to bytes and back. This file is the registry.

In: a codec name, or the JSON config from a manifest. Out: the codec (`base.py` defines the interface).
Invariant: importing this package does not import torch, because codec modules are imported on demand.
numcodecs is not used because a feature codec needs token norms, an error bound, dither and GPU decoding. The lossless
stage is zstd.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scalekd_cache.errors import UserError, unknown_name

if TYPE_CHECKING:
    from scalekd_cache.codec.base import FeatureCodec
    from scalekd_cache.store.path import StoredPath

Shape = tuple[int, int, int]
"""(C, H, W) of a feature map."""
CODECS: dict[str, tuple[str, str]] = {
    "int8": ("scalekd_cache.codec.int8", "Int8Codec"),
    "int4": ("scalekd_cache.codec.int8", "Int4Codec"),
    "fp8": ("scalekd_cache.codec.fp8", "Fp8Codec"),
    "float16": ("scalekd_cache.codec.plain", "Float16Codec"),
    "bfloat16": ("scalekd_cache.codec.plain", "BFloat16Codec"),
    "float32": ("scalekd_cache.codec.plain", "Float32Codec"),
}
FLOATS = ("float16", "bfloat16", "float32")
FITTED = ("transform", "transform-economy", "transform-rotated")
"""Presets for the transform codec, which must be fitted to a teacher (`transform_fit.fit`)."""


def check_codec_name(name: str) -> None:
    """Raise `UserError` for an unknown codec name; `auto` is valid."""
    if name not in (*CODECS, *FITTED, "auto"):
        raise unknown_name("feature codec", name, [*CODECS, *FITTED], "--codec, cache.codec, or codec.id in a manifest")


def make_codec(name: str, shape: Shape) -> "FeatureCodec":
    """Build the codec `name` for maps of `shape` (C, H, W).

    Raises:
        UserError: the codec is unknown (the message suggests the closest names), or the shape is not three positive
            integers.
    """
    if name not in CODECS:
        raise unknown_name("feature codec", name, CODECS, "codecs without fitted state; codec.id in a manifest")
    _check_shape(name, shape)
    module, kind = CODECS[name]
    codec: FeatureCodec = getattr(importlib.import_module(module), kind)(shape)
    return codec


def codec_from_config(config: Mapping[str, Any], folder: "StoredPath | None" = None) -> "FeatureCodec":
    """Build a cache's codec from its manifest config. `folder` is the cache folder, with a fitted codec's state.

    Raises:
        UserError: the id is unknown, or this version cannot read the parameters.
    """
    name, shape = config.get("id"), config.get("shape")
    if not isinstance(name, str) or not isinstance(shape, (list, tuple)):
        raise UserError(
            "invalid codec config",
            got=dict(config),
            expected="id (a string) and shape ([C, H, W])",
            where="codec in the manifest",
        )
    codec = _from_config(name, (*shape,), config, folder)  # type: ignore[arg-type]
    if codec.get_config() != {**config, "shape": list(shape)}:
        raise UserError(
            "the cache was written with codec parameters that this version cannot read",
            got=dict(config),
            expected=codec.get_config(),
            where="codec in the manifest",
            fix="use the version of scalekd-cache that wrote the cache, or rebuild the cache",
        )
    return codec


def _from_config(name: str, shape: Shape, config: Mapping[str, Any], folder: "StoredPath | None") -> "FeatureCodec":
    if name != "transform":
        return make_codec(name, shape)
    _check_shape(name, shape)
    from scalekd_cache.codec.transform import load_transform

    return load_transform(config, shape, folder)


def _check_shape(name: str, shape: Shape) -> None:
    if len(shape) != 3 or not all(type(side) is int and 0 < side <= 65_536 for side in shape):
        raise UserError(
            "invalid feature shape",
            got=shape,
            expected="(C, H, W), each from 1 to 65,536",
            where=f"codec {name}",
        )
