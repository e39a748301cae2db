"""Where a cache goes when nobody says where: `caches/<data>`.

In: a data set as it is typed. Out: a folder. Invariant: the last part of it is a plain name, whatever was typed: never
`.`, never a brace pattern, no spaces. The Makefile asks this file too, so nothing outside the standard library is used.
"""

import re
import sys
from pathlib import Path


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
