"""Progress lines in a log, and human-readable sizes."""

import re

import pytest

from scalekd_cache.progress import duration_text, progress, size_text


@pytest.mark.parametrize("open_bars", [0, 2])
def test_a_log_has_whole_lines_only(capsys, monkeypatch, open_bars):
    """Also when interrupted runs of the same process left bars open."""
    monkeypatch.setattr("scalekd_cache.progress.LINE_SECONDS", 0.0)
    left_open = [progress("distill", 3, "step") for _ in range(open_bars)]
    capsys.readouterr()
    with progress("cache", 3, "view") as bar:
        for _ in range(3):
            bar.update()
            bar.set_postfix_str("loss=1")
    text = capsys.readouterr().err
    for bar in left_open:
        bar.close()
    lines = text.splitlines()
    assert "\r" not in text
    assert "\x1b" not in text
    assert all(re.fullmatch(r"cache: [0-3]/3 views, \d\d:\d\d done, .*", line) for line in lines), lines
    assert [line[:10] for line in lines] == [f"cache: {done}/3" for done in range(4)]


def test_a_bar_leaves_room_for_an_interruption(capsys, monkeypatch):
    """A terminal prints ^C after the bar; in the last column, it would wrap and stay on the screen."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("scalekd_cache.progress._columns", lambda: 60)
    with progress("cache", 3, "view") as bar:
        bar.update()
    lines = re.split(r"[\r\n]|\x1b\[A", capsys.readouterr().err)  # bars of other tests may be open above it
    assert any("cache" in line for line in lines)
    assert max(map(len, lines)) <= 57


def test_one_unit_is_singular_and_no_rate_is_guessed(capsys, monkeypatch):
    monkeypatch.setattr("scalekd_cache.progress.LINE_SECONDS", 0.0)
    with progress("verify", 1, "unit") as bar:
        first = capsys.readouterr().err
        bar.start_t -= 4
        bar.last_print_t -= 4
        bar.update()
    assert first == "verify: 0/1 unit, 00:00 done, ? left\n"
    assert re.fullmatch(r"verify: 1/1 unit, 00:04 done, 00:00 left, 4[.0-9]* s per unit\n", capsys.readouterr().err)


def test_another_rank_prints_nothing(capsys):
    with progress("cache", 3, "view", rank=1) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.50 KB"), (2.5e6, "2.50 MB"), (7.02e9, "7.02 GB")]
)
def test_sizes_have_the_unit_that_fits(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "< 1 second"), (0.99, "< 1 second"), (1, "1 second"), (21.6, "22 seconds"), (60, "1 minute"),
     (138, "2.3 minutes"), (59 * 60, "59 minutes"), (3 * 3600 + 300, "3.1 hours"), (47 * 3600, "47 hours"),
     (5 * 86400, "5 days"), (4e8, "4,630 days")],
)  # fmt: skip
def test_durations_have_sensible_units(seconds, text):
    assert duration_text(seconds) == text


def test_a_unit_of_work_has_no_fraction_of_a_second():
    assert (duration_text(0.001, "GPU-"), duration_text(7200, "GPU-")) == ("< 1 GPU-second", "2 GPU-hours")
