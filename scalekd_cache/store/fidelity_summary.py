"""Summaries of fidelity metrics (decoded features compared with the teacher's) over many views.

In: per-view metrics. Out: mean and 1st percentile for a unit, and for a cache, from its units.
Invariant: merging weights each summary by its number of views.
"""

from collections.abc import Iterable, Mapping

import numpy as np

Summary = dict[str, dict[str, float]]
POOLED_COSINE = "pooled_cosine"
"""The metric for pooled embeddings: cosine between the original and the stored embedding."""


def summarize(values: Mapping[str, Iterable[float]]) -> Summary:
    """Summarize per-view values by metric: {metric: {mean, p1, count}}, where p1 is the 1st percentile."""
    summary = {}
    for name, figures in values.items():
        array = np.asarray(list(figures), dtype=np.float64)
        if array.size:
            p1 = float(np.percentile(array, 1))
            summary[name] = {"mean": float(array.mean()), "p1": p1, "count": int(array.size)}
    return summary


def merge_summaries(summaries: Iterable[Summary]) -> Summary:
    """Merge the summaries of multiple units: means weighted by count, the lowest p1, and the highest p99 if present."""
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
