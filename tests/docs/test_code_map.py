"""docs/CODE_MAP.md: every path exists, and every name is defined in the stated file."""

import re

import pytest
from commands import ROOT

PAGE = (ROOT / "docs" / "CODE_MAP.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`((?:scalekd_cache|pipelines|tests|benchmarks)/[\w./]*)`", PAGE)))
NAMES = [
    (path, name)
    for names, path in re.findall(r"(`\w+`(?:\s+and\s+`\w+`)*)\s+in\s+`([\w/]+\.py)`", PAGE)
    for name in re.findall(r"`(\w+)`", names)
]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    assert (ROOT / path).exists()


def test_most_hops_name_a_function_or_class():
    assert len(NAMES) >= 20


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_every_name_is_defined_there(path, name):
    assert re.search(rf"^(?:class|def) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_room_is_on_the_map():
    rooms = {path.parent.name for path in (ROOT / "scalekd_cache").glob("*/__init__.py")}
    assert rooms
    assert all(f"scalekd_cache/{room}/" in PAGE for room in rooms)
