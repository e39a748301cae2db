"""The tables of docs/reference are those of the code, and are there without building the site."""

import runpy

import pytest
from commands import ROOT

from pipelines.__main__ import SCALEKD
from scalekd_cache import __all__ as public

REFERENCE = runpy.run_path(str(ROOT / "docs" / "site" / "reference.py"))


@pytest.mark.parametrize("page", ["cli.md", "python.md"])
def test_the_table_of_a_page_is_up_to_date(page):
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert text == REFERENCE["filled"](page), "run python docs/site/reference.py"


def test_every_command_and_every_public_name_has_one_line():
    for rows, expected in (
        (REFERENCE["commands"](), [f"| `{name}`" for name in SCALEKD.commands]),
        (REFERENCE["names"](), [f"| `{name}" for name in public]),
    ):
        lines = rows.splitlines()[2:]
        assert len(lines) == len(expected)
        assert all(line.startswith(start) and "None" not in line for line, start in zip(lines, expected, strict=True))
