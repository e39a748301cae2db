"""The transform codec decorrelates maps, quantizes all coefficients with one step size and entropy-codes the symbols.

In and out: see `base.py`; `transform_fit.fit` fits the codec to a teacher. A row consists of a uint32 seed, the number
of step doublings as uint8, three zero bytes, float16 norms (2, H*W) and the symbols (`blocks.py`).
Invariant: a token's error is white noise with `noise` times the energy of the mean-removed token. With dither, its mean
over seeds is zero, so gradients are unbiased.

Each token is divided by its stored mean-removed norm (the norm that the loss divides by), and the fitted mean is
subtracted. A 2-D DCT transforms the grid, and its frequencies are grouped into bands with similar energy. The channels
in each band are then coded in one of two modes:
- *rotated*: a Karhunen-Loeve transform is followed by a dithered uniform quantizer for all coefficients. This
  approximates reverse water-filling: components below the step size cost almost nothing. To decode, a reader multiplies
  by a C x C matrix.
- *predicted*: a few integer factors below 128 describe what the channels have in common. An int8 matrix predicts all
  channels from them, and the dithered quantizer codes the residual. The mean of the decoded values equals the original
  for any prediction. This mode takes more bytes for the same error, but CPUs decode wide maps much faster.

Encoding uses integers stored in float64, where every sum is exact. Symbols therefore do not depend on the device, the
batch size or the number of threads.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.codec import Shape
from scalekd_cache.codec.base import EncodedRows, FeatureCodec, FeatureMap, as_bytes, contiguous_copy, feature_norms
from scalekd_cache.codec.blocks import BlockPacker, Segment, fits, pack_symbols, unpack_symbols
from scalekd_cache.codec.dither import dither, dither_table, subtract_dither
from scalekd_cache.codec.transform_state import TransformState, check_state, read_state
from scalekd_cache.devices import autocast
from scalekd_cache.errors import UserError

if TYPE_CHECKING:
    from scalekd_cache.store.path import StoredPath

HEAD = 8
"""Number of bytes in a row before the norms."""
FINE, BASIS, COARSE = 2.0**18, 2.0**20, 2.0**10
"""Fixed-point steps per unit, for normalized values, the DCT, and the factor analysis (values and matrix)."""
GUARD = 2.0**-6
"""Lower limit for a token's divisor (its mean-removed norm), as a fraction of the token's raw norm."""
MAX_DOUBLINGS = 40
LARGEST_FACTOR = 127
CPU_VIEWS = 8
"""Views per decoding pass on a CPU: few enough for its caches, enough to amortize call overhead."""
DEAD_ZONE = 0.45
"""Dead zone of the factor quantizer: magnitudes below 1 - DEAD_ZONE become 0, because zeros are cheaper to code."""


class TransformCodec(FeatureCodec):
    """Transform codec (see the module docstring)."""

    id = "transform"
    dithered = True

    def __init__(
        self,
        shape: Shape,
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
        """JSON config, which references the separate file with the fitted state by its sha256."""
        own = {
            "channels": "predicted" if self.factors else "rotated",
            "noise": self.noise,
            "state_sha256": self.state_sha256,
            "mean_bytes": self.mean_bytes,
        }
        return {**super().get_config(), **own}

    @property
    def record_bytes(self) -> int:
        """Mean bytes per record over the calibration views."""
        return self.mean_bytes

    def encode_rows(self, features: Tensor, seeds: Tensor | None = None) -> EncodedRows:
        """Like `FeatureCodec.encode_rows`, but `seeds`, int64 (B,) below 2^32, are required and select the dither.

        Rows whose symbols fit only with a doubled step are left to `encode`.
        """
        return self._encode(features, seeds, double_steps=False)

    def encode_hard_rows(self, features: Tensor, seeds: Tensor | None) -> Tensor:
        """Double a row's step until its symbols fit, which is checked on the host."""
        self.require_storable(features)
        return self._encode(features, seeds, double_steps=True).codes

    def _encode(self, features: Tensor, seeds: Tensor | None, *, double_steps: bool) -> EncodedRows:
        assert seeds is not None, "a dithered codec needs one seed per row"
        norms, storable = self.norms_and_storable(features)
        halves, seeds = norms.to(torch.float16), seeds.to(features.device)
        factors, values = self.analyze(features, token_scales(halves.float()))
        noise = dither(seeds, _on(self._encoding, features.device)["dither"], self.tokens * self.channels).double()
        doublings = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        symbols, fit = self._quantize(factors, values, noise, doublings)
        while double_steps and not bool(fit.all()):
            doublings += (~fit).long()
            assert int(doublings.max()) <= MAX_DOUBLINGS, "normalized tokens are bounded"
            symbols, fit = self._quantize(factors, values, noise, doublings)
        head = torch.zeros(len(features), HEAD, dtype=torch.uint8, device=features.device)
        head[:, :4] = as_bytes(seeds[:, None])[:, :4]
        head[:, 4] = doublings.to(torch.uint8)
        codes = torch.cat((head, as_bytes(halves.flatten(1)), pack_symbols(symbols.long(), self.segments)), dim=1)
        return EncodedRows(codes, storable & fit)

    def analyze(self, features: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 maps (B, C, H, W) and token scales (B, T) -> factors (B, T * R) and values to dither (B, T * C).

        The results are float64, in quantizer steps, and exact on a fixed-point grid. Components and factors follow
        `order`; residuals are sorted by band.
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
        """DCT of the normalized tokens minus the fitted mean: float64 (B, T, C) with the DC coefficient at [:, 0]."""
        table, batch = _on(self._encoding, features.device), len(features)
        tokens = features.permute(0, 2, 3, 1).reshape(batch, self.tokens, self.channels).double()
        unit = torch.where(scales > 0, scales, 1.0).double()[..., None]
        values = fixed_point(tokens / unit, FINE) - table["mean"]
        values = torch.where(scales[..., None] > 0, values, 0.0)  # a token with norm 0 decodes to 0
        grid = values.reshape(batch, self.height, self.width * self.channels)
        grid = fixed_point(torch.matmul(table["rows"], grid), FINE).view(batch * self.height, self.width, self.channels)
        return fixed_point(torch.matmul(table["columns"], grid), FINE).view(batch, self.tokens, self.channels)

    def _quantize(self, factors: Tensor, values: Tensor, noise: Tensor, doublings: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 values and step doublings (B,) -> symbols (B, T * R + T * C), and whether each row fits (B,)."""
        rounded = torch.round(values / (2.0**doublings)[:, None] + noise)
        symbols = torch.cat((factors, rounded), dim=1)
        return symbols, fits(symbols, self.segments)

    def decode(self, codes: Tensor) -> FeatureMap:
        """Decode uint8 rows (B, bytes_per_view) to float32 maps and norms on the device of `codes`."""
        assert codes.dtype == torch.uint8, codes.dtype
        assert codes.shape[1:] == (self.bytes_per_view,), (codes.shape, self.bytes_per_view)
        table, batch, split = _on(self._decoding, codes.device), len(codes), HEAD + 4 * self.tokens
        norms = (
            contiguous_copy(codes[:, HEAD:split]).view(torch.float16).float().view(batch, 2, self.height, self.width)
        )
        scales = token_scales(norms)[..., None] * self.step
        values = torch.empty(batch, self.tokens, self.channels, device=codes.device)
        part = CPU_VIEWS if codes.device.type == "cpu" else max(1, batch)
        # Reuse three buffers, because new memory costs one page fault per 4 KB.
        symbols = values.new_empty(min(part, batch), self.factors + self.tokens * self.channels)
        spare = torch.empty_like(values[:part])
        with autocast(codes.device, torch.float32):
            for rows, scale, into in zip(*(torch.split(all_, part) for all_ in (codes, scales, values)), strict=True):
                joined, other = symbols[: len(rows)], spare[: len(rows)]
                unpack_symbols(rows[:, split:], self.segments, joined)
                subtract_dither(joined[:, self.factors :], _seeds(rows), table["dither"])
                grid = joined[:, self.factors :].view(into.shape)
                if (
                    codes.device.type != "cpu" or rows[:, 4].any()
                ):  # rarely true on a CPU; skipped on a GPU, where the check would synchronize
                    grid.mul_(2.0 ** rows[:, 4, None, None].float())
                self._channels(joined[:, : self.factors], grid, table, other, into)
                self._positions(table, scale, other, into)
        features = values.view(batch, self.height, self.width, self.channels).permute(0, 3, 1, 2)
        return FeatureMap(features, norms)

    def _channels(
        self, factors: Tensor, grid: Tensor, table: Mapping[str, Tensor], into: Tensor, other: Tensor
    ) -> None:
        """Write the tokens' DCT to `into`, band by band, from factors and dithered values (B, T, C) in steps."""
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
        """Write the inverse DCT of `bands` (B, T, C), multiplied by `scales`, to `into`. `bands` is overwritten."""
        batch, height, width = len(into), self.height, self.width
        bands[:, 0] += table["dc"]
        torch.index_select(bands, 1, table["natural"], out=into)
        rows, columns = table["rows"].T.expand(batch, -1, -1), table["columns"].T * scales.view(-1, width, 1)
        torch.bmm(rows, into.view(batch, height, -1), out=bands.view(batch, height, -1))
        torch.bmm(columns, bands.view(batch * height, width, -1), out=into.view(batch * height, width, -1))

    def error_bound(self, features: Tensor) -> Tensor:
        """A half-step error in every coefficient, propagated through the synthesis.

        Tokens whose float16 norm is 0 decode to 0. The bound assumes the worst case for all coefficients at once; the
        expected error (`expected_error`) is over 100 times smaller.
        """
        scales = token_scales(feature_norms(features).to(torch.float16).float())
        codes = self.encode(features, torch.zeros(len(features), dtype=torch.int64))
        steps = self.step * 2.0 ** codes[:, 4].double()
        table = _on(self._encoding, features.device)
        rows, columns = (table[name].abs().sum(0) for name in ("rows", "columns"))
        spatial = torch.outer(rows, columns).flatten()
        channel = table["basis"].abs().sum(1).amax(0) if not self.factors else features.new_ones(self.channels)
        energy = features.double().square().sum((1, 2, 3)).sqrt()  # rounding adds at most 2^-12 of this
        bound = torch.einsum("b,bt,t,c->bct", steps / 2, scales.double(), spatial, channel.double())
        bound = bound * (1 + 2.0**-12) + energy[:, None, None] * 2.0**-12
        lost = features.abs().double().flatten(2)
        bound = torch.where((scales > 0)[:, None], bound, lost)
        return bound.view(features.shape).float()

    def expected_error(self, codes: Tensor) -> Tensor:
        """A token's expected error energy divided by its squared divisor: float32 (B,), one value per row."""
        return self.noise * 4.0 ** codes[:, 4].float()

    def pack(self, rows: NDArray[np.uint8]) -> list[bytes]:
        return self._packer.pack(rows)

    def unpack(self, records: Sequence[bytes | memoryview]) -> NDArray[np.uint8]:
        return self._packer.unpack(records)


def _seeds(rows: Tensor) -> Tensor:
    """The seeds stored in rows, int64 (B,)."""
    return contiguous_copy(rows[:, :4]).view(torch.int32).long().view(len(rows)) & (2**32 - 1)


def token_scales(norms: Tensor) -> Tensor:
    """Each token's divisor (B, T), computed from stored float32 norms (B, 2, ...)."""
    norms = norms.flatten(2)
    return torch.maximum(norms[:, 1], norms[:, 0] * GUARD)


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II matrix, float64 (size, size), with one frequency per row."""
    frequency, place = torch.arange(size).double()[:, None], torch.arange(size).double() + 0.5
    matrix = torch.cos(math.pi * place * frequency / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def fixed_point(values: Tensor, fine: float) -> Tensor:
    """Round float64 values to the nearest multiple of 1 / fine."""
    return torch.round(values * fine) / fine


def integer_matmul(factors: Tensor, loadings: Tensor, into: Tensor) -> None:
    """Multiply float32 integers (n, R) by int8 (R, C) into float32 (n, C), exactly if magnitudes are at most 127.

    CPUs multiply int8 four times as fast as float32. On other devices, sums below 2^24 are exact in float32. They are
    also exact in TF32, because the factors have 8 bits.
    """
    if factors.device.type == "cpu":
        into.copy_(torch._int_mm(factors.to(torch.int8), loadings))
    else:
        torch.matmul(factors.float(), loadings.float(), out=into)


def load_transform(config: Mapping[str, Any], shape: Shape, folder: "StoredPath | None") -> TransformCodec:
    """Build the codec from a config, with its state from `folder`/codec.safetensors. Raises as `read_state` does."""
    sha256 = config.get("state_sha256")
    state = read_state(folder, sha256)
    noise = config.get("noise")
    if not isinstance(noise, float):
        raise UserError(
            "invalid codec config", got=f"noise: {noise}", expected="noise: a float", where="codec in the manifest"
        )
    mean_bytes = config.get("mean_bytes")
    if type(mean_bytes) is not int or not 0 <= mean_bytes < 1 << 31:
        raise UserError(
            "invalid codec config",
            got=f"mean_bytes: {mean_bytes}",
            expected="mean_bytes: an integer from 0 to 2^31-1",
            where="codec in the manifest",
        )
    return TransformCodec(shape, state, noise=noise, state_sha256=str(sha256), mean_bytes=mean_bytes)


def _on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move the tensors to `device` in the dict itself, so that later calls need no copy."""
    for name, value in tensors.items():
        if value.device != device:
            tensors[name] = value.to(device)
    return tensors
