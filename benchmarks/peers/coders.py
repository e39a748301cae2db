"""Alternative coders, for one view at a time: (T, C) float32 tokens to bytes and back.

In: the tokens to which the coders are fitted. Out: one `Coder` for each. Invariant: `decode(encode(tokens))` needs only
the bytes, the shape and the fitted state; the setting of a coder, if it has one, only trades bytes for error.
Peers are imported where they are used.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA

from benchmarks.peers.environment import APART

Tokens = NDArray[np.float32]
"""(T, C) of one view."""
GRID = 7
GAUSSIAN_STEP_4_BITS = 0.3352
"""Step of the best uniform quantizer of 16 levels for a Gaussian of variance 1."""


class Coder(NamedTuple):
    """A coder of one view."""

    name: str
    encode: Callable[[Tokens, float], bytes]
    decode: Callable[[bytes, float], Tokens]
    settings: tuple[float, float] | None = None
    """Smallest and largest setting, from the smallest to the largest error; None for a coder without one."""


def compressed(values: NDArray[Any]) -> bytes:
    """zstd, level 19, over the bytes of the values, with the most significant bytes in a separate block."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    return zstandard.compress(planes.tobytes(), 19)


def decompressed(data: bytes, dtype: type, shape: tuple[int, ...]) -> NDArray[Any]:
    planes = np.frombuffer(zstandard.decompress(data), np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(shape)


def float16_zstd(fitted: Tokens) -> Coder:
    """Lossless except for rounding to float16."""
    shape = fitted.shape[1:]
    return Coder(
        "float16 + zstd",
        lambda tokens, _: compressed(tokens.T.astype(np.float16)),
        lambda data, _: decompressed(data, np.float16, shape[::-1]).T.astype(np.float32),
    )


def zfp(fitted: Tokens) -> Coder:
    """zfp with a bound on the absolute error, over channels x height x width."""
    import numcodecs  # noqa: F401  # before zfpy, next to which it cannot be imported

    sys.path.append(str(APART))
    import zfpy

    shape, spread = fitted.shape[1:], float(fitted.std())
    return Coder(
        "zfp",
        lambda tokens, tolerance: zfpy.compress_numpy(as_map(tokens), tolerance=tolerance),
        lambda data, _: zfpy.decompress_numpy(data).reshape(shape[::-1]).T,
        (1e-3 * spread, 20 * spread),
    )


def sz3(fitted: Tokens) -> Coder:
    """SZ3 with a bound on the absolute error, over tokens x channels."""
    shape, spread = fitted.shape[1:], float(fitted.std())
    return Coder("SZ3", _sz3_encode, lambda data, _: _sz3_decode(data, shape), (1e-3 * spread, 20 * spread))


def _sz3_encode(values: Tokens, bound: float) -> bytes:
    import pysz

    config = pysz.szConfig(values.shape)
    config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, bound
    return pysz.sz.compress(np.ascontiguousarray(values), config)[0].tobytes()


def _sz3_decode(data: bytes, shape: tuple[int, int]) -> Tokens:
    import pysz

    values: Tokens = pysz.sz.decompress(np.frombuffer(data, np.uint8), np.float32, shape)[0]
    return values


def as_map(tokens: Tokens) -> Tokens:
    """(T, C) to (C, H, W)."""
    return np.ascontiguousarray(tokens.T).reshape(-1, GRID, GRID)


def picture_coder(
    name: str,
    fitted: Tokens,
    levels: int,
    settings: tuple[float, float],
    encode: Callable[[NDArray[Any], float], bytes],
    decode: Callable[[bytes], NDArray[Any]],
) -> Coder:
    """A still image of tokens x channels with integer values: each channel in its fitted range."""
    low, high = fitted.min((0, 1)), fitted.max((0, 1))
    scale = np.maximum(high - low, 1e-6) / (levels - 1)
    dtype = np.uint8 if levels == 256 else np.uint16

    def to_bytes(tokens: Tokens, setting: float) -> bytes:
        return encode(np.clip(np.round((tokens - low) / scale), 0, levels - 1).astype(dtype), setting)

    return Coder(name, to_bytes, lambda data, _: decode(data).astype(np.float32) * scale + low, settings)


def jpeg_xl(fitted: Tokens) -> Coder:
    """JPEG XL of an 8-bit image, by distance."""
    import imagecodecs

    return picture_coder(
        "JPEG XL of uint8", fitted, 256, (0.01, 25.0),
        lambda picture, distance: imagecodecs.jpegxl_encode(picture, distance=distance, numthreads=1),
        lambda data: imagecodecs.jpegxl_decode(data, numthreads=1),
    )  # fmt: skip


def jpeg_2000(fitted: Tokens) -> Coder:
    """JPEG 2000 of a 16-bit image, by its peak signal-to-noise ratio in dB."""
    import imagecodecs

    return picture_coder(
        "JPEG 2000", fitted, 65_536, (1.0, 70.0),
        lambda picture, loss: imagecodecs.jpeg2k_encode(picture, level=80 - loss, codecformat="J2K", reversible=False,
                                                        numthreads=1),
        lambda data: imagecodecs.jpeg2k_decode(data, numthreads=1),
    )  # fmt: skip


def pca(components: int) -> Callable[[Tokens], Coder]:
    """The first components of the tokens, as float16."""

    def fit(fitted: Tokens) -> Coder:
        model = fitted_pca(fitted, components)
        return Coder(
            f"PCA-{components}, float16",
            lambda tokens, _: ((tokens - model.mean_) @ model.components_.T).astype(np.float16).tobytes(),
            lambda data, _: (
                np.frombuffer(data, np.float16).astype(np.float32).reshape(-1, components) @ model.components_
                + model.mean_
            ),
        )

    return fit


def fitted_pca(fitted: Tokens, components: int) -> PCA:
    return PCA(components, svd_solver="covariance_eigh").fit(fitted.reshape(-1, fitted.shape[-1]))


def pca_step_zstd(fitted: Tokens) -> Coder:
    """All components, one quantization step for all, zstd: a simple form of our transform."""
    shape, model = fitted.shape[1:], fitted_pca(fitted, fitted.shape[-1])

    def encode(tokens: Tokens, step: float) -> bytes:
        codes = np.round((tokens - model.mean_) @ model.components_.T / step).T
        narrow = bool(np.abs(codes).max() < 128)
        return bytes([narrow]) + compressed(codes.astype(np.int8 if narrow else np.int16))

    def decode(data: bytes, step: float) -> Tokens:
        codes = decompressed(data[1:], np.int8 if data[0] else np.int16, shape[::-1]).T
        return codes.astype(np.float32) * np.float32(step) @ model.components_ + model.mean_

    spread = float(fitted.std())
    return Coder("PCA, one step, zstd-19", encode, decode, (1e-3 * spread, 20 * spread))


def norms_pca_sz3(fitted: Tokens) -> Coder:
    """Tokens divided by their mean-removed norm (stored as float16), PCA, SZ3: our codec built from libraries."""
    shape = fitted.shape[1:]
    count = 2 * shape[0]
    model = fitted_pca(fitted / token_norms(fitted), fitted.shape[-1])

    def encode(tokens: Tokens, bound: float) -> bytes:
        norms = token_norms(tokens).astype(np.float16)
        values = (tokens / norms.astype(np.float32) - model.mean_) @ model.components_.T
        return norms.tobytes() + _sz3_encode(values.astype(np.float32), bound)

    def decode(data: bytes, _: float) -> Tokens:
        norms = np.frombuffer(data[:count], np.float16).astype(np.float32)[:, None]
        return (_sz3_decode(data[count:], shape) @ model.components_ + model.mean_) * norms

    return Coder("token norms, PCA, SZ3", encode, decode, (1e-4, 1.0))


def token_norms(tokens: Tokens) -> Tokens:
    """(..., T, 1): norm of each token without the view's mean."""
    norms: Tokens = np.linalg.norm(tokens - tokens.mean(-2, keepdims=True), axis=-1, keepdims=True)
    return np.maximum(norms, 1e-6)


def product_quantization(parts: int) -> Callable[[Tokens], Coder]:
    """Product quantization: `parts` codes of 8 bits per token."""

    def fit(fitted: Tokens) -> Coder:
        flat = fitted.reshape(-1, parts, fitted.shape[-1] // parts)
        means = MiniBatchKMeans(256, random_state=0, n_init=1, batch_size=4096, max_iter=20)
        books = np.stack([means.fit(flat[:, part]).cluster_centers_ for part in range(parts)])
        lengths, places = np.square(books).sum(-1), np.arange(parts)

        def encode(tokens: Tokens, _: float) -> bytes:
            pieces = tokens.reshape(-1, parts, books.shape[-1])
            distances = lengths - 2 * np.einsum("tpd,pkd->tpk", pieces, books)
            return distances.argmin(-1).astype(np.uint8).tobytes()

        def decode(data: bytes, _: float) -> Tokens:
            codes = np.frombuffer(data, np.uint8).reshape(-1, parts)
            return books[places, codes].reshape(len(codes), -1).astype(np.float32)

        return Coder(f"product quantization {parts} x 8 bits", encode, decode)

    return fit


def rotated_4_bits(fitted: Tokens) -> Coder:
    """A random rotation, one float16 scale per token and 4 bits per value, as for the weights of language models."""
    channels = fitted.shape[-1]
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((channels, channels)))[0].astype(np.float32)

    def encode(tokens: Tokens, _: float) -> bytes:
        steps = (GAUSSIAN_STEP_4_BITS * np.sqrt(np.square(tokens).mean(1, keepdims=True))).astype(np.float16)
        codes = np.clip(np.floor(tokens @ rotation / steps.astype(np.float32)) + 8, 0, 15).astype(np.uint8)
        return steps.tobytes() + (codes[:, ::2] | codes[:, 1::2] << 4).tobytes()

    def decode(data: bytes, _: float) -> Tokens:
        count = 2 * len(data) // (channels + 4)
        steps = np.frombuffer(data[: 2 * count], np.float16).astype(np.float32)[:, None]
        pairs = np.frombuffer(data[2 * count :], np.uint8).reshape(count, -1)
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(count, channels)
        return ((codes.astype(np.float32) - 7.5) * steps) @ rotation.T

    return Coder("random rotation, 4 bits", encode, decode)


CODERS: tuple[Callable[[Tokens], Coder], ...] = (
    float16_zstd, zfp, sz3, jpeg_xl, jpeg_2000, pca_step_zstd, norms_pca_sz3, rotated_4_bits, pca(64), pca(128),
    product_quantization(40), product_quantization(80), product_quantization(160),
)  # fmt: skip
