"""Charts for reports, drawn by Bokeh in the browser.

In: series, counts, matrices. Out: `Chart`s, each with a Bokeh document as JSON, and a text for screen readers and
browsers without scripts. Invariant: the same numbers give the same bytes. Series differ in color, line style and name.
Colors have a contrast of at least 3:1 with both the light and the dark page, and numbers on colored cells at least
4.5:1. Axes and legends take their colors from the page through Bokeh's CSS variables (`--bk-...` in base.html).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from numpy.typing import ArrayLike, NDArray

from scalekd_cache.errors import counted

COLORS = ("#0072b2", "#d55e00", "#008a64", "#b3589a", "#2f87c6", "#9a7200", "#767676")
"""Okabe and Ito's color-blind-safe palette, with the bright colors darkened for a white background."""
DASHES = ("solid", "dashed", "dashdot", "dotted", "dotdash", [12, 3], [2, 6])
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "star")
HATCHES = (" ", "/", ".", "x")
MAX_POINTS = 400
"""Maximum number of points per curve; longer curves are downsampled by averaging."""
MAX_NAME = 24
"""Maximum length of a name in a chart."""
NUMBERED = 12
"""Maximum number of columns for showing numbers in cells; larger matrices show them on hover."""
NAMED = 40
"""Maximum number of columns for showing names on the axes."""
MATH = re.compile(r"\$\$|\\[(\[]")
"""Prefixes that Bokeh treats as the start of a formula."""


class Chart(NamedTuple):
    """A chart for a template."""

    item: dict[str, Any]
    """The Bokeh document as JSON."""
    alt: str
    """Text description of the chart."""
    caption: str


class Series(NamedTuple):
    """A curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def plain(name: str) -> str:
    """A name from a dataset, made safe for a chart: short, printable, and not parsed as a formula."""
    printable = "".join(character if character.isprintable() else "?" for character in name)
    half = MAX_NAME // 2  # both ends are kept, because the names of runs differ in the last characters
    short = printable if len(printable) <= MAX_NAME else f"{printable[: half - 1]}…{printable[-half:]}"
    return MATH.sub(lambda found: " ".join(found[0]), short)


LEAST_SHARE = 0.1
"""Minimum upper limit of a percent axis, because ticks below one percent would all read 0%."""


def curves(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    title: str,
    *,
    percent: bool = False,
    styles: Sequence[int] | None = None,
) -> Chart:
    """Curves with a shared x axis. Both axes include zero.

    Args:
        series: the curves.
        x_name: x axis label.
        y_name: y axis label.
        title: chart title.
        percent: show fractions as percentages.
        styles: color and line style index for each curve, so that a run looks the same in all charts on a page (None:
            0, 1, ...). If given, even a single curve gets a legend.
    """
    plot = _plot(x_name, y_name, 260)
    plot.x_range, plot.y_range = DataRange1d(start=0), DataRange1d()
    plot.xaxis.ticker.min_interval = 1  # steps are whole numbers
    if all(value >= 0 for one in series for value in one.y):
        plot.y_range.start = 0
    drawn = []
    for number, one in zip(styles or range(len(series)), series, strict=True):
        source = ColumnDataSource({"x": _downsampled(one.x), "y": _downsampled(one.y)})
        style = {"line_color": COLORS[number % 7], "name": plain(one.name)}
        lines = [plot.line("x", "y", source=source, line_dash=_style(DASHES, number), line_width=2, **style)]
        if len(one.x) < 12:
            lines.append(plot.scatter("x", "y", source=source, size=6, fill_color=COLORS[number % 7], **style))
        drawn.append((one.name, lines))
    value, kind = ("@y{0.0%}", "numeral") if percent else ("@y{%.4g}", "printf")
    # One line per curve, so that hovering shows all curves' values at a step together.
    shown = [("", f"$name: {value} at {x_name} @x{{0,0}}")]
    _hover(plot, shown, [group[0] for _, group in drawn], {"@y": kind}, mode="vline")
    if percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0%")
        plot.y_range.min_interval = LEAST_SHARE
    if len(series) > 1 or styles:
        _legend(plot, drawn)
    ends = "; ".join(f"{one.name} goes from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in series if len(one.y))
    return _chart(plot, f"{title}. {y_name} over {x_name}: {ends or 'no values yet'}.", title)


def histogram(values: ArrayLike, x_name: str, y_name: str, title: str, mark: tuple[str, float] | None = None) -> Chart:
    """A histogram of the finite values, with an optional named vertical line."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    lost, data = int((~np.isfinite(data)).sum()), data[np.isfinite(data)]
    counts, edges = np.histogram(data, bins=min(40, max(8, len(data) // 8)))
    plot = _plot(x_name, y_name, 240)
    plot.y_range = DataRange1d(start=0)
    source = ColumnDataSource({"count": counts.tolist(), "left": edges[:-1].tolist(), "right": edges[1:].tolist()})
    bars = plot.quad(
        bottom=0, top="count", left="left", right="right", source=source, fill_color=COLORS[0], line_alpha=0
    )
    _hover(
        plot,
        [(x_name, "@left{%.6f} to @right{%.6f}"), (y_name, "@count")],
        [bars],
        {"@left": "printf", "@right": "printf"},
    )
    plot.xaxis.ticker.desired_num_ticks = 3
    plot.yaxis.ticker.min_interval = 1
    if mark is not None:
        line = plot.line([mark[1]] * 2, [0, int(counts.max())], line_color=COLORS[1], line_dash="dashed", line_width=2)
        _legend(plot, [(f"{mark[0]} {mark[1]:.5f}", [line])], shorten=False)
    text = f"{title}: {counted(len(data), 'value')}"
    if len(data):
        text += f" from {data.min():.5f} to {data.max():.5f}, median {np.median(data):.5f}"
    if lost:
        title += f" ({counted(lost, 'value')} not finite)"
    return _chart(plot, f"{text}.", title)


def stacked_bar(parts: Mapping[str, float], unit: str, title: str) -> Chart:
    """A stacked bar with the parts of a total."""
    plot = _plot(unit, "", 150)
    plot.x_range = DataRange1d(start=0)
    plot.yaxis.visible = plot.ygrid.visible = False
    left, drawn = 0.0, []
    for number, (name, size) in enumerate(parts.items()):
        source = ColumnDataSource({"name": [name], "size": [size], "left": [left], "right": [left + size]})
        part = plot.hbar(y=0, height=0.8, left="left", right="right", source=source, fill_color=COLORS[number % 7],
                         line_color="white", hatch_pattern=HATCHES[number % 4], hatch_color="white",
                         hatch_alpha=0.5)  # fmt: skip
        drawn.append((f"{name} {size:,.0f}", [part]))
        left += size
    _hover(plot, [("", "@name"), (unit, "@size{0,0}")], [group[0] for _, group in drawn])
    _legend(plot, drawn)
    text = ", ".join(f"{name} {size:,.0f}" for name, size in parts.items())
    return _chart(plot, f"{title} in {unit}: {text}.", title)


def matrix(
    counts: NDArray[Any], rows: Sequence[str], columns: Sequence[str], names: tuple[str, str], title: str
) -> Chart:
    """A matrix of counts or fractions, with numbers if it is small. `names` label the rows and columns."""
    side, whole = len(columns), np.issubdtype(counts.dtype, np.integer)
    longest = max(len(plain(name)) for name in columns)
    plot = _plot(names[1], names[0], (400 if side > 6 else 220) + 5 * longest)  # names on the x axis are tilted
    plot.x_range, plot.y_range = Range1d(-0.5, side - 0.5), Range1d(len(rows) - 0.5, -0.5)
    plot.grid.visible = False
    y, x = np.indices(counts.shape).reshape(2, -1).tolist()
    colors = [Cividis256[round(255 * float(value) / max(float(counts.max()), 1e-12))] for value in counts.ravel()]
    source = ColumnDataSource(
        {
            "x": x,
            "y": y,
            "color": colors,
            "ink": [readable_ink(color) for color in colors],
            "text": [f"{value:,}" if whole else f"{100 * value:.0f}" for value in counts.ravel().tolist()],
            "row": [plain(rows[number]) for number in y],
            "column": [plain(columns[number]) for number in x],
        }
    )
    cells = plot.rect("x", "y", width=1, height=1, source=source, fill_color="color", line_alpha=0)
    unit = "" if whole else "%"
    _hover(plot, [(names[0] or "first", "@row"), (names[1] or "second", "@column"), ("", f"@text{unit}")], [cells])
    if side <= NUMBERED:
        plot.text("x", "y", text="text", source=source, text_color="ink", text_align="center", text_baseline="middle",
                  text_font_size="12px" if side <= 10 else "10px")  # fmt: skip
    for axis, labels in ((plot.xaxis, columns), (plot.yaxis, rows)):
        axis.ticker = FixedTicker(ticks=list(range(len(labels))) if side <= NAMED else [])
        axis.major_label_overrides = {number: plain(name) for number, name in enumerate(labels)}
        axis.major_label_text_font_size = "11px" if side <= NUMBERED else "9px"
    if any(len(name) > 2 for name in columns):
        plot.xaxis.major_label_orientation = math.pi / 3
    return _chart(plot, title, title)


def scatter(points: Sequence[tuple[str, float, float]], x_name: str, y_name: str, title: str) -> Chart:
    """A scatter plot of named points that are not negative. The x axis starts at zero."""
    plot = _plot(x_name, y_name, 280)
    low, high = min(y for *_, y in points), max(y for *_, y in points)
    around = 0.3 * (high - low) or 1
    plot.x_range = Range1d(0, 1.2 * max(x for _, x, _ in points) or 1)
    plot.y_range = Range1d(max(0, low - around), high + around)
    drawn = []
    for number, (name, x, y) in enumerate(points):
        source = ColumnDataSource({"x": [x], "y": [y]})
        drawn.append((name, [plot.scatter("x", "y", source=source, size=12, marker=_style(MARKERS, number),
                                          color=COLORS[number % 7], name=plain(name))]))  # fmt: skip
    formats = {"@x": "printf", "@y": "printf"}
    shown = [group[0] for _, group in drawn]
    _hover(plot, [("", "$name"), (x_name, "@x{%.4g}"), (y_name, "@y{%.4g}")], shown, formats)
    _legend(plot, drawn)
    text = "; ".join(f"{name}: {x:.4g}, {y:.4g}" for name, x, y in points)
    return _chart(plot, f"{title} ({x_name}, {y_name}): {text}.", title)


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    """Contrast between two colors, from 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def readable_ink(color: str) -> str:
    """Black or white, whichever has more contrast with this color (at least 4.58)."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, color))


def _style(styles: Sequence[Any], number: int) -> Any:
    """A style for series `number` that differs from those of other series with the same color."""
    return styles[(number + number // len(COLORS)) % len(styles)]


def _plot(x_name: str, y_name: str, height: int) -> Any:
    plot = figure(height=height, sizing_mode="stretch_width", tools="", toolbar_location=None, min_border_right=8,
                  x_axis_label=x_name or None, y_axis_label=y_name or None, outline_line_color=None,
                  background_fill_color=None, border_fill_color=None)  # fmt: skip
    plot.axis.axis_label_text_font_style = "normal"
    plot.axis.major_label_text_font_size = "12px"
    plot.axis.minor_tick_line_color = None
    plot.xaxis.formatter.use_scientific = False
    plot.yaxis.formatter.power_limit_low = -5
    return plot


def _hover(
    plot: Any,
    rows: list[tuple[str, str]],
    renderers: Sequence[GlyphRenderer],
    formatters: Mapping[str, str] | None = None,
    mode: str = "mouse",
) -> None:
    """Show these values on hover. Bokeh escapes them."""
    label = '<span style="color: #57606a">{}</span> '.format  # Bokeh's default has light blue labels on white
    lines = "".join(f"<div>{label(name) if name else ''}{value}</div>" for name, value in rows)
    # Bokeh puts a tooltip on the side with more space, so one of this width stays on a narrow page.
    tooltips = f'<div style="max-width: min(36vw, 30em); overflow-wrap: anywhere">{lines}</div>'
    plot.add_tools(
        HoverTool(tooltips=tooltips, renderers=list(renderers), formatters=dict(formatters or {}), mode=mode)
    )


def _legend(plot: Any, drawn: Sequence[tuple[str, list[GlyphRenderer]]], *, shorten: bool = True) -> None:
    """A legend above the plot. Clicking a name hides its curve."""
    names = [plain(name) if shorten else name for name, _ in drawn]
    items = [LegendItem(label=name, renderers=group) for name, (_, group) in zip(names, drawn, strict=True)]
    longest = max(map(len, names))
    columns = 1 if longest > 17 else 2 if longest > 9 else 3
    legend = Legend(items=items, ncols=min(columns, len(items)), click_policy="hide", label_text_font_size="12px",
                    location="left", border_line_color=None, background_fill_color=None, margin=0, spacing=10,
                    glyph_width=26, label_standoff=6,
                    stylesheets=[".bk-label { color: var(--ink) !important; }"])  # fmt: skip
    plot.add_layout(legend, "above")
    plot.height += 28 * math.ceil(len(items) / columns)


def _chart(plot: Any, alt: str, caption: str) -> Chart:
    # Bokeh numbers objects consecutively within a process, so renumber them within the chart.
    ids: dict[str, str] = {}

    def renumbered(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: ids.setdefault(part, f"m{len(ids)}") if name in ("id", "root_id") else renumbered(part)
                for name, part in value.items()
            }
        return [renumbered(part) for part in value] if isinstance(value, list) else value

    return Chart(renumbered(dict(json_item(plot))), alt, caption)


def _downsampled(values: Sequence[float]) -> list[float]:
    """At most `MAX_POINTS` values, each a mean of consecutive values, rounded to 6 digits."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if len(data) > MAX_POINTS:
        data = np.array([part.mean() for part in np.array_split(data, MAX_POINTS)])
    return [float(f"{value:.6g}") for value in data]
