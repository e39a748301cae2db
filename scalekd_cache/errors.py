"""The one exception that a user is meant to read.

In: the facts of a failure. Out: `UserError`, whose text always answers the same five questions.
Invariant: anything a user can cause (a mistype, a bad file, a full disk) ends here; `assert` is for our own mistakes.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(Exception):
    """Something the user can put right: what failed, what was there, what was expected, where, and what to do.

    Entry points print it without a traceback and exit with status 2.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        where: object = None,
        fix: str | None = None,
    ) -> None:
        # A DataLoader makes the error of a worker process anew from its printed traceback; the message is at its end.
        what = what.rpartition(f"{__name__}.UserError: ")[2].rstrip("\n")
        parts = (("got", got), ("expected", expected), ("where", where), ("what to do", fix))
        super().__init__("\n".join([what, *(f"  {name}: {value}" for name, value in parts if value is not None)]))

    def __reduce__(self) -> tuple[type["RestoredError"], tuple[str]]:
        """Survive the trip from a worker process: the text is the whole state."""
        return RestoredError, (str(self),)


def worker_ended(error: BaseException) -> UserError | None:
    """The user's error for a worker that ended; torch raises it in the main thread, wherever that is. None: another."""
    text = str(error)
    if not text.startswith("DataLoader worker (pid") and "Communication with the workers" not in text:
        return None
    return UserError(
        "a worker process of the loader ended",
        got=text.splitlines()[0].strip(),
        fix="see its own message above, if any; one that was killed (signal 9) ran out of memory: use fewer WORKERS",
    )


class RestoredError(UserError):
    """A `UserError` that crossed a process border; its text is already laid out."""

    def __init__(self, text: str) -> None:
        super().__init__(text)


def one_of(names: Sequence[str]) -> str:
    """Names as "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to a mistyped one, as "a, b or c"; all of them (at most 20) when none is close."""
    names = sorted(known)
    return one_of(_close(name, names, count) or names[:20])


def mistype(what: str, got: str, known: Iterable[str], where: str, count: int = 3) -> UserError:
    """The error of a name that nobody knows, in one line: `what` it should be, `where` it is typed or listed."""
    names = list(known)
    helpful = 0 < len(names) <= 20 or _close(got, names, 1)
    hint = f": did you mean {nearest(got, names, count)}?" if helpful else ""
    return UserError(f"there is no {what} {got}{hint} ({where})")


def refuse_file(place: Path, variable: str) -> None:
    """UserError for a file where make's `variable` has to name a folder, which may be a new one."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{variable}={place} is a file: choose another folder")


def _close(name: str, names: Sequence[str], count: int) -> list[str]:
    """Names that begin with this one, the shortest first, then those that look like it."""
    begun = sorted((known for known in names if name and known.startswith(name)), key=len)
    alike = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    return list(dict.fromkeys([*begun, *alike]))[:count]
