"""The tables of docs/reference that are made from the code: commands, and public names of the package.

In: `scalekd`'s commands and `scalekd_cache.__all__`. Out: Markdown between two comments of a page.
`python docs/site/reference.py` writes the pages again; tests/docs/test_reference.py fails when they are out of date.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from typing_extensions import is_typeddict

import scalekd_cache
from pipelines.__main__ import SCALEKD
from pipelines.command import FIRST
from scalekd_cache.config.plain_names import PLAIN_NAMES

PAGES = Path(__file__).parents[1] / "reference"
BETWEEN = re.compile(r"(<!-- made by docs/site/reference.py -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> str:
    """A row for each command: what it does, and its first options."""
    rows = ["| command | what it does | first options |", "|---|---|---|"]
    for name, command in SCALEKD.commands.items():
        options = " ".join(f"--{plain.replace('_', '-')}" for plain in [*PLAIN_NAMES[name]][:FIRST])
        rows.append(f"| `{name}` | {command.short_help} | `{options}` |")
    return "\n".join(rows)


def names() -> str:
    """A row for each public name: its arguments, and the first paragraph of its description."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in scalekd_cache.__all__:
        found = getattr(scalekd_cache, name)
        about = "The version of the package." if name == "__version__" else str(inspect.getdoc(found))
        rows.append(f"| `{name}{_arguments(found)}` | {' '.join(about.partition(chr(10) * 2)[0].split())} |")
    return "\n".join(rows)


def _arguments(found: object) -> str:
    """The arguments of a function or a class; nothing for a class of options or facts, whose fields are many."""
    if not callable(found) or dataclasses.is_dataclass(found) or is_typeddict(found):
        return ""
    return f"({', '.join(inspect.signature(found).parameters)})"


TABLES: dict[str, Callable[[], str]] = {"cli.md": commands, "python.md": names}
"""Page -> its table."""


def filled(page: str) -> str:
    """The text of a page with today's table."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return BETWEEN.sub(lambda match: f"{match[1]}\n{TABLES[page]()}\n\n{match[2]}", text)


if __name__ == "__main__":
    for name in TABLES:
        (PAGES / name).write_text(filled(name), encoding="utf-8")
