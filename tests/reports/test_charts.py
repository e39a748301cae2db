"""Charts, names and colors of reports: the same numbers give the same bytes, and everything is readable."""

import json
import re
from importlib.resources import files

import numpy as np
import pytest
import torch

from scalekd_cache import reports
from scalekd_cache.data.base import encode_key, key_text
from scalekd_cache.reports.charts import COLORS, Series, contrast, curves, histogram, matrix, plain, scatter
from scalekd_cache.reports.colors import fit_palette, overlay, paint
from scalekd_cache.reports.page import breakable

HOSTILE = '"><script>window.hacked=1</script>$\\frac{1}'


def test_curves_of_one_color_differ_in_style():
    lines = json.dumps(curves([Series(str(n), [1, 2], [1, 2]) for n in range(12)], "x", "y", "t").item)
    styles = re.findall(r'"line_color": "(#\w{6})", "line_width": 2, "line_dash": (\[[^\]]*\]|"\w+")', lines)
    assert len(set(styles)) == 11  # and the solid line, which is not written


def test_names_for_charts():
    assert plain("a\nb\u202e") == "a?b?"
    assert plain("$$x$$ \\(y\\)") == "$ $x$ $ \\ (y\\)"  # no formula: a library for them would be loaded
    assert len(plain("x" * 500)) == 24
    assert plain("mobilenetv3_small_100-seed1") != plain("mobilenetv3_small_100-seed0")
    for name in (HOSTILE, "_a", "$$", "\\[", "名前", ""):
        assert matrix(np.eye(2, dtype=int), [name, "b"], [name, "b"], ("", ""), "t").item["doc"]
        assert curves([Series(name, [1, 2], [3, 4]), Series("b", [1], [1])], "x", "y", "t").alt


def test_charts_are_the_same_every_time_and_have_words():
    first, again = (histogram([0.1, 0.2, 0.2], "cosine", "views", "Fidelity", ("limit", 0.15)) for _ in range(2))
    assert first == again
    assert "3 values from 0.10000 to 0.20000" in first.alt
    long = curves([Series("a", range(100_000), range(100_000))], "x", "y", "t")
    assert len(json.dumps(long.item)) < 30_000


def test_values_that_are_not_finite():
    chart = histogram([0.5, float("nan"), float("inf")], "cosine", "views", "Fidelity")
    assert "1 value from 0.50000" in chart.alt
    assert "2 values not finite" in chart.caption
    assert "0 values" in histogram([float("nan")] * 2, "cosine", "views", "Fidelity").alt
    broken = curves([Series("a", [1, 2, 3], [1.0, float("nan"), float("inf")])], "x", "y", "t")
    assert json.loads(json.dumps(broken.item, allow_nan=False))


def test_text_breaks_after_separators_and_is_escaped():
    assert breakable("train/n01_<b>") == "train/<wbr>n01_&lt;b&gt;"
    assert breakable("a_b/c") == "a_<wbr>b/<wbr>c"


def test_colors_have_enough_contrast():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # known values
    cells = matrix(np.arange(144).reshape(12, 12), ["a"] * 12, ["b"] * 12, ("", ""), "t").item
    columns = {}

    def collect(node):
        if isinstance(node, dict):
            columns.update({name: values for name, values in node.get("entries", []) if isinstance(name, str)})
        for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            collect(part)

    collect(cells)
    assert len(set(columns["color"])) > 100
    assert min(map(contrast, columns["color"], columns["ink"])) >= 4.5
    style = files(reports).joinpath("templates/base.html").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.partition("prefers-color-scheme: dark")[::2]
    )
    assert len(light) == len(dark) == 8
    for colors in (light, dark):
        for ink in ("ink", "soft", "blue", "orange"):
            assert contrast(colors[ink], colors["page"]) >= 4.5, ink
        assert contrast(colors["ink"], colors["note"]) >= 4.5
        assert min(contrast(color, colors["page"]) for color in COLORS) >= 3  # curves


def test_colors_tell_tokens_apart_and_are_the_same_for_equal_ones():
    maps = torch.zeros(2, 8, 2, 2)
    maps[:, 0, 0, 0], maps[:, 1, 1, 1], maps[1, 2, 0, 1] = 5, -3, 1
    palette = fit_palette(maps)
    colors = paint(palette, maps[0])
    assert colors.shape == (2, 2, 3)
    assert (colors[0, 1] == colors[1, 0]).all()
    assert len({tuple(token) for token in colors.reshape(-1, 3).tolist()}) == 3
    assert (paint(palette, maps[0]) == colors).all()
    assert paint(fit_palette(torch.zeros(1, 4, 2, 2)), torch.zeros(4, 2, 2)).shape == (2, 2, 3)
    assert overlay(None, colors, 10).shape == (10, 10, 3)


def test_steps_on_an_axis_are_whole_numbers():
    item = curves([Series("a", [1, 3], [1.0, 2.0])], "step", "loss", "Loss").item
    [axis] = item["doc"]["roots"][0]["attributes"]["below"]
    assert axis["attributes"]["ticker"]["attributes"]["min_interval"] == 1


def test_axes_of_sizes_start_at_zero():
    for points in ([("a", 0.4, 99.0)], [("a", 0.0, 0.5), ("b", 25.6, 80.0)]):
        item = scatter(points, "million parameters", "top-1, percent", "Accuracy and size").item
        x, y = (item["doc"]["roots"][0]["attributes"][name]["attributes"] for name in ("x_range", "y_range"))
        assert x.get("start", 0) == 0 < max(size for _, size, _ in points) < x["end"]  # 0 is Bokeh's default
        assert 0 <= y.get("start", 0) < min(top1 for *_, top1 in points)


def test_keys_are_shown_as_text():
    key = encode_key("Größe <b>/a.b c")
    assert (key, key_text(key)) == ("Gr%C3%B6%C3%9Fe%20%3Cb%3E/a%2Eb%20c", "Größe <b>/a.b c")
