"""What a codec that is chosen for a cache has to meet.

In: text such as ac-cosine:0.999. Out: a checked `CodecTarget`. Invariant: equal targets have one text.
"""

import math
from typing import Literal, NamedTuple, cast

from scalekd_cache.errors import UserError, unknown_name

RANGES: dict[str, tuple[float, float]] = {"ac-cosine": (0.0, 1.0), "kl": (0.0, math.inf), "bytes": (0.0, math.inf)}
"""Metrics, and what their values lie between (both ends excluded)."""


class CodecTarget(NamedTuple):
    """A bound."""

    metric: Literal["ac-cosine", "kl", "bytes"]
    value: float

    @property
    def text(self) -> str:
        """As it is typed."""
        return f"{self.metric}:{self.value:.10g}"


def parse_target(text: str) -> CodecTarget:
    """A target from its text.

    Raises:
        UserError: an unknown metric (with the nearest ones), or a value that is no number in its range.
    """
    metric, _, number = text.partition(":")
    example = "ac-cosine:0.999, bytes:20000 or kl:0.01"
    if metric not in RANGES:
        raise unknown_name("codec target", metric, RANGES, f"TARGET=, cache.codec_target, as in {example}")
    low, high = RANGES[metric]
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not low < value < high:
        raise UserError(
            "bad value of a codec target",
            got=text,
            expected=f"a number above {low:g} and below {high:g}",
            where="cache.codec_target",
            fix=f"correct TARGET=, as in {example}",
        )
    return CodecTarget(cast(Literal["ac-cosine", "kl", "bytes"], metric), value)
