"""The interface for feature codecs, and the token norms stored with lossy features.

In: float32 teacher maps (B, C, H, W) after the final norm. Out: fixed-size uint8 rows (B, bytes_per_view) on the same
device. Decoding inverts this. On the CPU, `pack` converts rows to stored records, and `unpack` inverts it.
Invariant: `decode(encode(x))` differs from x by at most `error_bound(x)` in every value. For every codec, decoded norms
equal the norms of x to float16 precision, so a loss that divides by them is linear in the decoded map.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec import Shape
from scalekd_cache.errors import UserError, counted

assert sys.byteorder == "little", "rows are little-endian and are viewed in place"

FLOAT16_MAX = 65504.0


class EncodedRows(NamedTuple):
    """Rows encoded without waiting for the device."""

    codes: Tensor
    """(B, bytes_per_view) uint8."""
    final: Tensor
    """(B,) bool: whether the row in `codes` is final. If not, call `encode`, which computes the row or raises an
    error."""


class FeatureMap(NamedTuple):
    """A decoded batch."""

    features: Tensor
    """(B, C, H, W) float32, channels-last in memory."""
    norms: Tensor
    """(B, 2, H, W) float32 token norms: [:, 0] raw, [:, 1] with each channel's spatial mean removed."""


def feature_norms(features: Tensor) -> Tensor:
    """L2 norms over channels at each position, raw and mean-removed: (B, C, H, W) -> float32 (B, 2, H, W)."""
    features = features.float()
    centered = features - features.mean(dim=(2, 3), keepdim=True)
    return torch.stack((features.square().sum(1).sqrt(), centered.square().sum(1).sqrt()), dim=1)


class FeatureCodec(ABC):
    """Encodes maps of a fixed shape as rows. As in numcodecs, a codec can be rebuilt from its `id` and JSON config."""

    id: ClassVar[str]
    version: ClassVar[int] = 1
    """Row layout version."""
    dithered: ClassVar[bool] = False
    """Whether `encode` needs seeds (`dither.dither_seed`)."""
    bytes_per_view: int
    """Bytes per row. Stored records can have a different length."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.channels, self.height, self.width = shape
        self.tokens = self.height * self.width

    @property
    def record_bytes(self) -> int:
        """Bytes per stored record (for a fitted codec, the mean over the calibration views)."""
        return self.bytes_per_view

    @abstractmethod
    def encode_rows(self, features: Tensor, seeds: Tensor | None = None) -> EncodedRows:
        """Like `encode`, but without reading any values on the host, so that the GPU does not wait."""

    def encode(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Encode float32 maps (B, C, H, W) on any device to uint8 rows (B, bytes_per_view) on the same device.

        `seeds` (int64 (B,)) select the dither for a `dithered` codec; other codecs ignore them.

        Raises:
            UserError: rows contain NaN, infinity or magnitudes that the codec cannot represent.
        """
        rows = self.encode_rows(features, seeds)
        return rows.codes if bool(rows.final.all()) else self.encode_hard_rows(features, seeds)

    def encode_hard_rows(self, features: Tensor, seeds: Tensor | None) -> Tensor:
        """Encode a batch with rows that `encode_rows` could not complete. By default, such rows cannot be stored."""
        self.require_storable(features)
        raise AssertionError(f"codec {self.id}: encode_rows left valid rows unencoded; override encode_hard_rows")

    @abstractmethod
    def decode(self, codes: Tensor) -> FeatureMap:
        """Decode uint8 rows (B, bytes_per_view) to float32 maps and norms on the device of `codes`."""

    @abstractmethod
    def error_bound(self, features: Tensor) -> Tensor:
        """Upper bound on |decoded - original|: (B, C, H, W) float32, one bound per value."""

    def get_config(self) -> dict[str, Any]:
        """JSON config for rebuilding this codec, which is stored in the manifest and is part of the fingerprint."""
        return {"id": self.id, "version": self.version, "shape": list(self.shape)}

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        """Convert uint8 rows (B, bytes_per_view) to stored records. By default, a record is the row itself."""
        return [row.tobytes() for row in rows]

    def unpack(self, records: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
        """Convert records to new uint8 rows (B, bytes_per_view). Raises `UserError` if a different codec wrote them."""
        wrong = [len(record) for record in records if len(record) != self.bytes_per_view]
        if wrong:
            raise damaged_record(
                f"a record with {counted(wrong[0], 'byte')}", f"{self.bytes_per_view} bytes for codec {self.id}"
            )
        return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), self.bytes_per_view).copy()

    def largest(self) -> float:
        """Largest magnitude of a value or norm that a row can represent."""
        return FLOAT16_MAX

    def norms_and_storable(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The maps' norms, float32 (B, 2, H, W), and whether each map can be stored, bool (B,)."""
        assert features.dtype == torch.float32, features.dtype
        assert features.shape[1:] == self.shape, (features.shape, self.shape)
        norms = feature_norms(features)
        worst = features.abs().amax(dim=(1, 2, 3)).maximum(norms.amax(dim=(1, 2, 3)))  # NaN propagates
        return norms, worst <= self.largest()

    def require_storable(self, features: Tensor) -> None:
        """Raise `UserError` if any map cannot be stored."""
        bad = ~self.norms_and_storable(features)[1]
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()
            raise UserError(
                "cannot store the teacher's features",
                got=f"NaN, Inf or a magnitude above {self.largest():g} in rows {rows[:16]} of a batch of {len(bad)}",
                expected=f"finite values; no value or token norm above {self.largest():g}",
                where=f"codec {self.id}",
                fix="check the teacher's weights and precision (float16 overflows; bfloat16 and float32 do not)",
            )


class RowCodec(FeatureCodec):
    """A codec without a lossless stage. A subclass sets `id` and implements `encode_values` and `decode_values`.

    A row consists of `value_bytes` of values in token-major order (H, W, C) and, if `stores_norms`, 2 x H x W float16
    norms (raw, then mean-removed).
    """

    stores_norms: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.bytes_per_view = self.value_bytes + (4 * self.tokens if self.stores_norms else 0)

    @property
    @abstractmethod
    def value_bytes(self) -> int:
        """Bytes per row before the norms."""

    @abstractmethod
    def encode_values(self, values: Tensor) -> Tensor:
        """(B, H*W, C) float32, contiguous -> uint8 (B, value_bytes)."""

    @abstractmethod
    def decode_values(self, codes: Tensor) -> Tensor:
        """Contiguous uint8 (B, value_bytes) -> new float32 (B, H*W, C)."""

    def encode_rows(self, features: Tensor, seeds: Tensor | None = None) -> EncodedRows:
        norms, storable = self.norms_and_storable(features)
        values = features.permute(0, 2, 3, 1).reshape(len(features), self.tokens, self.channels).contiguous()
        codes = self.encode_values(values)
        if self.stores_norms:
            codes = torch.cat((codes, as_bytes(norms.to(torch.float16).flatten(1))), dim=1)
        return EncodedRows(codes, storable)

    def decode(self, codes: Tensor) -> FeatureMap:
        assert codes.dtype == torch.uint8, codes.dtype
        assert codes.shape[1:] == (self.bytes_per_view,), (codes.shape, self.bytes_per_view)
        batch = len(codes)
        values = self.decode_values(contiguous_copy(codes[:, : self.value_bytes]))
        features = values.view(batch, self.height, self.width, self.channels).permute(0, 3, 1, 2)
        if not self.stores_norms:
            return FeatureMap(features, feature_norms(features))
        norms = contiguous_copy(codes[:, self.value_bytes :]).view(torch.float16).float()
        return FeatureMap(features, norms.view(batch, 2, self.height, self.width))


def channel_means(values: Tensor) -> Tensor:
    """Stored mean of each channel over positions: float32 (B, T, C) -> float16 (B, 1, C).

    In a plain ViT, the means dominate a map, but no loss uses them. Codecs therefore store them separately and spend
    their bits on the differences.
    """
    return values.mean(1, keepdim=True).to(torch.float16)


def damaged_record(got: object, expected: object) -> UserError:
    """The error for a record that this codec did not write."""
    return UserError(
        "a record's features are damaged",
        got=got,
        expected=expected,
        where="features of a record",
        fix="run `scalekd verify` on the cache",
    )


def as_bytes(values: Tensor) -> Tensor:
    """(B, n) of any dtype -> little-endian uint8 (B, n * itemsize)."""
    return values.contiguous().view(torch.uint8)


def contiguous_copy(codes: Tensor) -> Tensor:
    """A contiguous copy at offset 0, so that it can be viewed as a wider dtype even if `codes` is unaligned."""
    return codes.clone(memory_format=torch.contiguous_format)
