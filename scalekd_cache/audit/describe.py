"""Facts about a cache or one of its records, for `inspect`: sizes, shapes, labels, location on disk and digest check.

In: an open cache, a view and a position. Out: JSON values.
Invariant: nothing is written. An unusable record raises an error that names its shard and key.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.codec.base import FeatureCodec, FeatureMap
from scalekd_cache.errors import UserError
from scalekd_cache.loader.record_pixels import decode_features, decode_pooled, record_view, wrong_digest
from scalekd_cache.models.teacher_spec import TeacherSpec, teacher_label
from scalekd_cache.store.base import Record
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.views.pixels import decode_pixels
from scalekd_cache.views.view import View

TOP = 5
NO_FEATURES = "no features stored for this view of this image"


def describe_record(cache: Cache, view: int, position: int, pixels: Cache | None = None) -> dict[str, Any]:
    """All facts about a record; `pixels` is the cache that holds its pixels, if different."""
    if view not in range(cache.manifest.num_views) or position not in range(len(cache)):
        raise UserError(
            "no such record in the cache",
            got=f"view {view}, position {position}",
            expected=f"views 0 to {cache.manifest.num_views - 1}, positions 0 to {len(cache) - 1}",
            where=cache.root,
        )
    record = cache.read([position], view)[0]  # raises on a checksum mismatch
    manifest = cache.manifest
    names = manifest.facts.class_names
    checker = RecordChecker(manifest.facts.fingerprint_fields, cache.root, len(names))
    decoded = decode_features(checker.codec, [record]) if len(record.features) else None
    second = () if checker.second_codec is None else ("second",)
    return {
        "key": record.key,
        "position": position,
        "view": view,
        "label": record.label,
        "class": names[record.label] if 0 <= record.label < len(names) else None,
        "where": _place(cache, view, position),
        "bytes": {name: len(getattr(record, name)) for name in ("view", "pixels", "features", "logits", *second)},
        "view_record": record_view(record).to_json(),
        "view_in_words": describe_view_record(record_view(record)),
        "digest": record.digest,
        "digest_ok": _digest_ok(cache, record, encoded_pixels(record, view, position, pixels)),
        "features": NO_FEATURES if decoded is None else _features(checker.codec, decoded),
        **({} if checker.second_codec is None else {"pooled": _pooled(checker.second_codec, record)}),
        "top_logits": top_logits(checker.logits([record], decoded and decoded.features)[0], names),
    }


def _place(cache: Cache, view: int, position: int) -> dict[str, Any]:
    """The record's shard file and its row in that file."""
    unit, row = cache.locate(position, view)
    end = "tar" if cache.manifest.facts.backend == "webdataset" else "zarr"
    shard = unit_folder(cache.root, unit.group, unit.range_id) / f"v{view:04d}.{end}"
    return {"shard": str(shard), "row": row}


def describe_view_record(view: View) -> str:
    """Describe a view record as text."""
    left, top, width, height = view.crop
    words = [f"crop {width} x {height} at ({left}, {top})", *(["flipped"] if view.flip else [])]
    words += [f"{name} {argument:g}" for name, argument in view.operations]
    if view.erase is not None:
        left, top, width, height = view.erase
        words.append(f"erased {width} x {height} at ({left}, {top}) with noise {view.noise_seed}")
    return ", ".join(words)


def encoded_pixels(record: Record, view: int, position: int, pixels: Cache | None) -> bytes:
    """A record's encoded pixels, from the cache that holds them; empty if none are stored."""
    return bytes((record if pixels is None else pixels.read([position], view)[0]).pixels)


def _digest_ok(cache: Cache, record: Record, encoded: bytes) -> bool | None:
    """Whether the pixels match the record's digest; None if no pixels are available."""
    if not encoded:
        return None
    return wrong_digest(record, decode_pixels(encoded, cache.manifest.facts.view_recipe["size"])) is None


def _features(codec: FeatureCodec, decoded: FeatureMap) -> dict[str, Any]:
    values, norms = decoded.features[0].numpy(), decoded.norms[0].numpy()
    return {
        "codec": codec.id,
        "shape": list(values.shape),
        **{name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")},
        "token_norms": _range(norms[0]),
        "token_norms_mean_removed": _range(norms[1]),
    }


def _pooled(codec: FeatureCodec, record: Record) -> dict[str, Any]:
    values = decode_pooled(codec, [record])[0].numpy()
    figures = {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}
    return {"codec": codec.id, "width": len(values), **figures, "norm": float(np.linalg.norm(values))}


def _range(values: NDArray[np.float32]) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def top_logits(row: NDArray[np.float32], names: Sequence[str]) -> list[dict[str, Any]]:
    """The largest logits with their probabilities; empty if there is no classifier."""
    if row.size == 0:
        return []
    logits = row.astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum() if np.isfinite(logits).all() else np.exp(-logits.max())  # top-k: log-probabilities
    return [
        {
            "class": names[k] if len(names) == len(logits) else None,
            "index": k,
            "logit": float(logits[k]),
            "probability": float(shares[k]),
        }
        for k in np.argsort(-logits, kind="stable")[:TOP].tolist()
        if np.isfinite(logits[k])
    ]


def describe_cache(cache: Cache) -> dict[str, Any]:
    """Facts about a cache, from its manifest."""
    manifest = cache.manifest
    spec = TeacherSpec.from_json(manifest.facts.teacher["spec"], str(cache.root))
    return {
        "cache": str(cache.root),
        "images": manifest.num_samples,
        "views": manifest.num_views,
        "units": len(manifest.units),
        "backend": manifest.facts.backend,
        "recipe": manifest.facts.recipe,
        "fingerprint": manifest.facts.fingerprint,
        "teacher": {
            "name": teacher_label(manifest.facts.teacher),
            "feature_shape": list(spec.feature_shape),
            "top1": manifest.facts.teacher["top1"],
        },
        "classes": len(manifest.facts.class_names) or "none: the images have no labels",
        "codec": manifest.facts.codec,
        **({"second_codec": manifest.facts.second_codec} if manifest.facts.second_codec else {}),
        "stored_features": 1 / manifest.facts.features_every,
        "view_recipe": manifest.facts.view_recipe,
        "data": manifest.facts.data,
        "bytes_per_view": manifest.bytes_per_view,
        "fidelity": manifest.fidelity,
        "versions": manifest.facts.versions,
    }
