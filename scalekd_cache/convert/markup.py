"""Escapes names from files for Markdown cards: a student's model card and a published cache's data card.

In: any text. Out: one line that Markdown displays as this text.
Invariant: no name becomes markup, a link or HTML. Only the last part of a path is shown, because a published card
should not reveal local folders.
"""

import re

MARKUP = re.compile(r"[\\`*{}\[\]()<>#+!|&~$:@]|^-|(?<!\w)_|_(?!\w)|(?<=[wW]{3})\.")
"""Characters that Markdown renderers interpret."""


def last_part(place: str) -> str:
    """The last part of a path or URL."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or place


def escaped(value: str) -> str:
    """Escape text for Markdown, so that it contains no link, image, emphasis or HTML."""
    return MARKUP.sub(r"\\\g<0>", one_line(value))


def table_cell(value: str) -> str:
    """Format text as code in a table cell."""
    plain = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def one_line(value: str) -> str:
    """Reduce text to one line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in value).split())
