"""The figures of reports, as SVG.

In: series, counts, matrices. Out: `Picture`s with an alternative text for screen readers.
Invariant: the same numbers give the same bytes. Series differ by color (the Okabe-Ito palette, safe for color-blind
readers), line style and name.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from scalekd_cache.reports.page import Picture, data_uri

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MAX_POINTS = 400
"""Maximum points of a curve; longer curves are averaged."""
WIDTH = 4.8
"""Inches; text stays readable on a phone."""
MAX_NAME = 24
"""Characters of a name in a figure."""


class Series(NamedTuple):
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def plain(name: str) -> str:
    """A name from a data set, made safe for a figure: short, printable, not parsed as a formula."""
    printable = "".join(character if character.isprintable() else "?" for character in name)
    short = printable if len(printable) <= MAX_NAME else printable[: MAX_NAME - 1] + "…"
    return f" {short}".replace("$", r"\$")  # leading space: matplotlib hides names that begin with "_"


def curves(series: Sequence[Series], x_name: str, y_name: str, title: str, *, percent: bool = False) -> Picture:
    """Curves with a common x axis; the y axis includes zero; `percent` shows shares as percent."""
    figure, axes = _axes(3.0)
    for number, one in enumerate(series):
        x, y = _downsampled(one.x), _downsampled(one.y)
        marker = "o" if len(x) < 12 else None
        axes.plot(x, y, color=COLORS[number % 7], linestyle=STYLES[number % 7], label=plain(one.name), marker=marker,
                  markersize=3.5, linewidth=1.6)  # fmt: skip
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.get_ylim()[0] > 0 else None)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    if len(series) > 1:
        axes.legend(fontsize=9, frameon=False, ncols=2)
    ends = "; ".join(f"{one.name} goes from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in series if len(one.y))
    return _svg(figure, f"{title}. {y_name} over {x_name}: {ends or 'no values yet'}.", title)


def histogram(
    values: ArrayLike, x_name: str, y_name: str, title: str, mark: tuple[str, float] | None = None
) -> Picture:
    """Histogram of values, with an optional named vertical line."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    figure, axes = _axes(2.6)
    axes.hist(data, bins=min(40, max(8, len(data) // 8)), color=COLORS[0], edgecolor="white", linewidth=0.4)
    axes.locator_params(axis="x", nbins=3)
    axes.ticklabel_format(useOffset=False, axis="x")
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    if mark is not None:
        axes.axvline(mark[1], color=COLORS[1], linestyle="--", label=f"{mark[0]} {mark[1]:.5f}")
        axes.legend(fontsize=9, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    text = f"{title}: {len(data)} values from {data.min():.5f} to {data.max():.5f}, median {np.median(data):.5f}."
    return _svg(figure, text, title)


def stacked_bar(parts: Mapping[str, float], unit: str, title: str) -> Picture:
    """Parts of a total as one stacked bar."""
    figure, axes = _axes(1.7)
    left = 0.0
    for number, (name, size) in enumerate(parts.items()):
        axes.barh(
            0,
            size,
            left=left,
            color=COLORS[number % 7],
            edgecolor="white",
            label=f"{name} {size:,.0f}",
            hatch=("", "//", "..", "xx")[number % 4],
        )
        left += size
    axes.set_yticks([])
    axes.set_xlabel(unit)
    axes.legend(fontsize=9, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    text = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())
    return _svg(figure, f"{title} in {unit}: {text}.", title)


def matrix(
    counts: NDArray[Any], rows: Sequence[str], columns: Sequence[str], names: tuple[str, str], title: str
) -> Picture:
    """A matrix of counts or shares, with numbers if it is small; `names` label its rows and columns."""
    side = len(columns)
    figure, axes = _axes(4.8 if side > 6 else 3.2)
    axes.imshow(counts, cmap="cividis", aspect="auto")
    whole = np.issubdtype(counts.dtype, np.integer)
    if side <= 12:
        for (row, column), value in np.ndenumerate(counts):
            bright = value > counts.max() / 2
            axes.text(column, row, f"{value}" if whole else f"{value:.0%}", ha="center", va="center", fontsize=9,
                      color="black" if bright else "white")  # fmt: skip
    if side <= 40:
        axes.set_xticks(range(side), [plain(name) for name in columns], rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), [plain(name) for name in rows], fontsize=7)
    axes.set_ylabel(names[0])
    axes.set_xlabel(names[1])
    return _svg(figure, title, title)


def scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str, title: str) -> Picture:
    """Named points."""
    figure, axes = _axes(3.0)
    for number, (name, x, y) in enumerate(points):
        axes.plot(
            x,
            y,
            marker="osD^vP*"[number % 7],
            color=COLORS[number % 7],
            markersize=8,
            linestyle="",
            label=plain(name),
            alpha=0.8,
        )
    axes.margins(0.25)
    axes.legend(fontsize=9, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    text = "; ".join(f"{name}: {x:.4g}, {y:.4g}" for name, x, y in points)
    return _svg(figure, f"{title} ({x_name}, {y_name}): {text}.", title)


def _axes(height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    return figure, axes


def _svg(figure: Any, alt: str, caption: str) -> Picture:
    buffer = io.BytesIO()
    # Text stays text: browsers have fonts for scripts that matplotlib's font lacks.
    options = {"svg.hashsalt": "scalekd-cache", "svg.fonttype": "none"}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Picture(data_uri(buffer.getvalue(), "image/svg+xml"), alt, caption)


def _downsampled(values: Sequence[float]) -> NDArray[np.float64]:
    """At most `MAX_POINTS` values: means of consecutive values."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if len(data) <= MAX_POINTS:
        return data
    return np.array([part.mean() for part in np.array_split(data, MAX_POINTS)])
