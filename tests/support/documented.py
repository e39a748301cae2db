"""Checks commands from the documents with make and the real parsers."""

import shlex
from collections.abc import Sequence
from typing import Any

from commands import execute

from pipelines.__main__ import SCALEKD
from pipelines.command import Command, Given
from scalekd_cache.config.options import build, options_of
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.training.configure import fitting_micro_batch

SECTIONS = {"distill": "distill", "cache-teacher": "cache", "plan": "cache"}


def given_by(name: str, words: list[str]) -> Given:
    """The options that the words of a command give, by dotted name."""
    command = SCALEKD.commands[name]
    assert isinstance(command, Command)
    return command.given_by(words)


def call(module: Any, words: Sequence[object]) -> int | None:
    """Run the command of a module of `pipelines/` in this process; its exit code."""
    return module.COMMAND.run_here([str(word) for word in words])


def check(name: str, words: list[str]) -> None:
    """One `scalekd <name> --option value ...`: its options exist and its values are valid."""
    command, given = SCALEKD.commands[name], given_by(name, words)
    assert isinstance(command, Command)
    recipe = given.get("recipe") or "demo"  # a cache whose pixels are shared knows its own
    section = recipe_section(recipe, SECTIONS[name]) if name in SECTIONS else {}
    for config_class in command.config_classes:
        names = [option.name for option in options_of(config_class)]
        own = {name: value for name, value in given.items() if name in names}
        values = section if config_class is command.config_classes[0] else {}
        build(config_class, values, fitting_micro_batch(values, own) if name == "distill" else {}, own)


def check_scalekd(text: str) -> None:
    """One `scalekd command --option value ...`; options of SLURM scripts and pipes are not part of it."""
    program, name, *words = shlex.split(text, comments=True)
    assert program == "scalekd"
    check(name, words)


def check_make(text: str) -> None:
    """One `make target NAME=value ...`: make knows it, and what make would run is understood."""
    words = shlex.split(text, comments=True)
    cache = ["CACHE=x"] if "cache" in PLAIN_NAMES[words[1]] and "CACHE=" not in text and words[1] != "report" else []
    printed = execute("make", "-n", *words[1:], "VENV=none", *cache).replace("\\\n", " ")
    calls = [line for line in printed.splitlines() if "-m pipelines " in line]
    assert calls, text
    for call in calls:
        words_of_call = shlex.split(call.partition("-m pipelines ")[2])
        check(words_of_call[0], words_of_call[1:])
