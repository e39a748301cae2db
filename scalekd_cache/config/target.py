"""The target of an automatic codec selection: a fidelity bound or a size limit.

In: text such as ac-cosine:0.999. Out: a checked `CodecTarget`. Invariant: equal targets have the same text.
"""

import math
from typing import Literal, NamedTuple, cast

from scalekd_cache.errors import UserError, unknown_name

RANGES: dict[str, tuple[float, float]] = {"ac-cosine": (0.0, 1.0), "kl": (0.0, math.inf), "bytes": (0.0, math.inf)}
"""Metrics, with the open interval of allowed values for each."""


class CodecTarget(NamedTuple):
    """A metric and its bound."""

    metric: Literal["ac-cosine", "kl", "bytes"]
    value: float

    @property
    def text(self) -> str:
        """The target as text, as given on the command line."""
        return f"{self.metric}:{self.value:.10g}"


def parse_target(text: str) -> CodecTarget:
    """Parse a target from its text.

    Raises:
        UserError: the metric is unknown (the message suggests the nearest names), or the value is not a number in its
            range.
    """
    metric, _, number = text.partition(":")
    example = "ac-cosine:0.999, bytes:20000 or kl:0.01"
    if metric not in RANGES:
        raise unknown_name("--target metric", metric, RANGES, f"examples: {example}")
    low, high = RANGES[metric]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not low < value < high:
        raise UserError(
            "invalid codec target",
            got=text,
            expected=f"{metric}:NUMBER, where NUMBER is above {low:g}"
            + (f" and below {high:g}" if high < math.inf else ""),
            where="cache.codec_target",
            fix=f"correct --target, for example: {example}",
        )
    return CodecTarget(cast(Literal["ac-cosine", "kl", "bytes"], metric), value)
