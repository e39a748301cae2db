"""Fits the transform coder to a teacher, and keeps the state in a file.

In: some hundred of the cache's own first maps (N, C, H, W). Out: a `TransformCodec`, and codec.safetensors.
Invariant: what decides bytes is the state as stored, not how it was found: two fits may differ in the last bit (another
LAPACK), readers and writers of one cache share one file, named by its sha256 in the codec's config.
"""

import hashlib
import heapq
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.blocks import RADIX_OF, Segment, split_symbols
from scalekd_cache.codec.dither import dither, dither_table
from scalekd_cache.codec.transform import (
    BASIS,
    FINE,
    TransformCodec,
    TransformState,
    fixed_point,
    token_scales,
)
from scalekd_cache.errors import UserError

if TYPE_CHECKING:
    from scalekd_cache.store.path import StoredPath

FILE = "codec.safetensors"
MAX_STATE_BYTES = 1 << 30
PRESETS = {"transform": 0.0018, "transform-economy": 0.06}
"""Noise by preset: a mean-removed cosine of 1 / sqrt(1 + noise)."""
BINS = 64
"""Finest classes that are looked at."""
TABLE_BITS = 8 * 80
"""About what a zstd block with its Huffman table costs."""
ESCAPE_BITS = 40
"""About what a symbol outside the range of its class costs."""
BATCH = 64
ORDER_VIEWS = 128
"""Views that decide order and classes; the bases take all."""


def fit(features: Tensor, noise: float) -> TransformCodec:
    """A coder for maps like these.

    Args:
        features: (N, C, H, W) float32, on the CPU; 500 views are enough, at least 2.
        noise: energy of a token's error over that of the token after mean removal: the mean-removed cosine comes out
            as 1 / sqrt(1 + noise).

    Raises:
        UserError: too few views, or values that cannot be stored.
    """
    return with_noise(fit_bases(features), features, noise)


def fit_bases(features: Tensor) -> TransformState:
    """What does not depend on the noise: mean and bases, by far the longest part of `fit`; its errors are those."""
    if len(features) < 2 or not bool(features.isfinite().all()):
        raise UserError("features cannot calibrate a codec", got=f"{len(features)} views", expected=">= 2, all finite")
    shape = (int(features.shape[1]), int(features.shape[2]), int(features.shape[3]))
    plain = _codec(shape, _start(shape), 1.0)
    plain = _codec(shape, plain.state._replace(mean=_mean(features)), 1.0)
    second_dc, second_ac = (torch.zeros(shape[0], shape[0], dtype=torch.float64) for _ in range(2))
    for batch in torch.split(features, BATCH):
        grid = plain.spectrum(batch, _scales(batch))
        second_dc += grid[:, 0].T @ grid[:, 0]
        second_ac += grid[:, 1:].flatten(0, 1).T @ grid[:, 1:].flatten(0, 1)
    return plain.state._replace(basis_dc=_basis(second_dc), basis_ac=_basis(second_ac))


def with_noise(state: TransformState, features: Tensor, noise: float) -> TransformCodec:
    """The coder of a noise, from bases that were fitted to the same maps."""
    shape = (int(features.shape[1]), int(features.shape[2]), int(features.shape[3]))
    codec = _codec(shape, _ordered(_codec(shape, state, noise), features), noise)
    few = features[:: -(-len(features) // BATCH)].contiguous()
    records = codec.pack(codec.encode(few, torch.arange(len(few))).numpy())
    codec.mean_bytes = -(-sum(map(len, records)) // len(records))
    return codec


def _start(shape: tuple[int, int, int]) -> TransformState:
    """The state that changes nothing."""
    identity, count = torch.eye(shape[0], dtype=torch.float64), shape[0] * shape[1] * shape[2]
    return TransformState(identity[0] * 0, identity, identity, torch.arange(count), torch.tensor([[count, 1]]))


def _codec(shape: tuple[int, int, int], state: TransformState, noise: float) -> TransformCodec:
    return TransformCodec(shape, state, noise=noise, state_sha256=hashlib.sha256(state_bytes(state)).hexdigest())


def _scales(features: Tensor) -> Tensor:
    return token_scales(feature_norms(features).to(torch.float16).float())


def _mean(features: Tensor) -> Tensor:
    """(C,) float64: mean normalised token."""
    total, count = torch.zeros(features.shape[1], dtype=torch.float64), 0
    for batch in torch.split(features, BATCH):
        scales = _scales(batch)
        unit = torch.where(scales > 0, scales, torch.inf).double()
        total += (batch.flatten(2).double() / unit[:, None]).sum((0, 2))
        count += int((scales > 0).sum())
    return fixed_point(total / max(1, count), FINE)


def _basis(second: Tensor) -> Tensor:
    """Second moments (C, C) -> components in columns by falling variance, each with its largest entry positive."""
    vectors = torch.linalg.eigh(second).eigenvectors.flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return fixed_point(vectors * signs, BASIS)


def _ordered(codec: TransformCodec, features: Tensor) -> TransformState:
    """The state with coefficients by falling variance, cut into classes."""
    few = features[:: -(-len(features) // ORDER_VIEWS)]
    coefficients = torch.cat([codec.analyse(batch, _scales(batch)) for batch in torch.split(few, BATCH)])
    order = coefficients.square().sum(0).sort(descending=True, stable=True).indices
    offset, factor = dither_table(coefficients.shape[1])
    noise = dither(torch.arange(len(few)) * 0x9E3779B1 % 2**32, offset, factor)
    segments = classes(torch.round(coefficients[:, order] / codec.step + noise).long())
    return codec.state._replace(order=order, segments=torch.tensor(segments))


def classes(symbols: Tensor) -> list[Segment]:
    """(N, n) int64 symbols in order -> classes; neighbours merge while a table costs more than it saves."""
    edges = [symbols.shape[1] * number // BINS for number in range(BINS + 1)]
    bins = [(start, stop) for start, stop in itertools.pairwise(edges) if stop > start]
    costs = {span: _cheapest(symbols[:, slice(*span)]) for span in bins}
    while len(bins) > 1:
        joined = [(first[0], second[1]) for first, second in itertools.pairwise(bins)]
        for span in joined:
            if span not in costs:
                costs[span] = _cheapest(symbols[:, slice(*span)])
        gains = [costs[a][0] + costs[b][0] - costs[ab][0] for a, b, ab in zip(bins, bins[1:], joined, strict=False)]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] + TABLE_BITS <= 0:
            break
        bins[best : best + 2] = [joined[best]]
    return [Segment(stop - start, costs[start, stop][1]) for start, stop in bins]


def _cheapest(symbols: Tensor) -> tuple[float, int]:
    """Bits a view that a class takes, and the number of symbols a byte that it takes them with."""
    return min((_bits(symbols, per_byte), per_byte) for per_byte in RADIX_OF)


def _bits(symbols: Tensor, per_byte: int) -> float:
    """Bits a view: a Huffman code over the bytes of the low plane, and the cheaper of two guesses for the high one."""
    segment = Segment(symbols.shape[1], per_byte)
    planes = split_symbols(symbols, [segment])
    low, high = planes[:, : segment.bytes], planes[:, segment.bytes :]
    escapes = ESCAPE_BITS * float((high != 0).double().sum()) / len(symbols)
    rest = min(escapes, segment.count * huffman_bits(high)) if per_byte == 1 else escapes
    return segment.bytes * huffman_bits(low) + rest


def huffman_bits(symbols: Tensor) -> float:
    """Mean length in bits of a Huffman code for these bytes: the sum of all inner nodes' weights."""
    heap = [count for count in torch.bincount(symbols.flatten().long()).tolist() if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        total += node
        heapq.heappush(heap, node)
    return total / symbols.numel()


def state_bytes(state: TransformState) -> bytes:
    """The file codec.safetensors; equal states give equal bytes."""
    tensors = {
        "mean": state.mean.float(),
        "basis_dc": state.basis_dc.float(),
        "basis_ac": state.basis_ac.float(),
        "order": state.order.int(),
        "segments": state.segments.int(),
    }
    data: bytes = save({name: value.contiguous() for name, value in tensors.items()})
    return data


def load_transform(
    config: Mapping[str, Any], shape: tuple[int, int, int], folder: "StoredPath | None"
) -> TransformCodec:
    """The coder of a config, with its state from `folder`/codec.safetensors.

    Raises:
        UserError: no folder or no file, a file that the config does not name, or a damaged one.
    """
    path = None if folder is None else folder / FILE
    if path is None or not path.is_file():
        raise UserError(
            "the codec's state is missing",
            got="no file",
            expected=FILE,
            where=folder or "codec config",
            fix="restore the file from the cache",
        )
    size = path.stat().st_size
    if size > MAX_STATE_BYTES:
        raise UserError("the codec's state is too large", got=f"{size} bytes", expected=MAX_STATE_BYTES, where=path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != config.get("state_sha256"):
        raise UserError(
            "the codec's state is not that of the cache",
            got=f"sha256 {digest}",
            expected=config.get("state_sha256"),
            where=path,
            fix="restore the file from the cache",
        )
    try:
        tensors = load(data)
        state = TransformState(
            *(tensors[name].double() for name in ("mean", "basis_dc", "basis_ac")),
            *(tensors[name].long() for name in ("order", "segments")),
        )
    except (SafetensorError, KeyError) as error:
        raise UserError("the codec's state cannot be read", got=error, expected="safetensors", where=path) from error
    noise = config.get("noise")
    if not isinstance(noise, float):
        raise UserError("bad codec config", got=noise, expected="noise, a number", where="codec in the manifest")
    mean_bytes = config.get("mean_bytes")
    if type(mean_bytes) is not int or not 0 <= mean_bytes < 1 << 31:
        raise UserError("bad codec config", got=mean_bytes, expected="mean_bytes", where="codec in the manifest")
    return TransformCodec(shape, state, noise=noise, state_sha256=digest, mean_bytes=mean_bytes)
