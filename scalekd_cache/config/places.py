"""The default folders: `caches/<data>` and `runs/<student>`.

In: a dataset or student, as given on the command line; teacher names. Out: folders. Invariant: the last component of
a cache's path is always a plain name, never `.`, a brace pattern or a name with spaces. The Makefile runs this file
too, so it imports only the standard library.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def home_path(text: str) -> Path:
    """A path with its leading ~ or ~user replaced by that home folder, if there is one. Path.expanduser raises an error
    if there is none, for example for a folder named ~old."""
    return Path(os.path.expanduser(text))


def expand_home(value: Any) -> Any:
    """Expand a leading ~/ to the home folder, because shells do not expand it in --data=~/photos."""
    return str(home_path(value)) if isinstance(value, str) and value.startswith("~/") else value


def cache_places(text: str) -> list[str]:
    """Split a comma-separated list of cache folders and URLs. An existing folder whose name contains commas counts as
    one cache."""
    places = [expand_home(place.strip()) for place in text.split(",")]
    return [text] if os.path.exists(text) else [place for place in places if place] or [text]


def default_cache(source: str) -> str:
    """The default cache folder for a dataset (demo, a folder, or a brace pattern of tars)."""
    name = source.rstrip("/").rpartition("/")[2]
    if name in ("", ".", "..", "~"):
        name = os.path.basename(os.path.realpath(home_path(source or ".")))
    name = _plain(re.sub(r"\{[^{}]*\}|\.tar$", "", name))
    return f"caches/{name or 'data'}"


def default_run(student: str, targets: str) -> str:
    """The default run folder: runs/<student>, followed by the target type unless it is cached."""
    return f"runs/{student}" + ("" if targets == "cached" else f"-{targets}")


def teacher_folders(names: Sequence[str]) -> list[str]:
    """Folder names for the caches of multiple teachers: the model names, with -2, -3 appended to repeated names."""
    folders: list[str] = []
    for name in names:
        plain, folder, number = _plain(name) or "teacher", "", 1
        while not folder or folder in folders:
            folder, number = plain if number == 1 else f"{plain}-{number}", number + 1
        folders.append(folder)
    return folders


def _plain(name: str) -> str:
    """Reduce text to safe characters; the result may be empty."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


if __name__ == "__main__":
    print(default_cache(sys.argv[1]))
