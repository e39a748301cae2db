"""Escapes names from files for the model card and the data card, which are Markdown.

In: any text. Out: one line that Markdown displays as this text.
Invariant: names never become markup, links or HTML. Only the last part of a path is shown, because a published card
should not reveal local folders.
"""

import re

MARKUP = re.compile(r"[\\`*{}\[\]()<>#+!|&~$:@]|^-|(?<!\w)_|_(?!\w)|(?<=[wW]{3})\.")
"""Characters that Markdown renderers interpret."""


def last_part(place: str) -> str:
    """The last part of a path or URL."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or place


def escaped(value: str) -> str:
    """Escape text for Markdown, so that it contains no links, images, emphasis or HTML."""
    return MARKUP.sub(r"\\\g<0>", one_line(value))


def table_cell(value: str) -> str:
    """Format text as code for a table cell."""
    plain = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def one_line(value: str) -> str:
    """Reduce text to one line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in value).split())
