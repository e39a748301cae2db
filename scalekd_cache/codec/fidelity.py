"""How close decoded features are to the originals, as figures that travel with a unit and add up over units.

In: original and decoded maps (B, C, H, W). Out: cosines a view, and summaries {metric: {mean, p1, count}}.
Invariant: merging keeps means exact (weighted by count); merged percentiles are conservative: the worst unit's.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Summary = dict[str, dict[str, float]]


class Fidelity(NamedTuple):
    """Figures for every view of a batch."""

    cosine: "Tensor"
    """(B,) float32: cosine between original and decoded tokens, averaged over positions."""
    cosine_mean_removed: "Tensor"
    """(B,) float32: the same after each channel's spatial mean is removed from both maps (what the loss compares)."""


def fidelity(original: "Tensor", decoded: "Tensor") -> Fidelity:
    """Cosines between two maps (B, C, H, W); a token that is zero in both counts as equal."""
    assert original.shape == decoded.shape, (original.shape, decoded.shape)
    original, decoded = original.double(), decoded.double()
    centred = [maps - maps.mean(dim=(2, 3), keepdim=True) for maps in (original, decoded)]
    return Fidelity(_token_cosine(original, decoded), _token_cosine(*centred))


def _token_cosine(a: "Tensor", b: "Tensor") -> "Tensor":
    """(B, C, H, W) twice -> (B,) float32."""
    norms = (a.square().sum(1) * b.square().sum(1)).sqrt()
    cosine = (a * b).sum(1) / norms.clamp_min(1e-300)
    both_zero = (a.abs().amax(1) == 0) & (b.abs().amax(1) == 0)
    return cosine.masked_fill(both_zero, 1.0).mean(dim=(1, 2)).float()


def summarise(values: Mapping[str, Iterable[float]]) -> Summary:
    """Figures a view, by metric -> {metric: {mean, p1, count}}; p1 is the 1st percentile."""
    summary = {}
    for name, figures in values.items():
        array = np.asarray(list(figures), dtype=np.float64)
        if array.size:
            p1 = float(np.percentile(array, 1))
            summary[name] = {"mean": float(array.mean()), "p1": p1, "count": int(array.size)}
    return summary


def merge_summaries(summaries: Iterable[Summary]) -> Summary:
    """Summaries of several units as one: means weighted by count, the lowest p1, the highest p99 where there is one."""
    merged: Summary = {}
    for summary in summaries:
        for name, row in summary.items():
            if name not in merged:
                merged[name] = dict(row)
                continue
            into = merged[name]
            count = into["count"] + row["count"]
            into["mean"] = (into["mean"] * into["count"] + row["mean"] * row["count"]) / count
            into["count"] = count
            for percentile, worst in (("p1", min), ("p99", max)):
                if percentile in row:
                    into[percentile] = worst(into.get(percentile, row[percentile]), row[percentile])
    return merged
