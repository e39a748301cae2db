"""The transform coder: decorrelate, quantize everything with one step, keep what is left of the entropy.

In and out: see `base.py`; fitted to a teacher by `transform_fit.fit`. A row: seed uint32, step doublings uint8, three
zero bytes, norms float16 (2, H*W), then the symbols of `blocks.py`.
Invariant: a token's error is white noise whose energy is `noise` times that of the token after mean removal, and with
dither its mean over seeds is zero, so that gradients are unbiased.

A token is divided by its stored mean-removed norm (the norm the loss divides by), the fitted mean is subtracted, and
the grid goes through a 2-D DCT, whose frequencies fall into bands of like energy. Then the channels of a band:
- *rotated*: a Karhunen-Loeve basis, and each coefficient through one uniform quantizer, dithered. Reverse
  water-filling falls out: a component below the step costs next to nothing. A reader multiplies by a C x C matrix.
- *predicted*: what the channels have in common goes into a few factors (whole numbers below 128), from which a matrix
  of bytes predicts all channels; the difference goes through the quantizer, dithered. Whatever the prediction is, the
  mean of what is decoded is the original. More bytes for the same error, but a CPU decodes wide maps much faster.
Encoding runs on whole numbers carried in float64, where every sum is exact: symbols do not depend on device, batch or
thread count.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec.base import FeatureCodec, FeatureMap, as_bytes, contiguous_copy, feature_norms
from scalekd_cache.codec.blocks import BlockPacker, Segment, fits, pack_symbols, unpack_symbols
from scalekd_cache.codec.dither import dither, dither_table, subtract_dither
from scalekd_cache.codec.transform_state import TransformState, check_state, read_state
from scalekd_cache.errors import UserError

if TYPE_CHECKING:
    from scalekd_cache.store.path import StoredPath

HEAD = 8
"""Bytes before the norms."""
FINE, BASIS, COARSE = 2.0**18, 2.0**20, 2.0**10
"""Fixed-point steps a unit: of normalized values, of the DCT, and of values and matrix where factors are found."""
GUARD = 2.0**-6
"""A token is divided by its mean-removed norm, but by no less than this part of its whole norm."""
MAX_DOUBLINGS = 40
LARGEST_FACTOR = 127
CPU_VIEWS = 8
"""Views decoded together on a CPU: few enough for its caches, enough to share the cost of a call."""
DEAD_ZONE = 0.45
"""Factors round up from 1 - DEAD_ZONE: the few bits that a 0 saves are worth more than the nearest value."""


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
        self.factors = 0 if len(state.basis[0]) else len(state.order)
        self._spans = list(itertools.pairwise([0, *state.bands.cumsum(0).tolist()]))
        table = dither_table(self.tokens * channels)
        self._encoding = {
            "mean": state.mean,
            "frequencies": state.frequencies,
            "basis": state.basis,
            "analysis": state.analysis,
            "loadings": state.loadings.double(),
            "units": state.units,
            "order": state.order,
            "dither": table,
            "rows": fixed_point(dct_matrix(height), BASIS),
            "columns": fixed_point(dct_matrix(width), BASIS),
        }
        same = ("basis", "units", "rows", "columns", "dither")
        self._decoding = {name: self._encoding[name].float() for name in same}
        self._decoding |= {
            "loadings": state.loadings.to(torch.int8),
            "dc": (state.mean * math.sqrt(self.tokens) / self.step).float(),
            "inverse": state.order.argsort(),
            "natural": state.frequencies.argsort(),
        }

    def get_config(self) -> dict[str, Any]:
        """The state itself is a file, of which the config holds the sha256."""
        own = {
            "channels": "predicted" if self.factors else "rotated",
            "noise": self.noise,
            "state_sha256": self.state_sha256,
            "mean_bytes": self.mean_bytes,
        }
        return {**super().get_config(), **own}

    @property
    def record_bytes(self) -> int:
        """Mean bytes of a record of the views it was fitted to."""
        return self.mean_bytes

    def encode(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:
        """As `FeatureCodec.encode`; `seeds` (B,) int64 below 2^32 choose the dither of each row (needed here)."""
        assert seeds is not None, "a dithered codec needs the seeds of its rows"
        halves, seeds = self.checked_norms(features).to(torch.float16), seeds.to(features.device)
        factors, values = self.analyze(features, token_scales(halves.float()))
        noise = dither(seeds, _on(self._encoding, features.device)["dither"], self.tokens * self.channels).double()
        symbols, doublings = self._quantize(factors, values, noise)
        head = torch.zeros(len(features), HEAD, dtype=torch.uint8, device=features.device)
        head[:, :4] = as_bytes(seeds[:, None])[:, :4]
        head[:, 4] = doublings.to(torch.uint8)
        return torch.cat((head, as_bytes(halves.flatten(1)), pack_symbols(symbols.long(), self.segments)), dim=1)

    def analyze(self, features: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32, token scales (B, T) -> factors (B, T * R), and what is dithered (B, T * C), in steps.

        float64, exact on a fixed grid. Components, or factors, are in `order`; differences band by band.
        """
        table, batch = _on(self._encoding, features.device), len(features)
        grid = self.spectrum(features, scales)[:, table["frequencies"]]
        if not self.factors:
            parts = [grid[:, slice(*span)] @ basis.T for span, basis in zip(self._spans, table["basis"], strict=True)]
            return grid.new_empty(batch, 0), torch.cat(parts, dim=1).flatten(1)[:, table["order"]] / self.step
        factors, predicted = [], []
        for band, (start, stop) in enumerate(self._spans):
            found = fixed_point(grid[:, start:stop], COARSE) @ table["analysis"][band].T
            found = (found.sign() * (found.abs() + DEAD_ZONE).floor()).clamp(-LARGEST_FACTOR, LARGEST_FACTOR)
            factors.append(found)
            predicted.append(found @ table["loadings"][band] * table["units"][band])
        residuals = grid / self.step - torch.cat(predicted, dim=1)
        return torch.cat(factors, dim=1).reshape(batch, self.factors)[:, table["order"]], residuals.flatten(1)

    def spectrum(self, features: Tensor, scales: Tensor) -> Tensor:
        """The DCT of normalized tokens less their mean, (B, T, C) float64: [:, 0] is the DC coefficient."""
        table, batch = _on(self._encoding, features.device), len(features)
        tokens = features.permute(0, 2, 3, 1).reshape(batch, self.tokens, self.channels).double()
        unit = torch.where(scales > 0, scales, 1.0).double()[..., None]
        values = fixed_point(tokens / unit, FINE) - table["mean"]
        values = torch.where(scales[..., None] > 0, values, 0.0)  # a token of norm 0 is decoded as 0
        grid = values.reshape(batch, self.height, self.width * self.channels)
        grid = fixed_point(torch.matmul(table["rows"], grid), FINE).view(batch * self.height, self.width, self.channels)
        return fixed_point(torch.matmul(table["columns"], grid), FINE).view(batch, self.tokens, self.channels)

    def _quantize(self, factors: Tensor, values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 -> symbols (B, T * R + T * C) and how often the step was doubled (B,)."""
        doublings = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        while True:
            rounded = torch.round(values / (2.0**doublings)[:, None] + noise)
            symbols = torch.cat((factors, rounded), dim=1)
            fit = fits(symbols, self.segments)
            if bool(fit.all()):
                return symbols, doublings
            doublings += (~fit).long()
            assert int(doublings.max()) <= MAX_DOUBLINGS, "normalized tokens are bounded"

    def decode(self, codes: Tensor) -> FeatureMap:
        """uint8 (B, bytes_per_view) -> map and norms, float32, on the device of `codes`."""
        assert codes.dtype == torch.uint8, codes.dtype
        assert codes.shape[1:] == (self.bytes_per_view,), (codes.shape, self.bytes_per_view)
        table, batch, split = _on(self._decoding, codes.device), len(codes), HEAD + 4 * self.tokens
        norms = (
            contiguous_copy(codes[:, HEAD:split]).view(torch.float16).float().view(batch, 2, self.height, self.width)
        )
        scales = token_scales(norms)[..., None] * self.step
        values = torch.empty(batch, self.tokens, self.channels, device=codes.device)
        part = CPU_VIEWS if codes.device.type == "cpu" else max(1, batch)
        # Fresh memory costs a page fault every 4 KB: three pieces are used again and again.
        symbols = values.new_empty(min(part, batch), self.factors + self.tokens * self.channels)
        spare = torch.empty_like(values[:part])
        with torch.autocast(codes.device.type, enabled=False):
            for rows, scale, into in zip(*(torch.split(all_, part) for all_ in (codes, scales, values)), strict=True):
                joined, other = symbols[: len(rows)], spare[: len(rows)]
                unpack_symbols(rows[:, split:], self.segments, joined)
                subtract_dither(joined[:, self.factors :], _seeds(rows), table["dither"])
                grid = joined[:, self.factors :].view(into.shape)
                if codes.device.type != "cpu" or rows[:, 4].any():  # hardly ever; a GPU would have to be waited for
                    grid.mul_(2.0 ** rows[:, 4, None, None].float())
                self._channels(joined[:, : self.factors], grid, table, other, into)
                self._positions(table, scale, other, into)
        features = values.view(batch, self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return FeatureMap(features, norms)

    def _channels(
        self, factors: Tensor, grid: Tensor, table: Mapping[str, Tensor], into: Tensor, other: Tensor
    ) -> None:
        """Factors and what was dithered, in steps, (B, T, C) -> in `into` the DCT of tokens, band by band."""
        batch = len(into)
        if not self.factors:
            torch.index_select(grid.view(batch, -1), 1, table["inverse"], out=other.view(batch, -1))
            for span, basis in zip(self._spans, table["basis"], strict=True):
                into[:, slice(*span)] = other[:, slice(*span)] @ basis
            return
        factors = factors.index_select(1, table["inverse"]).view(batch, self.tokens, -1)
        for band, (start, stop) in enumerate(self._spans):
            predicted = other.view(batch * self.tokens, -1)[: batch * (stop - start)]
            integer_matmul(factors[:, start:stop].flatten(0, 1), table["loadings"][band], predicted)
            predicted, difference = predicted.view(batch, stop - start, -1), grid[:, start:stop]
            torch.addcmul(difference, predicted, table["units"][band], out=into[:, start:stop])

    def _positions(self, table: Mapping[str, Tensor], scales: Tensor, bands: Tensor, into: Tensor) -> None:
        """The DCT in steps, band by band, in `bands` (B, T, C), overwritten -> in `into` tokens times `scales`."""
        batch, height, width = len(into), self.height, self.width
        bands[:, 0] += table["dc"]
        torch.index_select(bands, 1, table["natural"], out=into)
        rows, columns = table["rows"].T.expand(batch, -1, -1), table["columns"].T * scales.view(-1, width, 1)
        torch.bmm(rows, into.view(batch, height, -1), out=bands.view(batch, height, -1))
        torch.bmm(columns, bands.view(batch * height, width, -1), out=into.view(batch * height, width, -1))

    def error_bound(self, features: Tensor) -> Tensor:
        """Half a step of every coefficient, through the synthesis; a token whose float16 norm is 0 becomes 0.

        A worst case over all coefficients at once: the error to expect is `expected_error`, a good hundred times less.
        """
        scales = token_scales(feature_norms(features).to(torch.float16).float())
        codes = self.encode(features, torch.zeros(len(features), dtype=torch.int64))
        steps = self.step * 2.0 ** codes[:, 4].double()
        rows, columns = (self._encoding[name].abs().sum(0) for name in ("rows", "columns"))
        spatial = torch.outer(rows, columns).flatten()
        channel = self._encoding["basis"].abs().sum(1).amax(0) if not self.factors else torch.ones(self.channels)
        energy = features.double().square().sum((1, 2, 3)).sqrt()  # float32 sums, rounded matrices: 2^-12 of the map
        bound = torch.einsum("b,bt,t,c->bct", steps / 2, scales.double(), spatial, channel.double())
        bound = bound * (1 + 2.0**-12) + energy[:, None, None] * 2.0**-12
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


def _seeds(rows: Tensor) -> Tensor:
    """The seeds in the heads of rows, (B,) int64."""
    return contiguous_copy(rows[:, :4]).view(torch.int32).long().view(len(rows)) & (2**32 - 1)


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


def integer_matmul(factors: Tensor, loadings: Tensor, into: Tensor) -> None:
    """(n, R) float32 whole numbers and (R, C) int8, all at most 127 -> into (n, C) float32, exact on every device.

    Processors multiply bytes four times as fast as floats; elsewhere sums below 2^24 are exact in float32 (and in
    TF32, whose products of 8-bit numbers are).
    """
    if factors.device.type == "cpu":
        into.copy_(torch._int_mm(factors.to(torch.int8), loadings))
    else:
        torch.matmul(factors.float(), loadings.float(), out=into)


def load_transform(
    config: Mapping[str, Any], shape: tuple[int, int, int], folder: "StoredPath | None"
) -> TransformCodec:
    """The coder of a config, with its state from `folder`/codec.safetensors; errors are those of `read_state`."""
    sha256 = config.get("state_sha256")
    state = read_state(folder, sha256)
    noise = config.get("noise")
    if not isinstance(noise, float):
        raise UserError("bad codec config", got=noise, expected="noise, a number", where="codec in the manifest")
    mean_bytes = config.get("mean_bytes")
    if type(mean_bytes) is not int or not 0 <= mean_bytes < 1 << 31:
        raise UserError("bad codec config", got=mean_bytes, expected="mean_bytes", where="codec in the manifest")
    return TransformCodec(shape, state, noise=noise, state_sha256=str(sha256), mean_bytes=mean_bytes)


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same dictionary, its tensors moved to `device` once."""
    for name, value in tensors.items():
        if value.device != device:
            tensors[name] = value.to(device)
    return tensors
