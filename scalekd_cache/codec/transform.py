"""The transform coder: decorrelate, quantise everything with one step, keep what is left of the entropy.

In and out: see `base.py`; fitted to a teacher by `transform_fit.fit`. A row: seed uint32, step doublings uint8, three
zero bytes, norms float16 (2, H*W), then the two planes of symbols of `blocks.py`.
Invariant: a token's error is white noise whose energy is `noise` times that of the token after mean removal, and with
dither its mean over seeds is zero, so that gradients are unbiased.

A token is divided by its stored mean-removed norm (the norm the loss divides by), the fitted mean is subtracted, the
grid goes through a 2-D DCT, the channels through a Karhunen-Loeve basis (one for the DC coefficient, one for all
others), and each coefficient through one uniform quantiser. Reverse water-filling falls out: a component below the
step costs next to nothing. Encoding runs on whole numbers carried in float64, where every sum is exact: symbols do not
depend on device, batch or thread count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec.base import FeatureCodec, FeatureMap, as_bytes, feature_norms, fresh
from scalekd_cache.codec.blocks import BlockPacker, Segment, fits, join_symbols, split_symbols
from scalekd_cache.codec.dither import dither, dither_table
from scalekd_cache.errors import UserError

HEAD = 8
"""Bytes before the norms."""
FINE, BASIS = 2.0**18, 2.0**20
"""Fixed-point steps a unit: of normalised values, and of basis vectors."""
GUARD = 2.0**-6
"""A token is divided by its mean-removed norm, but by no less than this part of its whole norm."""
MAX_TOKENS = 1024
"""Larger grids would overflow the exact sums."""
MAX_DOUBLINGS = 40


class TransformState(NamedTuple):
    """What a fit finds out about a teacher; travels in the cache as a safetensors file."""

    mean: Tensor
    """(C,) float64: mean normalised token, a multiple of 1 / FINE."""
    basis_dc: Tensor
    """(C, C) float64: columns are components of the spatial means, multiples of 1 / BASIS."""
    basis_ac: Tensor
    """(C, C) float64: the same of all other spatial frequencies."""
    order: Tensor
    """(T * C,) int64: coefficients (frequency * C + component) by falling variance."""
    segments: Tensor
    """(S, 2) int64: coefficients and symbols a byte of each class, in `order`."""


class TransformCodec(FeatureCodec):
    """See the module's text. Rows are for the device; records (`pack`) are what is stored."""

    id = "transform"
    dithered = True

    def __init__(
        self,
        shape: tuple[int, int, int],
        state: TransformState,
        *,
        noise: float,
        state_sha256: str,
        mean_bytes: int = 0,
    ) -> None:
        self.state, self.noise, self.state_sha256, self.mean_bytes = state, noise, state_sha256, mean_bytes
        channels, height, width = shape
        check_state(state, shape, noise)
        self.segments = [Segment(*row) for row in state.segments.tolist()]
        self._packer = BlockPacker(self.segments, HEAD + 4 * height * width)
        super().__init__(shape)
        self.bytes_per_view = self._packer.row_bytes
        self.step = math.sqrt(12 * noise / channels)
        inverse = torch.empty_like(state.order)
        inverse[state.order] = torch.arange(len(state.order))
        offset, factor = dither_table(len(state.order))
        self._encoding = {
            "mean": state.mean, "dc": state.basis_dc, "ac": state.basis_ac, "order": state.order,
            "rows": fixed_point(dct_matrix(height), BASIS), "columns": fixed_point(dct_matrix(width), BASIS),
            "offset": offset, "factor": factor,
        }  # fmt: skip
        self._decoding = {name: self._encoding[name].float() for name in ("mean", "dc", "ac", "rows", "columns")}
        self._decoding |= {"inverse": inverse, "offset": offset, "factor": factor}

    def get_config(self) -> dict[str, Any]:
        """The state itself is a file, of which the config holds the sha256."""
        own = {"noise": self.noise, "state_sha256": self.state_sha256, "mean_bytes": self.mean_bytes}
        return {**super().get_config(), **own}

    @property
    def record_bytes(self) -> int:
        """Mean bytes of a record of the views it was fitted to."""
        return self.mean_bytes

    def encode(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:
        """As `FeatureCodec.encode`; `seeds` (B,) int64 below 2^32 choose the dither of each row (needed here)."""
        assert seeds is not None, "a dithered codec needs the seeds of its rows"
        halves, seeds = self.checked_norms(features).to(torch.float16), seeds.to(features.device)
        coefficients = self.analyse(features, token_scales(halves.float()))
        table = _on(self._encoding, features.device)
        noise = dither(seeds, table["offset"], table["factor"]).double()
        symbols, doublings = self._quantise(coefficients[:, table["order"]], noise)
        head = torch.zeros(len(features), HEAD, dtype=torch.uint8, device=features.device)
        head[:, :4] = as_bytes(seeds[:, None])[:, :4]
        head[:, 4] = doublings.to(torch.uint8)
        return torch.cat((head, as_bytes(halves.flatten(1)), split_symbols(symbols.long(), self.segments)), dim=1)

    def analyse(self, features: Tensor, scales: Tensor) -> Tensor:
        """(B, C, H, W) float32 and token scales (B, T) -> coefficients (B, T * C) float64, exact on a fixed grid."""
        table, grid = _on(self._encoding, features.device), self.spectrum(features, scales)
        return torch.cat((grid[:, :1] @ table["dc"], grid[:, 1:] @ table["ac"]), dim=1).flatten(1)

    def spectrum(self, features: Tensor, scales: Tensor) -> Tensor:
        """The DCT of normalised tokens less their mean, (B, T, C) float64: [:, 0] is the DC coefficient."""
        table, batch = _on(self._encoding, features.device), len(features)
        tokens = features.permute(0, 2, 3, 1).reshape(batch, self.tokens, self.channels).double()
        unit = torch.where(scales > 0, scales, 1.0).double()[..., None]
        values = fixed_point(tokens / unit, FINE) - table["mean"]
        values = torch.where(scales[..., None] > 0, values, 0.0)  # a token of norm 0 is decoded as 0
        grid = values.reshape(batch, self.height, self.width * self.channels)
        grid = fixed_point(torch.matmul(table["rows"], grid), FINE).view(batch * self.height, self.width, self.channels)
        return fixed_point(torch.matmul(table["columns"], grid), FINE).view(batch, self.tokens, self.channels)

    def _quantise(self, values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients in `order` and dither (B, n) float64 -> symbols and how often the step was doubled (B,)."""
        doublings = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        while True:
            symbols = torch.round(values / (self.step * 2.0**doublings)[:, None] + noise)
            fit = fits(symbols, self.segments)
            if bool(fit.all()):
                return symbols, doublings
            doublings += (~fit).long()
            assert int(doublings.max()) <= MAX_DOUBLINGS, "normalised tokens are bounded"

    def decode(self, codes: Tensor) -> FeatureMap:
        """uint8 (B, bytes_per_view) -> map and norms, float32, on the device of `codes`."""
        assert codes.dtype == torch.uint8, codes.dtype
        assert codes.shape[1:] == (self.bytes_per_view,), (codes.shape, self.bytes_per_view)
        table, batch, norm_bytes = _on(self._decoding, codes.device), len(codes), 4 * self.tokens
        seeds = fresh(codes[:, :4]).view(torch.int32).long().view(batch) & (2**32 - 1)
        steps = self.step * 2.0 ** codes[:, 4].float()
        norms = fresh(codes[:, HEAD : HEAD + norm_bytes]).view(torch.float16).float()
        symbols = join_symbols(codes[:, HEAD + norm_bytes :], self.segments)
        symbols.sub_(dither(seeds, table["offset"], table["factor"])).mul_(steps[:, None])
        with torch.autocast(codes.device.type, enabled=False):
            values = self._synthesise(symbols[:, table["inverse"]], table)
        values.mul_(token_scales(norms.view(batch, 2, -1))[..., None])
        features = values.view(batch, self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return FeatureMap(features, norms.view(batch, 2, self.height, self.width))

    def _synthesise(self, coefficients: Tensor, table: Mapping[str, Tensor]) -> Tensor:
        """(B, T * C) -> normalised tokens (B, T, C), float32."""
        batch = len(coefficients)
        grid = coefficients.view(batch, self.tokens, self.channels)
        grid = torch.cat((grid[:, :1] @ table["dc"].T, grid[:, 1:] @ table["ac"].T), dim=1)
        grid = torch.matmul(table["columns"].T, grid.view(batch * self.height, self.width, self.channels))
        grid = torch.matmul(table["rows"].T, grid.view(batch, self.height, self.width * self.channels))
        return grid.view(batch, self.tokens, self.channels) + table["mean"]

    def error_bound(self, features: Tensor) -> Tensor:
        """Half a step of every coefficient, through the synthesis; a token whose float16 norm is 0 becomes 0.

        A worst case over all coefficients at once: the error to expect is `expected_error`, a good hundred times less.
        """
        scales = token_scales(feature_norms(features).to(torch.float16).float())
        codes = self.encode(features, torch.zeros(len(features), dtype=torch.int64))
        steps = self.step * 2.0 ** codes[:, 4].double()
        rows, columns = (self._encoding[name].abs().sum(0) for name in ("rows", "columns"))
        spatial = torch.outer(rows, columns).flatten()
        channel = torch.maximum(self._encoding["dc"].abs().sum(1), self._encoding["ac"].abs().sum(1))
        energy = features.double().square().sum((1, 2, 3)).sqrt()  # float32 sums and rounded bases: 2^-12 of the map
        bound = torch.einsum("b,bt,t,c->bct", steps / 2, scales.double(), spatial, channel) * (1 + 2.0**-12)
        bound += (energy[:, None] * 2.0**-12)[..., None]
        lost = features.abs().double().flatten(2)
        bound = torch.where((scales > 0)[:, None], bound, lost)
        return bound.view(features.shape).float()

    def expected_error(self, codes: Tensor) -> Tensor:
        """Energy of each token's error over that of the token's divisor, mean over seeds: rows -> (B,) float32."""
        return self.noise * 4.0 ** codes[:, 4].float()

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        return self._packer.pack(rows)

    def unpack(self, records: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
        return self._packer.unpack(records)


def token_scales(norms: Tensor) -> Tensor:
    """Stored norms (B, 2, ...) float32 -> what each token is divided by, (B, T)."""
    norms = norms.flatten(2)
    return torch.maximum(norms[:, 1], norms[:, 0] * GUARD)


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II, (size, size) float64: rows are frequencies."""
    frequency, place = torch.arange(size).double()[:, None], torch.arange(size).double() + 0.5
    matrix = torch.cos(math.pi * place * frequency / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def fixed_point(values: Tensor, fine: float) -> Tensor:
    """float64 -> the nearest multiples of 1 / fine."""
    return torch.round(values * fine) / fine


def check_state(state: TransformState, shape: tuple[int, int, int], noise: float) -> None:
    """UserError unless the state belongs to maps of this shape."""
    channels, count = shape[0], math.prod(shape)
    orders = state.order.sort().values
    segments = state.segments
    found = (
        state.mean.shape == (channels,) and state.basis_dc.shape == state.basis_ac.shape == (channels, channels),
        orders.shape == (count,) and bool((orders == torch.arange(count)).all()),
        segments.dim() == 2 and segments.shape[1] == 2 and int(segments[:, 0].sum()) == count,
        bool((segments[:, 0] > 0).all()) and set(segments[:, 1].tolist()) <= {1, 2, 3, 5},
        all(bool(part.isfinite().all()) for part in state[:3]),
        math.isfinite(noise) and noise > 0 and shape[1] * shape[2] <= MAX_TOKENS,
    )
    if not all(found):
        raise UserError(
            "the codec's state does not belong to these features",
            got=f"checks {[number for number, good in enumerate(found) if not good]} failed, noise {noise}",
            expected=f"mean, bases, order and segments for maps {shape}, at most {MAX_TOKENS} positions, noise > 0",
            where="codec.safetensors",
            fix="restore the file from the cache",
        )


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same dictionary, its tensors moved to `device` once."""
    for name, value in tensors.items():
        if value.device != device:
            tensors[name] = value.to(device)
    return tensors
