"""Progress bars, human-readable sizes and durations.

In: a total and a unit. Out: a tqdm bar with the rate and the remaining time. In a log, which cannot show a moving bar,
one line is printed every 15 seconds. Invariant: only rank 0 prints.
"""

import os
import sys
from typing import IO, Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from scalekd_cache.errors import counted

LINE_SECONDS = 15.0
"""Seconds between lines when the output is a log."""


UNITS = ((172_800, 86_400, "day"), (3600, 3600, "hour"), (60, 60, "minute"), (1, 1, "second"))
"""For durations: the smallest one in this unit, and the length of the unit, in seconds."""


class _Lines:
    """Writes tqdm's output as whole lines, without carriage returns, padding, blank lines or repeated lines."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._count = file, ""

    def write(self, text: str) -> None:
        """Write one line, unless the count has not changed since the previous line."""
        line = text.strip()
        count = line.partition(",")[0]
        if line and count != self._count:
            self._count = count
            self._file.write(line + "\n")

    def flush(self) -> None:
        """Flush the log."""
        self._file.flush()


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar with correct singular and plural units that shows no rate before the first step."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """The values for the format string."""
        values = dict(super().format_dict)
        if values.get("initial") is None:  # a bar on a different rank
            return values
        done, elapsed = values["n"] - values["initial"], values["elapsed"]
        rate = values["rate"] or (done / elapsed if done and elapsed else 0)
        unit, units = values["unit"], counted(values["total"], values["unit"]).partition(" ")[2]
        speed = f", {rate:.3g} {unit}s/s" if rate >= 1 else f", {1 / rate:.3g} s per {unit}" if rate else ""
        return values | {"units": units, "speed": speed}


def progress(title: str, total: int, unit: str, *, rank: int = 0, initial: int = 0, leave: bool = True) -> "tqdm[Any]":
    """A progress bar that counts to `total` in `unit`s, shown on standard error or in the notebook. Without `leave`, a
    terminal removes the bar at its end, because a line with the result follows."""
    notebook = issubclass(tqdm, tqdm_notebook)
    moving = sys.stderr.isatty() or notebook
    line = "{desc}: {n_fmt}/{total_fmt} {units}, {elapsed} done, {remaining} left{speed}{postfix}"
    return _Bar(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        disable=rank > 0,
        file=None if moving else _Lines(sys.stderr),
        mininterval=0.5 if moving else LINE_SECONDS,
        maxinterval=10.0 if moving else LINE_SECONDS,
        miniters=None if moving else 1,
        bar_format=None if moving else line,
        position=None if moving else 0,  # a log has no cursor to move below the open bar of an interrupted run
        ncols=_columns() - len("^C") - 1 if moving and not notebook else None,
        leave=leave or not moving,
    )


def _columns() -> int:
    """Width of the terminal that shows the bars; standard output may be a file."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def size_text(size: float) -> str:
    """Format a number of bytes with a decimal unit, such as "1.50 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return counted(round(size), "byte")


def duration_text(seconds: float, kind: str = "") -> str:
    """Format a duration with two digits, such as "4.3 minutes". `kind` goes before the unit, as in "2 GPU-hours"."""
    if seconds < 1:
        return f"< 1 {kind}second"
    length, unit = next((length, unit) for least, length, unit in UNITS if seconds >= least)
    value = seconds / length
    text = f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}".removesuffix(".0")
    return f"{text} {kind}{unit}{'s' * (text != '1')}"


def print_rank0(text: str) -> None:
    """Print a line on rank 0, also before the process group exists."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
