"""The transform codec's fitted state, and its file.

In: tensors, or the file codec.safetensors. Out: a `TransformState`. Invariant: a loaded state has the sha256 from the
codec config and matches the codec's map shape.
"""

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scalekd_cache.codec import Shape
from scalekd_cache.codec.blocks import LARGEST
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import read_file

if TYPE_CHECKING:
    from scalekd_cache.store.path import StoredPath

FILE = "codec.safetensors"
MAX_STATE_BYTES = 1 << 30
STORED = {
    "mean": torch.float32,
    "frequencies": torch.int32,
    "bands": torch.int32,
    "basis": torch.float32,
    "analysis": torch.float32,
    "loadings": torch.int8,
    "units": torch.float32,
    "order": torch.int32,
    "segments": torch.int32,
}
"""Names and dtypes of the tensors in the file, in the order of `TransformState`."""
MAX_TOKENS = 1024
"""Larger grids would overflow the exact sums."""
MAX_FACTORS = 512
MAX_ANALYSIS = 2.0**22
"""Upper limit for row sums in `analysis`, which keeps factors exact: 2^22 x 2^11 (values) x 2^20 (grids) = 2^53."""


class TransformState(NamedTuple):
    """Fitted state for one teacher, stored in the cache as a safetensors file.

    G, P and R are the numbers of bands, components and factors. For rotated channels, P = C and R = 0. For predicted
    channels, P = 0.
    """

    mean: Tensor
    """(C,) float64: mean normalized token, in multiples of 1 / FINE."""
    frequencies: Tensor
    """(T,) int64: frequencies (row-major in the DCT grid) in record order: 0 first, then band by band."""
    bands: Tensor
    """(G,) int64: number of frequencies in each band."""
    basis: Tensor
    """(G, P, C) float64: components as rows, in multiples of 1 / BASIS."""
    analysis: Tensor
    """(G, R, C) float64: the matrix that writers use to compute the factors, in multiples of 1 / COARSE."""
    loadings: Tensor
    """(G, R, C) int64 from -127 to 127: each factor's contribution to each channel, in `units`."""
    units: Tensor
    """(G, C) float64: units of `loadings` in quantizer steps, as powers of two."""
    order: Tensor
    """(T * (P + R),) int64: components or factors by decreasing variance: index in `frequencies` * (P + R) + number."""
    segments: Tensor
    """(S, 2) int64: the number of symbols and bits per symbol for each class. Classes cover the components in `order`,
    or the factors and then the residuals."""


def state_bytes(state: TransformState) -> bytes:
    """Contents of codec.safetensors. Equal states give equal bytes."""
    tensors = {name: value.to(STORED[name]).contiguous() for name, value in zip(state._fields, state, strict=True)}
    data: bytes = save(tensors)
    return data


def read_state(folder: "StoredPath | None", sha256: object) -> TransformState:
    """Read the state from `folder`/codec.safetensors.

    Raises:
        UserError: the folder or file is missing, the sha256 is wrong, or the file is damaged.
    """
    if folder is None:
        raise UserError(
            "the codec state is missing",
            got="no cache folder",
            expected=f"a cache folder with {FILE}",
            where="codec config",
        )
    path = folder / FILE
    data = read_file(path, "the codec state", MAX_STATE_BYTES, fix="restore the file from a copy of the cache")
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise UserError(
            "the codec state does not match the cache",
            got=f"sha256 {digest}",
            expected=f"sha256 {sha256}",
            where=path,
            fix="restore the file from a copy of the cache",
        )
    try:
        tensors = load(data)
        return TransformState(
            *(
                tensors[name].double() if STORED[name] is torch.float32 else tensors[name].long()
                for name in TransformState._fields
            )
        )
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError("cannot read the codec state", got=error, expected="safetensors", where=path) from error


def check_state(state: TransformState, shape: Shape, noise: float) -> None:
    """Raise `UserError` unless the state matches maps of this shape."""
    channels, tokens, segments = shape[0], shape[1] * shape[2], state.segments
    bands, factors = len(state.bands), state.loadings.shape[1] if state.loadings.dim() == 3 else -1
    turned = state.basis.shape[1] if state.basis.dim() == 3 else -1
    sorted_, rest = (turned, 0) if turned else (factors, channels)
    found = (
        state.mean.shape == (channels,) and state.units.shape == (bands, channels),
        state.basis.shape == (bands, turned, channels) and (turned, factors > 0) in ((channels, False), (0, True)),
        state.loadings.shape == state.analysis.shape == (bands, factors, channels) and factors <= MAX_FACTORS,
        _is_order(state.frequencies, tokens) and int(state.frequencies[0]) == 0,
        _is_order(state.order, tokens * sorted_),
        state.bands.dim() == 1 and bool((state.bands > 0).all()) and int(state.bands.sum()) == tokens,
        segments.dim() == 2 and segments.shape[1] == 2 and int(segments[:, 0].sum()) == tokens * (sorted_ + rest),
        bool((segments[:, 0] > 0).all()) and set(segments[:, 1].tolist()) <= set(LARGEST),
        all(bool(part.isfinite().all()) for part in (state.mean, state.basis, state.analysis, state.units)),
        bool((state.loadings.abs() <= 127).all()) and bool((state.analysis.abs().sum(2) < MAX_ANALYSIS).all()),
        math.isfinite(noise) and noise > 0 and shape[1] * shape[2] <= MAX_TOKENS,
    )
    if not all(found):
        raise UserError(
            "the codec state is damaged or does not match the shape of the features",
            got=f"noise {noise}; failed checks, for a bug report: {[i for i, good in enumerate(found) if not good]}",
            expected=f"a state for maps of shape {shape}, with at most {MAX_TOKENS} positions and noise > 0",
            where="codec.safetensors",
            fix="if this codec is from a cache, restore codec.safetensors and the manifest from a copy of the cache",
        )


def _is_order(values: Tensor, count: int) -> bool:
    return values.shape == (count,) and torch.equal(values.sort().values, torch.arange(count))
