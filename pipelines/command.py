"""Command line parsing and exit codes, shared by all commands of this folder.

In: argv and a recipe. Out: a configuration dataclass.
Invariant: an error that the user can fix prints one message without a traceback and exits with code 2.
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

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.recipes import check_recipe, recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.errors import RunInterrupted, UserError, join_or, unknown_name, worker_failure

ALWAYS = "Also: --debug (print the traceback of an error), --plugin MODULE (import this Python module first)."
BAD_VALUE = re.compile(
    r'Parser key "(?P<option>.+?)":\s+Expected (?:an? )?(?P<kind>.+?)\. Got value: (?P<got>.*)', re.DOTALL
)
UNKNOWN_OPTION = re.compile(r"--(?P<typed>[\w.-]+)|(?:Group '(?P<group>[\w.-]+)' .*)?[Oo]ption '(?P<written>[\w.-]+)'")
"""On a command line, or in a recipe."""
Config = TypeVar("Config")


class Parser(ArgumentParser):
    """A parser whose errors are `UserError`s of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise jsonargparse's error as a `UserError` of one line."""
        if isinstance(ex, UserError):
            raise ex
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        raise option_error(message, options)


def option_error(message: str, options: Sequence[str]) -> UserError:
    """jsonargparse's error message in one line, with the closest valid option; `options` start with --."""
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
    return UserError(f"invalid command line: {' '.join(message.split())} (--help)")


def check_recipe_given(argv: Sequence[str], kept: Mapping[str, Any], where: object) -> None:
    """A recipe given by RECIPE= must have the view options `kept` of the cache; without RECIPE= there is no check.

    The views of a cache may differ from its recipe, through `views.*` options of stage 1.

    Raises:
        UserError: view options differ; the message names each.
    """
    recipe = value_of(argv, "--recipe")
    if recipe:
        views = parse(CacheTeacherConfig, "cache_teacher", [], recipe_section(recipe, "cache"), "").views
        check_recipe(kept, recipe, to_plain(views), where)


def parse(config_class: type[Config], command: str, argv: Sequence[str], recipe: dict[str, Any], about: str) -> Config:
    """A configuration: defaults, overridden by the recipe, overridden by the command line.

    Every field of the dataclass is a typed option with its docstring as help. Unknown keys are errors.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=f"python -m pipelines.{command}", description=f"{about} {ALWAYS}")
    parser.add_class_arguments(config_class, as_positional=False)
    try:
        base = parser.parse_object(recipe) if recipe else None
        options = parser.instantiate(parser.parse_args(list(argv), namespace=base))
        return config_class(**{name: getattr(options, name) for name in config_class.__dataclass_fields__})  # type: ignore[attr-defined]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError("invalid configuration", got=error, fix="see --help") from error


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of one option, before the command line is parsed."""
    for index, word in enumerate(argv):
        if word == option and index + 1 < len(argv):
            return argv[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def check_cache_path(place: str) -> None:
    """`UserError` if `place` is a file or does not exist; the message names similar caches. URLs are not checked."""
    path = Path(place)
    if "://" in place or path.is_dir():
        return
    if path.is_file():
        folder = path.parent
        holds = (folder / "manifest.json").exists()
        fix = f"CACHE={folder}" if holds else "CACHE= to a cache folder"
        raise UserError(f"{place} is a file, not a cache: set {fix}")
    there = [str(file.parent) for file in path.absolute().parent.glob("*/manifest.json")]
    there = [os.path.relpath(folder) if not path.is_absolute() else folder for folder in there]
    raise unknown_name("cache", place, there, f"CACHE=; create it with `make cache-teacher CACHE={place}`")


def without_flag(argv: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """A command line without `flag`, and whether it had it."""
    return [word for word in argv if word != flag], flag in argv


def with_flags(argv: Sequence[str], *options: str) -> list[str]:
    """A command line in which each of these options without a value gets the value true."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        words.append(word)
        if word in options and following.lower() not in ("true", "false"):
            words.append("true")
    return words


def import_plugin(argv: list[str]) -> list[str]:
    """The command line without `--plugin MODULE`, after importing that module (custom teachers and students)."""
    name = value_of(argv, "--plugin")
    if name is None:
        return argv
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except ImportError as error:
        fix = "the name of a Python module that can be imported from this folder, such as examples.my_teacher"
        raise UserError("the plugin cannot be imported", got=error, expected=fix, where=f"PLUGIN={name}") from error
    index = argv.index("--plugin") if "--plugin" in argv else argv.index(f"--plugin={name}")
    return argv[:index] + argv[index + (2 if "--plugin" in argv else 1) :]


def run(main: Callable[[list[str]], object]) -> NoReturn:
    """Run a command and exit.

    Exit codes: 0 success, 1 check failed, 2 usage error or invalid input, 75 checkpointed: rerun to resume,
    130 interrupted, 141 the reader of the output closed the pipe.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed's launcher adds --local_rank. `distributed.py` reads the same value from the environment.
    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    debug = "--debug" in argv
    try:
        status = main(import_plugin([word for word in argv if word != "--debug"]))
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
        ended = worker_failure(error)  # the only RuntimeError that a user can fix
        if debug or ended is None:
            raise
        print(f"error: {ended}", file=sys.stderr, flush=True)
        _exit(2)
    except BrokenPipeError:  # the reader of our output (head, less) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _exit(141)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr, flush=True)
        _exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _exit(status: int) -> NoReturn:
    """Exit without waiting for other ranks or for loader workers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
