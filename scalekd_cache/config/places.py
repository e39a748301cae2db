"""The default folder of a cache: `caches/<data>`.

In: a data set, as given on the command line. Out: a folder. Invariant: its last part is always a plain name: never `.`,
no brace pattern, no spaces. The Makefile runs this file too, so it uses the standard library only.
"""

import re
import sys
from pathlib import Path
from typing import Any


def expand_home(value: Any) -> Any:
    """A text that starts with ~/ as a path in the home folder; shells leave --data=~/photos as it is."""
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def default_cache(source: str) -> str:
    """The default folder of the cache of a data set: demo, a folder, or a brace pattern of tars."""
    name = source.rstrip("/").rpartition("/")[2]
    if name in ("", ".", "..", "~"):
        name = Path(source or ".").expanduser().resolve().name
    name = re.sub(r"\{[^{}]*\}|\.tar$", "", name)
    name = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    return f"caches/{name or 'data'}"


if __name__ == "__main__":
    print(default_cache(sys.argv[1]))
