"""Brace patterns for file names: `train-{000..146}.tar`, `{a,b}.tar`.

In: a pattern. Out: the file names it expands to, or the matching validation files.
Invariant: a training pattern means exactly the files it names; opening a missing file is an error.
"""

import glob
import itertools
import re

from scalekd_cache.errors import UserError, counted

BRACES = re.compile(r"\{([^{}]*)\}")
MAX_FILES = 1_000_000


def is_pattern(text: str) -> bool:
    """Whether `text` is a brace pattern for tars."""
    return text.endswith(".tar") and BRACES.search(text) is not None


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern expands to, in order; leading zeros in a range are kept."""
    pieces = BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [_choices(piece, pattern) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    total = 1
    for names in choices:
        total *= len(names)
    if total > MAX_FILES:
        raise _bad_pattern(pattern, counted(total, "file"))
    return ["".join(parts) for parts in itertools.product(*choices)]


def word(name: str) -> re.Pattern[str]:
    """Matches `name` as a whole word: val in x-val-0.tar, not in validation.tar."""
    return re.compile(rf"(?<![A-Za-z]){name}(?![A-Za-z])")


def find_val_tars(pattern: str, names: tuple[str, ...]) -> list[str]:
    """Existing files that match the pattern, with any numbers and with its last `train` replaced by one of `names`."""
    words = list(word("train").finditer(pattern))
    if not words:
        return []
    start, stop = words[-1].span()
    for name in names:
        pieces = BRACES.split(pattern[:start] + name + pattern[stop:])
        found = sorted(glob.glob("*".join(glob.escape(piece) for piece in pieces[::2])))
        if found:
            return found
    return []


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", inside)
    if numbers is None:
        if "," not in inside:
            raise _bad_pattern(pattern, "{" + inside + "}")
        return inside.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not first <= last < first + MAX_FILES:
        raise _bad_pattern(pattern, "{" + inside + "}")
    return [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]


def _bad_pattern(pattern: str, got: str) -> UserError:
    return UserError(
        "invalid shard pattern",
        got=got,
        expected=f"{{000..146}} with the lower number first, or {{a,b,c}}; at most {MAX_FILES:,} files",
        where=pattern,
        fix="correct data.source",
    )
