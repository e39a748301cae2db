"""Codecs for teacher logits, with one record per view.

In: float32 logits (B, K). Out: one record per row; decoding gives float32 (K,). `DenseLogits` stores all classes;
`top_k.py` and `recomputed.py` store less. `logit_codec_from_config` builds the codec described in a manifest.
Invariant: KL(softmax(original) || softmax(decoded)) <= 1e-4 for every record, and the largest logit is exact. Caches
with float32 features use a limit of 0, which makes every record exact (mode 2).
A record starts with a uint8 mode and the largest logit as float32, followed by
  mode 0: step float32, K codes uint8; logit = largest - step x code
  mode 1: K float16 distances;         logit = largest - distance
  mode 2: K float32 logits (the largest is stored twice), used if the other modes are not accurate enough.
For a teacher without a classifier, K is 0 and records are empty.
"""

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.codec.recomputed import RecomputedLogits
from scalekd_cache.codec.top_k import TopKLogits, not_finite
from scalekd_cache.errors import UserError, counted, join_or

if TYPE_CHECKING:
    from torch import Tensor

KL_LIMIT = 1e-4
INT8, FLOAT16, FLOAT32 = 0, 1, 2
TOO_COARSE = 255
"""First byte of a row if mode 0 is too coarse for it."""
FLOAT16_MAX = 65504.0


def kl_divergence(original: NDArray[Any], decoded: NDArray[Any]) -> NDArray[np.float64]:
    """KL(softmax(original) || softmax(decoded)) over the last axis, in float64."""
    log_p, log_q = _log_softmax(original), _log_softmax(decoded)
    p = np.exp(log_p)
    # Where p is 0, the term is 0 even if the difference of logs is infinite.
    terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    result: NDArray[np.float64] = terms.sum(-1)
    return result


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


class DenseLogits:
    """Logits for `num_classes` classes. A record usually takes 9 + K bytes, or 5 + 2 K if 8 bits are too coarse."""

    id = "logits-int8"
    partial = False
    """Whether decoded rows are log-probabilities of a subset of the classes."""

    def __init__(self, num_classes: int, *, exact: bool = False) -> None:
        if type(num_classes) is not int or not 0 <= num_classes <= 10_000_000:
            raise UserError(
                "invalid number of classes", got=num_classes, expected="0 to 10,000,000", where="logit codec"
            )
        self.num_classes = num_classes
        self.kl_limit = 0.0 if exact else KL_LIMIT
        self.record_bytes = 0 if num_classes == 0 else 5 + 4 * num_classes if exact else 9 + num_classes
        """Typical bytes per record."""

    def get_config(self) -> dict[str, Any]:
        """JSON for rebuilding this codec."""
        return {"id": self.id, "version": 1, "num_classes": self.num_classes, "kl_limit": self.kl_limit}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DenseLogits":
        """Rebuild the codec from its JSON config."""
        return cls(config.get("num_classes", -1), exact=config.get("kl_limit") == 0)

    def encode(self, logits: "Tensor") -> list[bytes]:
        """Encode float32 logits (B, K) on any device to one record per row. Raises `UserError` for NaN or infinity."""
        return self.pack(self.encode_rows(logits).cpu().numpy())

    def encode_rows(self, logits: "Tensor") -> "Tensor":
        """Encode on the device without reading values on the host: (B, K) -> uint8 (B, n), the input to `pack`.

        A row is a mode 0 record followed by the float32 logits. If mode 0 is too coarse, the first byte is
        `TOO_COARSE`.
        """
        import torch

        values = logits.detach().float().contiguous()
        assert values.shape[1:] == (self.num_classes,), (values.shape, self.num_classes)
        raw = values.view(torch.uint8)
        if self.num_classes == 0 or self.kl_limit == 0:
            return raw
        largest = values.amax(1, keepdim=True)
        distance = largest.double() - values  # (B, K) float64, >= 0
        step = (distance.amax(1, keepdim=True) / 255).float()
        codes = torch.round(distance / torch.where(step > 0, step, 1.0).double()).clamp(0, 255).to(torch.uint8)
        limit = float(np.finfo(np.float32).max)
        decoded = (largest.double() - codes.double() * step.double()).clamp(-limit, limit).float()
        log_p, log_q = (part.double().log_softmax(1) for part in (values, decoded))
        p = log_p.exp()
        divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1, keepdim=True)
        close = (divergence <= KL_LIMIT) & values.isfinite().all(1, keepdim=True)
        mode = torch.where(close, INT8, TOO_COARSE).to(torch.uint8)
        return torch.cat((mode, largest.view(torch.uint8), step.view(torch.uint8), codes, raw), dim=1)

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """uint8 (B, n) from `encode_rows` -> one record per row. Raises `UserError` if rows contain NaN or infinity."""
        if self.num_classes == 0:
            return [b""] * len(rows)
        start = 0 if self.kl_limit == 0 else self.record_bytes
        coarse = np.arange(len(rows)) if start == 0 else np.flatnonzero(rows[:, 0] != INT8)
        raw = np.ascontiguousarray(rows[coarse, start:]).view("<f4")
        bad = coarse[~np.isfinite(raw).all(1)].tolist()
        if bad:
            raise not_finite(bad, len(rows))
        records = [row[:start].tobytes() for row in rows]
        for row, record in zip(coarse.tolist(), self._pack_floats(raw), strict=True):
            records[row] = record
        return records

    def _pack_floats(self, values: NDArray[np.float32]) -> list[bytes]:
        """Mode 1 records for finite float32 logits (n, K), or mode 2 records if mode 1 is too coarse."""
        if len(values) == 0:
            return []
        largest = values.max(1)
        halves = np.minimum(largest[:, None].astype(np.float64) - values, FLOAT16_MAX).astype("<f2")
        close = np.zeros(len(values), bool)
        if self.kl_limit:
            close = kl_divergence(values, _from_halves(largest, halves)) <= self.kl_limit
        return [
            struct.pack("<Bf", FLOAT16 if small else FLOAT32, peak) + (half if small else row).tobytes()
            for small, peak, half, row in zip(close, largest, halves, values.astype("<f4"), strict=True)
        ]

    def decode(self, record: bytes | memoryview) -> NDArray[np.float32]:
        """Decode a record to float32 (K,). Raises `UserError` for modes, lengths or values that the codec never
        writes."""
        if self.num_classes == 0 and not record:
            return np.zeros(0, np.float32)
        sizes = {INT8: 9 + self.num_classes, FLOAT16: 5 + 2 * self.num_classes, FLOAT32: 5 + 4 * self.num_classes}
        sizes = sizes if self.num_classes else {}
        mode = record[0] if record else -1
        if len(record) != sizes.get(mode):
            raise UserError(
                "a record's logits are damaged",
                got=f"mode {mode}, {counted(len(record), 'byte')}" if record else "0 bytes",
                expected=" or ".join(f"mode {one} with {size:,} bytes" for one, size in sizes.items()) or "0 bytes",
                where="logits of a record",
                fix="run `scalekd verify` on the cache",
            )
        if mode == FLOAT32:
            return np.frombuffer(record, "<f4", offset=5).astype(np.float32)
        if mode == FLOAT16:
            largest = np.frombuffer(record, "<f4", 1, 1)
            halves = np.frombuffer(record, "<f2", offset=5)[None]
            _require_finite(float(largest[0]) + float(halves.max()))
            return _from_halves(largest, halves).reshape(-1)
        largest, step = np.frombuffer(record, "<f4", 1, 1), np.frombuffer(record, "<f4", 1, 5)
        _require_finite(float(largest[0]) + float(step[0]))
        codes = np.frombuffer(record, np.uint8, offset=9)[None]
        return _from_codes(largest, step, codes).reshape(-1)


def _require_finite(stored: float) -> None:
    """Raise `UserError` if a stored value, or a sum of stored values, is NaN or Inf, which `_subtract` would clip."""
    if not math.isfinite(stored):
        raise UserError(
            "a record's logits are damaged",
            got="NaN or Inf",
            expected="finite values",
            where="logits of a record",
            fix="run `scalekd verify` on the cache",
        )


def _from_codes(largest: NDArray[Any], step: NDArray[Any], codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(B,), (B,), (B, K) -> (B, K)."""
    distance = codes.astype(np.float64) * step.astype(np.float64)[:, None]
    return _subtract(largest, distance)


def _from_halves(largest: NDArray[Any], halves: NDArray[Any]) -> NDArray[np.float32]:
    """(B,), (B, K) -> (B, K)."""
    return _subtract(largest, halves.astype(np.float64))


def _subtract(largest: NDArray[Any], distance: NDArray[np.float64]) -> NDArray[np.float32]:
    limit = float(np.finfo(np.float32).max)
    return np.clip(largest.astype(np.float64)[:, None] - distance, -limit, limit).astype(np.float32)


LogitCodec = DenseLogits | TopKLogits | RecomputedLogits
LOGIT_CODECS: dict[str, type[LogitCodec]] = {kind.id: kind for kind in (DenseLogits, TopKLogits, RecomputedLogits)}


def logit_codec_from_config(config: Mapping[str, Any]) -> LogitCodec:
    """Build a cache's logit codec from its manifest. Raises `UserError` if this version cannot read it."""
    kind = LOGIT_CODECS.get(config.get("id", ""))
    codec = kind.from_config(config) if kind is not None else None
    if codec is None or codec.get_config() != config:
        raise UserError(
            "the cache was written with a logit codec that this version cannot read",
            got=dict(config),
            expected=codec.get_config() if codec is not None else f"id {join_or([*LOGIT_CODECS])}",
            where="logit_codec in the manifest",
            fix="use the version of scalekd-cache that wrote the cache, or rebuild the cache",
        )
    return codec
