"""One part of `benchmarks.gpu_smoke`, in this process.

In: the letter of a part, the folder with the images. Out: <letter>.json there, rewritten after every result.
Invariant: every reported result is on disk, so a part that is stopped keeps it.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_smoke import PARTS
from benchmarks.smoke.sizes import FAILED, sizes_of


class Report:
    """The results of a part; every `add` rewrites its file."""

    def __init__(self, file: Path) -> None:
        self.file, self.figures = file, dict[str, Any]()

    def add(self, name: str, value: Any) -> None:
        """Add a result; replaces an existing one of the same name."""
        self.figures[name] = value
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures), encoding="utf-8")
        os.replace(temporary, self.file)


def run_part(part: str, folder: Path, *, stand_in: bool) -> dict[str, Any]:
    """Run a part; returns its results."""
    module, name = PARTS[part]
    report = Report(folder / f"{part}.json")
    getattr(importlib.import_module(f"benchmarks.smoke.{module}"), name)(sizes_of(stand_in), folder, report.add)
    return report.figures


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args(argv)
    figures = run_part(options.part, options.folder, stand_in=options.stand_in)
    if any(isinstance(value, dict) and FAILED in value for value in figures.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
