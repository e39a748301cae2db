"""The help of a command shows the defaults that a user gets."""

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from pipelines.__main__ import SCALEKD
from pipelines.command import COMPLETION
from pipelines.plan import PlanConfig
from scalekd_cache.caching.configure import cache_teacher_config
from scalekd_cache.config.base import flat, to_plain
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.training.configure import distill_config_before_cache

COMPUTED = {"workers", "train.workers", "cache", "cache.path", "recipe", "student.name"}
"""Options whose default the help gives in words."""
STAGE1 = {"cache-teacher": CacheTeacherConfig, "plan": PlanConfig}


def defaults(command, *words):
    """The help of each option -> the default it shows, by dotted name; empty for none."""
    text = CliRunner().invoke(SCALEKD, [command, *words, "--help"]).output
    starts = [(match.start(), match[1]) for match in re.finditer(r"^  (--\S.*)$", text, re.MULTILINE)]
    found = {}
    for (start, first), (end, _) in zip(starts, [*starts[1:], (len(text), "")], strict=True):
        entry = " ".join(text[start:end].split("\n\n")[0].split())
        name = re.findall(r"--([\w.-]+)", re.split(r"\s{2,}", first)[0])[-1]
        shown = re.search(r"\[((?:default: |required)[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*)\]$", entry)
        found[name if "." in name else name.replace("-", "_")] = shown[1] if shown else ""
    return found


def config_of(command, given, recipe):
    """What a user gets with these options."""
    if command == "distill":
        return distill_config_before_cache({**given, "recipe": recipe, "student.name": "resnet18"})
    return cache_teacher_config(STAGE1[command], {name.replace("data", "data.source"): given[name] for name in given})


@pytest.mark.parametrize("command", ["cache-teacher", "distill", "plan"])
@pytest.mark.parametrize(
    ("given", "recipe", "words"),
    [
        ({}, "demo", ()),
        ({"data": "photos"}, "traditional", ()),
        ({"recipe": "cifar10"}, "cifar10", ("--recipe", "cifar10")),
    ],
)
def test_the_default_of_every_option_is_what_a_user_gets(command, given, recipe, words):
    shown = defaults(command, *words)
    values = flat(to_plain(config_of(command, given, recipe)))
    if command == "plan":
        values["epochs"] = config_of("distill", {}, recipe).train.epochs
    for name in set(values) - COMPUTED - {"data", "data.source"}:
        value = values[name]
        if isinstance(value, list):
            value = "[" + ",".join(f"{part:.3g}" for part in value) + "]"
        text = str(value).lower() if isinstance(value, bool) else value
        if text is None and shown[name]:  # only the other recipe has a value
            assert f"(recipe {recipe})" not in shown[name], name
        elif f"{text} (recipe {recipe})" not in shown[name]:
            assert shown[name] == ("" if text in (None, "", "false") else f"default: {text}"), name


@pytest.mark.parametrize("command", sorted(SCALEKD.commands))
def test_numbers_and_switches_that_are_on_have_a_default_in_the_help(command):
    for config_class in SCALEKD.commands[command].config_classes:
        own = {name: value for name, value in defaults(command).items() if name in config_class.__dataclass_fields__}
        for name, shown in own.items():
            default = config_class.__dataclass_fields__[name].default
            if isinstance(default, int | float) and default is not False:
                assert shown, name


def completed(*words):
    """What bash completes after these words: lines of `plain,value`, or `file,value` for paths."""
    line = {"COMP_WORDS": shlex.join(["scalekd", *words]), "COMP_CWORD": str(len(words))}
    return CliRunner(env={**line, COMPLETION: "bash_complete"}).invoke(complete_scalekd).output.split()


@click.command()
def complete_scalekd():
    SCALEKD.main([], prog_name="scalekd", complete_var=COMPLETION)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("distill", "--cache", "caches/ph"), ["file,caches/ph"]),
        (("distill", "--recipe", "traditional-"), ["plain,traditional-mobilenet", "plain,traditional-swin-s"]),
        (("distill", "--recipe", "./mine"), ["file,./mine"]),
        (("pull", "pub"), ["file,pub"]),
        (("distill", "--heads", "li"), ["plain,lite", "plain,linear", "plain,linear-tpp"]),
        (("distill", "--epochs", "1"), []),
        (("evaluate", "--ru"), ["plain,--run"]),
        (("distil", "--ca"), []),
    ],
)
def test_bash_completes_names_and_paths(words, found):
    assert completed(*words) == found


def test_every_option_whose_help_names_a_file_or_folder_completes_paths():
    named, complete = set(), set()
    for command in SCALEKD.commands.values():
        for name, option in command.own.items():
            if option.info.annotation in (str, str | None):
                named |= {name} if re.search(r"\b(folder|\.?\w+ file|path)\b", option.help) else set()
                shown = next(param.opts[0] for param in command.params if param.name == name.replace(".", "__"))
                complete |= {name} if completed(command.name, shown, "./x") == ["file,./x"] else set()
    assert named - complete == {"format", "key", "teachers", "push"}  # names, or folders of results
    assert {"cache", "data", "run", "teacher.weights", "hostfile", "runs"} < complete
    assert completed("import-upstream", "--classes", "./x") == []  # a number
