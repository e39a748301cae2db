"""`UserError`, the exception for errors that the user can fix, and imports of optional packages that raise it.

Its message has up to five parts in a fixed order.
Invariant: every error that the user can fix (a typo, a damaged file, a full disk) raises it; `assert` is for bugs.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

CLEAR_LINE = "\r\x1b[K"
"""Clears the current terminal line."""


class RunInterrupted(Exception):  # noqa: N818 - not an error
    """The run stopped early and can be resumed.

    Args:
        text: the message shown to the user.
        exit_code: the exit code of the process.
    """

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class UserError(Exception):
    """An error that the user can fix: what is wrong, what was found, what was expected, where, and what to do.

    The commands print it without a traceback and exit with code 2.

    Args:
        what: what is wrong, in one line.
        got: what was found.
        expected: what was expected instead.
        where: the file, option or location.
        fix: what to do.
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
        # A DataLoader recreates a worker's error from its formatted traceback, which ends with the message.
        what = what.rpartition(f"{__name__}.UserError: ")[2].rstrip("\n")
        parts = (("got", got), ("expected", expected), ("where", where), ("what to do", fix))
        text = "\n".join([what, *(f"  {name}: {value}" for name, value in parts if value is not None)])
        super().__init__(printable(text))

    def __reduce__(self) -> tuple[type["RestoredError"], tuple[str]]:
        """Keep only the text when a worker process sends the error."""
        return RestoredError, (str(self),)


def worker_failure(error: BaseException) -> UserError | None:
    """Convert torch's error for a dead DataLoader worker to a `UserError`; return None for any other error.

    Torch can raise that error at any line of the main thread.
    """
    text = str(error)
    # The pipe to an exited worker raises these. An error raised inside a worker begins with "Caught".
    closed = type(error) in (EOFError, ConnectionResetError) and not text.startswith("Caught ")
    if not closed and not text.startswith("DataLoader worker (pid") and "Communication with the workers" not in text:
        return None
    return UserError(
        "a data loader worker died",
        got="its pipe is closed" if closed else text.splitlines()[0].strip(),
        fix="see the worker's error above, if any; a killed worker probably ran out of memory: lower --workers",
    )


@contextlib.contextmanager
def worker_failures() -> Iterator[None]:
    """Raise `UserError` where torch reports a dead DataLoader worker, the only RuntimeError that a user can fix."""
    try:
        yield
    except RuntimeError as error:
        ended = worker_failure(error)
        if ended is None:
            raise
        raise ended from error


class RestoredError(UserError):
    """A `UserError` from another process, with its text already formatted."""

    def __init__(self, text: str) -> None:
        super().__init__(text)


def join_or(names: Sequence[str]) -> str:
    """Names as "a, b or c"."""
    return " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 epoch", "1,438 images", "2 classes". `plural` is needed for multi-word nouns."""
    return f"{count:,} {noun if count == 1 else plural or noun + ('es' if noun.endswith(('s', 'tch')) else 's')}"


def some_of(names: Sequence[str], shown: int = 3) -> str:
    """The first names, such as "a, b, c and 2 more"."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def shell_command(name: str, /, **options: object) -> str:
    """A shell command for a message, such as `scalekd repair --cache 'my cache'`. Values are quoted; options that are
    None are left out."""
    given = [(option, value) for option, value in options.items() if value is not None]
    words = [word for option, value in given for word in (f"--{option.replace('_', '-')}", str(value))]
    return shlex.join(["scalekd", name, *words])


def closest_names(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, as "a, b or c". If none is close, up to 20 known names."""
    names = sorted(known)
    return join_or(close_names(name, names, count) or names[:20])


def unknown_name(what: str, got: str, known: Iterable[str], where: str, count: int = 3, listed: int = 20) -> UserError:
    """A one-line error for an unknown name that suggests the closest known names.

    Args:
        what: the kind of name, such as model, recipe or option.
        got: the unknown name.
        known: the valid names.
        where: where the name was given, or where valid names are listed.
        count: maximum number of suggestions.
        listed: if no name is close, all names are listed unless there are more than this.
    """
    names = sorted(known)
    close = close_names(got, names, count)
    if close:
        hint = f": did you mean {join_or(close)}?"
    else:
        hint = f": choose {join_or(names)}" if 0 < len(names) <= listed else ""
    return UserError(f"there is no {what} {got}{hint} ({where})")


def is_text(name: str) -> bool:
    """Whether a name can be encoded as UTF-8. File names can contain any bytes."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def printable(text: str) -> str:
    """A text that can be encoded as UTF-8: the bytes of file names that are not UTF-8 are written as \\udcXX."""
    return text.encode("utf-8", "backslashreplace").decode()


def require_folder(place: Path, option: str) -> None:
    """Raise `UserError` if `place`, set by `option`, is a file. The folder need not exist yet."""
    if place.exists() and not place.is_dir():
        raise UserError(f"{option} {place} is a file; choose a folder")


def close_names(name: str, names: Sequence[str], count: int) -> list[str]:
    """Dotted options that end in this name; if there are none, names that start with it, then similar names, first in
    the same group of options. Options are compared without their leading dashes."""
    bare, typed = {_bare(known): known for known in names}, _bare(name)
    if options := [known for one, known in bare.items() if "." in one and one.rpartition(".")[2] == typed]:
        return options[:count]
    completions = sorted((one for one in bare if typed and one.startswith(typed)), key=len)
    group = typed[: typed.rfind(".") + 1]
    inside = [one.removeprefix(group) for one in bare if group and one.startswith(group)]
    similar = [group + one for one in difflib.get_close_matches(typed.removeprefix(group), inside, count, 0.5)]
    similar = similar or difflib.get_close_matches(typed, bare, count, 0.5)
    return [bare[one] for one in dict.fromkeys([*completions, *similar])][:count]


def _bare(name: str) -> str:
    """An option as its name in Python; any other name unchanged."""
    return name.removeprefix("--").replace("-", "_") if name.startswith("--") else name


def import_optional(module: str, need: str, extra: str) -> ModuleType:
    """Import a module from an optional package.

    Args:
        module: the module's name.
        need: the start of the error message, such as "parquet files need pyarrow".
        extra: the scalekd-cache extra that installs the package.

    Raises:
        UserError: the package is not installed or cannot be imported.
    """
    install = f"pip install 'scalekd-cache[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name != module.partition(".")[0]  # a package that it needs; otherwise, got adds nothing
        raise UserError(f"{need}, which is not installed", got=error if missing else None, fix=install) from error
    except Exception as error:  # a broken package can raise anything
        package = module.partition(".")[0]
        raise UserError(
            f"{need}, which is installed but cannot be imported",
            got=f"{type(error).__name__}: {error}",
            where=_installed_as(package),
            fix=f"install a version of {package} that is compatible with the other packages: {install}",
        ) from error


def _installed_as(package: str) -> str:
    """A package name with the installed version, if known."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
