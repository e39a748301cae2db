"""Names from files as text of a Markdown card: the model card of a student, the data card of a published cache.

In: any text. Out: one line that Markdown shows as this text.
Invariant: no name becomes markup, a link or HTML; of a path only the last part is shown, because a published card
should not contain local folders.
"""

import re

MARKUP = re.compile(r"[\\`*{}\[\]()<>#+!|&~$:@]|^-|(?<!\w)_|_(?!\w)|(?<=[wW]{3})\.")
"""Characters that Markdown renderers interpret."""


def last_part(place: str) -> str:
    """The last part of a path or URL."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1] or place


def escaped(value: str) -> str:
    """Text escaped for Markdown: no link, image, emphasis or HTML."""
    return MARKUP.sub(r"\\\g<0>", one_line(value))


def table_cell(value: str) -> str:
    """Text as code in a table cell."""
    plain = one_line(value).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def one_line(value: str) -> str:
    """One line of printable characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in value).split())
