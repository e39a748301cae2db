"""Fits the transform codec to a teacher.

In: a few hundred maps (N, C, H, W) from the cache's first views. Out: a `TransformCodec`.
Invariant: encoded bytes depend only on the stored state, not on how it was fitted. Two fits may differ in the last bit,
for example with different LAPACK libraries. All readers and writers of a cache therefore share a single state file,
identified by its sha256.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalekd_cache.codec import Shape
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.dither import dither, dither_table
from scalekd_cache.codec.transform import (
    BASIS,
    COARSE,
    FINE,
    TransformCodec,
    fixed_point,
    token_scales,
)
from scalekd_cache.codec.transform_state import TransformState, state_bytes
from scalekd_cache.codec.variance_classes import variance_classes
from scalekd_cache.errors import UserError, counted

PRESETS = {"transform": 0.0018, "transform-economy": 0.06, "transform-rotated": 0.0018}
"""Noise level for each preset. The mean-removed cosine is 1 / sqrt(1 + noise)."""
ALWAYS_ROTATED = "transform-rotated"
"""The preset that always rotates channels. It takes fewer bytes and is meant for readers with a GPU."""
ROTATED = 512
"""Maximum number of channels that the other presets rotate. On one core, decoding a view takes 3 ms with a 1536 x 1536
matrix and 0.15 ms with factors."""
BATCH = 64
FACTORS = 64
"""Factors per frequency. More factors take longer and save few bytes (docs/LOG.md)."""
FACTOR_STEP = 3.0
ROUNDS = 6
SWEEPS = 3
LOW_PART = 6
"""The low band consists of the sixth of the frequencies with the most energy."""
ORDER_VIEWS = 128
"""Number of views used to choose the order and the classes. The bases are fitted to all views."""


def preset_name(config: Mapping[str, Any]) -> str:
    """A codec config's preset and noise as text, in the form of stage-1 options."""
    always = config["shape"][0] > ROTATED and config["channels"] == "rotated"
    names = {noise: name for name, noise in PRESETS.items() if (name == ALWAYS_ROTATED) == always}
    own = ALWAYS_ROTATED if always else "transform"
    return names.get(config["noise"], f"{own}, noise {config['noise']:g}")


class Moments(NamedTuple):
    """The map statistics needed for a fit, which do not depend on the noise level."""

    start: TransformState
    """Mean, frequencies and bands and, for rotated channels, the bases."""
    seconds: list[Tensor]
    """For predicted channels, the channels' second moments in each band, float64 (C, C)."""


def fit(features: Tensor, noise: float, *, rotated: bool | None = None) -> TransformCodec:
    """Fit a codec to maps.

    Args:
        features: (N, C, H, W) float32, on the CPU. At least 2 views are required; 500 are enough.
        noise: a token's error energy relative to the energy of the mean-removed token. The mean-removed cosine is then
            1 / sqrt(1 + noise).
        rotated: whether channels are rotated or predicted (see `transform`). None: rotated if there are at most 512.

    Raises:
        UserError: there are too few views, or values cannot be stored.
    """
    return codec_for_noise(fit_moments(features, rotated=rotated), features, noise)


def fit_moments(features: Tensor, *, rotated: bool | None = None) -> Moments:
    """Compute the statistics that do not depend on the noise level. Raises as `fit` does."""
    if len(features) < 2 or not bool(features.isfinite().all()):
        raise UserError(
            "cannot calibrate the codec on these features",
            got=counted(len(features), "view") + (" with NaN or Inf" if len(features) >= 2 else ""),
            expected="at least 2 views with only finite values",
        )
    shape = (int(features.shape[1]), int(features.shape[2]), int(features.shape[3]))
    rotated = shape[0] <= ROTATED if rotated is None else rotated
    plain = _codec(shape, _start(shape)._replace(mean=_mean(features)), 1.0)
    grids = torch.cat([plain.spectrum(batch, _scales(batch)).float() for batch in torch.split(features, BATCH)])
    energy = grids.square().mean((0, 2))
    energy[0] = torch.inf
    frequencies, low = energy.sort(descending=True, stable=True).indices, (plain.tokens - 1) // LOW_PART
    first = (1, low) if rotated else (1 + low,)  # a separate product for the DC coefficient costs more than it saves
    bands = torch.tensor([size for size in (*first, plain.tokens - 1 - low) if size > 0])
    whole, seconds = _moments(grids[:, frequencies[1:]]), []
    for part in torch.split(frequencies, bands.tolist()):
        own, weight = _moments(grids[:, part]), len(grids) * len(part)
        prior = whole * own.trace() / whole.trace().clamp(min=1e-30)  # regularization for few samples
        seconds.append((own * weight + prior * len(own)) / (weight + len(own)))
    start = plain.state._replace(frequencies=frequencies, bands=bands)
    if not rotated:
        return Moments(start, seconds)
    basis = torch.stack([_basis(second) for second in seconds])
    return Moments(_empty_factors(start._replace(basis=basis)), [])


def codec_for_noise(moments: Moments, features: Tensor, noise: float) -> TransformCodec:
    """Build the codec for a noise level from `moments`, the statistics of `features`."""
    shape = (int(features.shape[1]), int(features.shape[2]), int(features.shape[3]))
    state = _sized(_predicting(moments, noise) if moments.seconds else moments.start, shape)
    codec = _codec(shape, _ordered(_codec(shape, state, noise), features), noise)
    few = features[:: -(-len(features) // BATCH)].contiguous()
    records = codec.pack(codec.encode(few, torch.arange(len(few))).numpy())
    codec.mean_bytes = -(-sum(map(len, records)) // len(records))
    return codec


def _start(shape: Shape) -> TransformState:
    """The identity state with one band."""
    channels, tokens = shape[0], shape[1] * shape[2]
    eye = torch.eye(channels, dtype=torch.float64)[None]
    state = TransformState(
        mean=eye[0, 0] * 0,
        frequencies=torch.arange(tokens),
        bands=torch.tensor([tokens]),
        basis=eye,
        analysis=eye,
        loadings=eye,
        units=eye,
        order=eye,
        segments=eye,
    )
    return _sized(_empty_factors(state), shape)


def _empty_factors(state: TransformState) -> TransformState:
    """The state without factors."""
    nothing = state.mean.new_zeros(len(state.bands), 0, len(state.mean))
    return state._replace(analysis=nothing, loadings=nothing.long(), units=torch.ones_like(nothing[:, :1].sum(1)))


def _sized(state: TransformState, shape: Shape) -> TransformState:
    """The state with a trivial order and a single class."""
    tokens, components, factors = shape[1] * shape[2], state.basis.shape[1], state.loadings.shape[1]
    count = tokens * (components + factors + (0 if components else shape[0]))
    return state._replace(order=torch.arange(tokens * (components + factors)), segments=torch.tensor([[count, 16]]))


def _predicting(moments: Moments, noise: float) -> TransformState:
    """The state with factors for each band."""
    channels = len(moments.start.mean)
    step, count = (12 * noise / channels) ** 0.5, min(FACTORS, channels // 24 * 8)
    parts = [_factors(second, count, step) for second in moments.seconds]
    analysis, loadings, units = (torch.stack(found) for found in zip(*parts, strict=True))
    nothing = analysis.new_zeros(len(parts), 0, channels)
    return moments.start._replace(basis=nothing, analysis=analysis, loadings=loadings.long(), units=units)


def _moments(values: Tensor) -> Tensor:
    """Second moments, float64 (C, C), of the channels in (N, t, C)."""
    flat = values.flatten(0, 1)
    return (flat.T @ flat).double() / max(1, len(flat))


def _basis(second: Tensor) -> Tensor:
    """Principal components (rows) of second moments (C, C), by decreasing variance, with positive largest entries."""
    vectors = torch.linalg.eigh(second).eigenvectors.flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return fixed_point(vectors * signs, BASIS).T


def _factors(second: Tensor, count: int, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """Factor analysis of second moments M (C, C): returns analysis (R, C), loadings (R, C) and units (C).

    Fits M = V V' + diag(own) by alternating two steps: scale M to unit specific variance, and take its largest
    components.
    A factor's step is FACTOR_STEP times its posterior standard deviation given the channels.
    """
    model = second + torch.eye(len(second), dtype=torch.float64) * step**2 / 12
    own, loads, vectors = model.diagonal() * 0.3, model[:, :count], None
    for _ in range(ROUNDS):
        root = own.sqrt()
        values, vectors = _leading(model / root[:, None] / root, count, vectors)
        loads = root[:, None] * vectors * (values - 1).clamp(min=0).sqrt()
        own = torch.maximum(model.diagonal() - loads.square().sum(1), model.diagonal().clamp(max=step**2 / 12) * 0.9)
    weighted = loads / own[:, None]
    precision = loads.T @ weighted + torch.eye(count, dtype=torch.float64)
    open_part = torch.linalg.inv(precision)
    steps = FACTOR_STEP * open_part.diagonal().sqrt()
    analysis = fixed_point(open_part @ weighted.T / steps[:, None], COARSE)
    matrix = (loads * steps / step).T
    units = 2.0 ** torch.ceil(torch.log2(matrix.abs().amax(0).clamp(min=2.0**-20) / 127))
    return analysis, torch.round(matrix / units), units


def _leading(matrix: Tensor, count: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues (count,) and eigenvectors (C, count), computed by iteration from `start` if given."""
    if start is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:count], vectors.flip(1)[:, :count]
    for _ in range(SWEEPS):
        start = torch.linalg.qr(matrix @ start).Q
    values, turn = torch.linalg.eigh(start.T @ matrix @ start)
    return values.flip(0), (start @ turn).flip(1)


def _codec(shape: Shape, state: TransformState, noise: float) -> TransformCodec:
    return TransformCodec(shape, state, noise=noise, state_sha256=hashlib.sha256(state_bytes(state)).hexdigest())


def _scales(features: Tensor) -> Tensor:
    return token_scales(feature_norms(features).to(torch.float16).float())


def _mean(features: Tensor) -> Tensor:
    """Mean normalized token, (C,) float64."""
    total, count = torch.zeros(features.shape[1], dtype=torch.float64), 0
    for batch in torch.split(features, BATCH):
        scales = _scales(batch)
        unit = torch.where(scales > 0, scales, torch.inf).double()
        total += (batch.flatten(2).double() / unit[:, None]).sum((0, 2))
        count += int((scales > 0).sum())
    return fixed_point(total / max(1, count), FINE)


def _ordered(codec: TransformCodec, features: Tensor) -> TransformState:
    """Sort the components, or residuals and factors, by variance and split them into classes."""
    few = features[:: -(-len(features) // ORDER_VIEWS)]
    state, count = codec.state, codec.tokens * codec.channels
    found = [codec.analyze(batch, _scales(batch)) for batch in torch.split(few, BATCH)]
    factors, values = (torch.cat(part) for part in zip(*found, strict=True))
    seeds = torch.arange(len(few)) * 0x9E3779B1 % 2**32
    noise = dither(seeds, dither_table(count), count)
    if not codec.factors:
        order = values.square().sum(0).sort(descending=True, stable=True).indices
        segments = variance_classes(torch.round(values[:, order] + noise).long())
        return state._replace(order=order, segments=torch.tensor(segments))
    values = values.view(len(few), codec.tokens, codec.channels)
    energy = torch.split(values.square().mean((0, 2)), state.bands.tolist())
    starts = [0, *state.bands.cumsum(0).tolist()]
    places = torch.cat(
        [part.sort(descending=True, stable=True).indices + start for part, start in zip(energy, starts, strict=False)]
    )
    factors = factors.view(len(few), codec.tokens, -1)[:, places].flatten(1)
    order = factors.square().sum(0).sort(descending=True, stable=True).indices
    symbols = torch.round(values[:, places].flatten(1) + noise).long()
    segments = [*variance_classes(factors[:, order].long()), *variance_classes(symbols)]
    return state._replace(frequencies=state.frequencies[places], order=order, segments=torch.tensor(segments))
