"""Converts `make` variables to options: `make distill STUDENT=x` runs `scalekd distill --student x`.

In: a target and `NAME=value` words. Out: shell-quoted options, or a one-line error with exit code 2.
Invariant: this file imports only the standard library, so that mistyped variables are reported before the virtual
environment exists.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scalekd_cache.config.places import default_cache, teacher_folders
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.errors import UserError, closest_names, unknown_name

MAKE_ONLY = {"PYTHON", "VENV", "JOBS", "ARGS", "SHELL", "OMP_NUM_THREADS", "BENCHES", "GPU_BENCHES"}
"""Variables that the Makefile itself uses for every target."""
BENCHMARKS = {
    "bench-codec": ("cache", "features", "ids", "head", "name"),
    "bench-scale": ("check",),
    "study": ("suite", "data", "teacher_weights", "teacher", "hours", "results", "plan"),
}
SWITCHES = {("bench-scale", "check"), ("study", "plan")}
"""Benchmark options that take no value."""
READ_BY_MAKE = ("cache", "data", "teachers", "follow", "resume", "extend", "json", "dry-run")
"""Options of `distill` that the Makefile looks at, so they cannot be set in SET."""
STAGES = {"cache-teacher", "distill"}
"""`make distill` runs `make cache-teacher` if the cache is missing, so it accepts the variables of both stages."""


def options(target: str, words: Sequence[str], level: int = 0) -> list[str]:
    """The options for a target.

    Args:
        target: the target of make.
        words: the variables set on the command line, as NAME=value.
        level: make's MAKELEVEL, above 0 if another make started this one.

    Raises:
        UserError: a variable is unknown; the message suggests the closest one.
    """
    names = set(PLAIN_NAMES.get(target, BENCHMARKS.get(target, ())))
    both = target == "distill" or (target == "cache-teacher" and level > 0)
    others = set().union(*(PLAIN_NAMES[stage] for stage in STAGES)) if both else set()
    command = target in PLAIN_NAMES
    known = {name.upper() for name in names | others} | MAKE_ONLY | ({"SET", "PLUGIN"} if command else set())
    found = []
    for word in words:
        variable, _, value = word.partition("=")
        if variable not in known:
            where = f"make {target}; `make help` lists the commands"
            where += '; SET="option=value" sets any other option' if command else ""
            if variable.upper() in known:
                raise UserError(f"there is no variable {variable}: did you mean {variable.upper()}? ({where})")
            if target in STAGES and variable.lower() in PLAIN_NAMES["distill"]:
                raise UserError(f"{variable} applies to make distill, not to make {target}")
            raise unknown_name("variable", variable, known - MAKE_ONLY or known, where, 1)
        name = variable.lower()
        if variable == "SET":
            dotted = [_dotted(pair) for pair in value.split()]
            if target == "distill":
                _check_not_read_by_make(dotted)
            found += dotted
        elif (target, name) in SWITCHES:
            found += [f"--{name}"] if value not in ("", "0") else []
        elif (name in names or variable == "PLUGIN") and value:
            found += [f"--{name.replace('_', '-')}", value]
    given = {word.partition("=")[0] for word in found}
    if target == "distill" and not {"--student", "--student.name", "--resume", "--extend"} & given:
        raise UserError("set STUDENT, for example `make distill STUDENT=resnet50`")
    if target == "distill" and not _values(words).keys() & {"CACHE", "DATA", "TEACHERS", "RESUME", "EXTEND", "RUN"}:
        _check_demo_is_meant()
    return found


def _check_not_read_by_make(dotted: Sequence[str]) -> None:
    """Raise `UserError` if SET has an option that the Makefile looks at."""
    for name in (word.partition("=")[0].removeprefix("--").replace("_", "-") for word in dotted):
        if name in READ_BY_MAKE:
            variable = name.replace("-", "_").upper()
            raise UserError(f"set {variable}=... instead of SET={name}=..., because make itself reads it")


def _check_demo_is_meant() -> None:
    """Raise `UserError` if `make distill` without CACHE and DATA would make the demo's cache beside other caches."""
    demo = Path(default_cache("demo"))
    others = sorted(str(file.parent) for file in demo.parent.glob("*/manifest.json"))
    if others and not demo.exists():
        raise UserError(f"set CACHE, for example CACHE={others[0]}, or DATA=demo to make the cache of the demo")


def unused(words: Sequence[str]) -> list[str]:
    """The variables that `make distill` uses only to create a cache, and whose values the cache does not have; TEACHERS
    also names the cache."""
    own, given, names = {*PLAIN_NAMES["distill"], "teachers"}, _values(words), PLAIN_NAMES["cache-teacher"]
    only = {name: given[name.upper()] for name in names if name.upper() in given and name not in own}
    stored = _stored(Path(place(words)) / "manifest.json")
    return [name.upper() for name, value in only.items() if value.lower() != stored.get(names[name])]


def _stored(manifest: Path) -> dict[str, str]:
    """A cache's options by dotted name, as lower-case text; empty if the manifest cannot be read."""
    try:
        kept = json.loads(manifest.read_bytes())
        groups = {
            "views": kept["view_recipe"],
            "teacher": kept["teacher"]["config"],
            "cache": {**kept, "codec": kept["codec"]["id"]},
        }
        return {
            f"{group}.{name}": str(value).lower() for group, found in groups.items() for name, value in found.items()
        }
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # the command itself reports a damaged manifest
        return {}


def place(words: Sequence[str]) -> str:
    """The cache that `make distill` uses; for several teachers, the default ones, comma-separated."""
    given = _values(words)
    names = [name.strip() for name in given["TEACHERS"].split(",")] if "TEACHERS" in given else []
    folders = [f"/{folder}" for folder in teacher_folders(names)] or [""]
    return given.get("CACHE") or ",".join(default_cache(given.get("DATA", "demo")) + folder for folder in folders)


def _values(words: Sequence[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in words)
    return {variable: value for variable, _, value in pairs if value}


def _dotted(pair: str) -> str:
    if "=" not in pair:
        raise UserError(f'SET="{pair}" has no value: write SET="option=value option=value"')
    return f"--{pair.removeprefix('--')}"


def main(words: Sequence[str]) -> int:
    """Print what the Makefile needs.

    `help`: the commands and variables; `place NAME=value...`: the caches of `make distill`; `unused NAME=value...`: a
    note if variables have no effect on an existing cache; `target NAME KNOWN...`: the error for an unknown target;
    `options LEVEL TARGET NAME=value...`: the options.
    """
    kind, *words = words
    if kind == "help":
        print("Commands (NAME=value sets --name value; python -m pipelines COMMAND --help lists all options):")
        print("\n".join(f"  make {name:<16} {' '.join(names).upper()}" for name, names in PLAIN_NAMES.items()))
        return 0
    if kind == "place":
        print(place(words))
        return 0
    if kind == "unused":
        if names := ", ".join(unused(words)):
            how = "to add views, run make cache-teacher; for other changes, set a different CACHE"
            print(f"note: the cache {place(words)} is not changed; ignored: {names} ({how})", file=sys.stderr)
        return 0
    first, *rest = words
    if kind == "target":
        hint = f": did you mean {closest_names(first, rest)}?"
        print(f"error: there is no target {first}{hint} (make help)", file=sys.stderr)
        return 2
    try:
        print(shlex.join(options(rest[0], rest[1:], int(first))))
    except UserError as error:
        print(f"error: {error}")  # the Makefile checks the first word
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
