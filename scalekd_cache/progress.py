"""Progress bars: a moving bar in a terminal, one line every 15 seconds in a log.

In: a total and a unit. Out: a tqdm bar with rate and remaining time. Invariant: only rank 0 prints.
"""

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0
"""Interval between two lines when the output is not a terminal, seconds."""


def progress(title: str, total: int, unit: str, *, rank: int = 0, initial: int = 0) -> "tqdm[Any]":
    """A progress bar on standard error that counts to `total` in `unit`s."""
    terminal = sys.stderr.isatty()
    line = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} done, {remaining} left, {rate_fmt}{postfix}\n"
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        disable=rank > 0,
        mininterval=0.5 if terminal else LINE_SECONDS,
        maxinterval=10.0 if terminal else LINE_SECONDS,
        miniters=None if terminal else 1,
        bar_format=None if terminal else line,
        leave=True,
    )
