"""From what a user types to a checked configuration; shared by the commands of this folder.

In: argv and a recipe. Out: a configuration dataclass; for whatever the user can put right, one message and status 2.
"""

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from scalekd_cache.caching.job_plan import check_recipe
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.distributed import RunInterrupted
from scalekd_cache.errors import UserError, join_or, unknown_name, worker_failure

ALWAYS = "Also: --debug (the traceback of an error), --plugin MODULE (import a module of yours first)."
BAD_VALUE = re.compile(
    r'Parser key "(?P<option>.+?)":\s+Expected (?:an? )?(?P<kind>.+?)\. Got value: (?P<got>.*)', re.DOTALL
)
UNKNOWN_OPTION = re.compile(r"--(?P<typed>[\w.-]+)|(?:Group '(?P<group>[\w.-]+)' .*)?[Oo]ption '(?P<written>[\w.-]+)'")
"""On a command line, or in a recipe."""
Config = TypeVar("Config")


class Parser(ArgumentParser):
    """A parser whose errors are `UserError`s of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Turn a mistype into one clear message."""
        if isinstance(ex, UserError):
            raise ex
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        raise misunderstood(message, options)


def misunderstood(message: str, options: Sequence[str]) -> UserError:
    """What jsonargparse says of an option, in one line with the nearest right thing; `options` begin with --."""
    value = BAD_VALUE.search(message)
    if value:
        option, kind, got = value["option"], value["kind"], value["got"]
        known = re.findall(r"[^\s',]+", kind.partition("Literal[")[2].rstrip("]"))
        expected = join_or(known) if known else kind.removeprefix("<class '").removesuffix("'>")
        return UserError(f"{option} cannot be {got}: expected {expected} (--help)")
    unknown = UNKNOWN_OPTION.search(message)
    if unknown and "expected" not in message:
        name = unknown["typed"] or ".".join(filter(None, unknown.group("group", "written")))
        return unknown_name("option", f"--{name}", options, "--help lists all")
    return UserError(f"the command line is not understood: {' '.join(message.split())} (--help)")


def check_recipe_given(argv: Sequence[str], kept: Mapping[str, Any], where: object) -> None:
    """A recipe that is named (RECIPE=) must have the views `kept` in a cache; without a name the cache's views count.

    A cache may hold other views than its own recipe, set by `views.*` options of stage 1.

    Raises:
        UserError: naming each view option that differs.
    """
    recipe = value_of(argv, "--recipe")
    if recipe:
        views = parse(CacheTeacherConfig, "cache_teacher", [], recipe_section(recipe, "cache"), "").views
        check_recipe(kept, recipe, to_plain(views), where)


def parse(config_class: type[Config], command: str, argv: Sequence[str], recipe: dict[str, Any], about: str) -> Config:
    """A configuration from its defaults, then the recipe, then the command line.

    Every field of the dataclass is a typed option with its docstring as help. Unknown keys, in either, are errors.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=f"python -m pipelines.{command}", description=f"{about} {ALWAYS}")
    parser.add_class_arguments(config_class, as_positional=False)
    try:
        base = parser.parse_object(recipe) if recipe else None
        options = parser.instantiate(parser.parse_args(list(argv), namespace=base))
        return config_class(**{name: getattr(options, name) for name in config_class.__dataclass_fields__})  # type: ignore[attr-defined]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError("the configuration is not understood", got=error, fix="see --help") from error


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of one option on the command line, before everything is parsed."""
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def check_cache_place(place: str) -> None:
    """A mistyped path is no unfinished cache: `UserError` for a file, or for nothing, with the nearest caches."""
    path = Path(place)
    if "://" in place or path.is_dir():
        return
    if path.is_file():
        folder = path.parent
        holds = (folder / "manifest.json").exists()
        fix = f"CACHE={folder}" if holds else "the folder of a cache (CACHE=)"
        raise UserError(f"{place} is a file, no cache: give {fix}")
    there = [str(file.parent) for file in path.absolute().parent.glob("*/manifest.json")]
    there = [os.path.relpath(folder) if not path.is_absolute() else folder for folder in there]
    raise unknown_name("cache", place, there, f"CACHE=; `make cache-teacher CACHE={place}` makes it")


def without_flag(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """A command line without a flag of its own, and whether it was there."""
    return [word for word in argv if word != flag], flag in argv


def with_flags(argv: Sequence[str], *options: str) -> list[str]:
    """A command line in which these options may stand without a value, which then is true."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        words.append(word)
        if word in options and following.lower() not in ("true", "false"):
            words.append("true")
    return words


def with_plugin(argv: list[str]) -> list[str]:
    """The command line without `--plugin module`, whose module is imported: teachers and students of one's own."""
    name = value_of(argv, "--plugin")
    if name is None:
        return argv
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except ImportError as error:
        fix = "give the name of a Python module that can be imported here, such as examples.my_teacher"
        raise UserError("the plugin cannot be imported", got=error, expected=fix, where=f"PLUGIN={name}") from error
    index = argv.index("--plugin") if "--plugin" in argv else argv.index(f"--plugin={name}")
    return argv[:index] + argv[index + (2 if "--plugin" in argv else 1) :]


def run(main: Callable[[list[str]], object]) -> NoReturn:
    """Run a command: 0 done, 1 checked and found wanting, 2 something to put right, 75 saved and to be started again,
    130 stopped by the user, 141 nobody reads the output any more."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed's launcher adds --local_rank; it says the same in the environment, where `processes.py` reads it.
    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    debug = "--debug" in argv
    try:
        status = main(with_plugin([word for word in argv if word != "--debug"]))
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        _exit(2)
    except RunInterrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        _exit(stop.exit_code)
    except RuntimeError as error:
        ended = worker_failure(error)  # the only RuntimeError that a user can do something about
        if debug or ended is None:
            raise
        print(f"error: {ended}", file=sys.stderr, flush=True)
        _exit(2)
    except BrokenPipeError:  # what reads our output (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(141)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr, flush=True)
        _exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _exit(status: int) -> NoReturn:
    """Leave at once: peers and loader workers must not keep a failed process waiting."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
