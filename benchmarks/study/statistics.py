"""Paired differences and their confidence intervals, from the study's result lines.

In: lines written by `__main__.py`. Out: numbers. Invariant: two runs are compared only if student, seed and, unless
the caller compares lengths, number of steps agree; seeds that one arm lacks are ignored in the other.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

Line = dict[str, Any]


class Difference(NamedTuple):
    """Mean of paired differences with its confidence interval."""

    mean: float
    low: float
    high: float
    """Bounds of the 95% interval by Student's t; infinite for one pair."""
    pairs: int

    def inside(self, margin: float) -> bool:
        """Whether the whole interval lies within +-margin."""
        return -margin < self.low and self.high < margin


def paired(lines: Iterable[Line], arm: str, against: str, value: str = "top1", same_steps: bool = True) -> list[float]:
    """Differences arm - against for every (setting, student, seed, steps) that both have, sorted by seed.

    Arms of different lengths are compared only with `same_steps=False`.
    """
    values: dict[str, dict[tuple[Any, ...], float]] = {arm: {}, against: {}}
    for line in lines:
        if line["arm"] in values and line.get(value) is not None:
            pair = (line["seed"], line["setting"], line["student"], line["steps"] if same_steps else None)
            values[line["arm"]][pair] = float(line[value])
    return [values[arm][pair] - values[against][pair] for pair in sorted(values[arm].keys() & values[against].keys())]


def interval(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean and interval of paired differences.

    Raises:
        ValueError: no pair.
    """
    if not differences:
        raise ValueError("no pairs to compare")
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    half = student_t.ppf((1 + confidence) / 2, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def mean_and_std(lines: Iterable[Line], arm: str, value: str = "top1") -> tuple[float, float, int]:
    """Mean and standard deviation over seeds (0 for one seed), and the number of seeds."""
    values = [float(line[value]) for line in lines if line["arm"] == arm and line.get(value) is not None]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return (statistics.fmean(values) if values else math.nan), spread, len(values)


def read_lines(file: Path) -> list[Line]:
    """The complete lines of a result file; a partial last line (after a kill) is ignored."""
    if not file.exists():
        return []
    return [json.loads(text) for text in file.read_text(encoding="utf-8").split("\n")[:-1]]


def append_line(file: Path, line: Line) -> None:
    """Append a result; removes a partial last line first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = file.read_bytes() if file.exists() else b""
    whole = kept[: kept.rfind(b"\n") + 1]
    if whole != kept:
        file.write_bytes(whole)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
