"""Measures the similarity between decoded and original features.

In: original and decoded maps (B, C, H, W). Out: two cosines per view (summarized in `store/fidelity_summary.py`).
Invariant: cosines are computed in float64, so that values near 1 are accurate.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Fidelity(NamedTuple):
    """Cosine similarities for each view in a batch."""

    cosine: "Tensor"
    """(B,) float32: cosine between original and decoded tokens, averaged over positions."""
    cosine_mean_removed: "Tensor"
    """(B,) float32: the same after removing each channel's spatial mean from both maps, as the loss does."""


def fidelity(original: "Tensor", decoded: "Tensor") -> Fidelity:
    """Cosines between two maps (B, C, H, W). The cosine of a token that is zero in both maps is 1."""
    assert original.shape == decoded.shape, (original.shape, decoded.shape)
    original, decoded = original.double(), decoded.double()
    centered = [maps - maps.mean(dim=(2, 3), keepdim=True) for maps in (original, decoded)]
    return Fidelity(_token_cosine(original, decoded), _token_cosine(*centered))


def _token_cosine(a: "Tensor", b: "Tensor") -> "Tensor":
    """Mean token cosine between two maps (B, C, H, W): (B,) float32."""
    norms = (a.square().sum(1) * b.square().sum(1)).sqrt()
    cosine = (a * b).sum(1) / norms.clamp_min(1e-300)
    both_zero = (a.abs().amax(1) == 0) & (b.abs().amax(1) == 0)
    return cosine.masked_fill(both_zero, 1.0).mean(dim=(1, 2)).float()
