"""Commands in README, reference, docs/METHOD.md and the headers of recipes: make and the real parsers accept them."""

import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT
from documented import check, check_make, check_scalekd
from torch.distributed.run import get_args_parser

from scalekd_cache.config.options import build
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.recipes import RECIPES
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig

README = ROOT / "README.md"
PAGES = [ROOT / "docs" / "METHOD.md", *sorted(RECIPES.glob("*.yaml"))]


def commands_of(page: Path) -> list[str]:
    """Complete commands of a page, without those that have placeholders (`...`, `[OPTION=]`)."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        text = re.sub(r"^#", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = re.findall(r"(?:make|scalekd) (?:cache-teacher|distill) [^`\n]*|torchrun [^`\n]*", text)
    return [command for command in found if "..." not in command and "[" not in command]


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_commands_parse(page: Path) -> None:
    commands = commands_of(page)
    assert len(commands) >= {"METHOD": 13, "demo": 1}.get(page.stem, 3)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            assert options.module
            check(options.training_script.removeprefix("pipelines.").replace("_", "-"), options.training_script_args)
            continue
        (check_make if words[0] == "make" else check_scalekd)(command)


def test_switches_of_the_ablations_are_options() -> None:
    page = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8")
    table = page.partition("## Ablations")[2].partition("## Cost")[0]
    switches = re.findall(r"--(scalekd\.\w+) ([\w-]+)", table)
    assert len(switches) > 10
    for name, value in switches:
        build(DistillConfig, {name: value})
    names = next(line for line in table.splitlines() if line.startswith("| weights, temperature"))
    options = [name.removeprefix("scalekd.") for name in re.findall(r"`([\w.]+)`", names)]
    assert set(options) <= set(ScaleKDConfig.__dataclass_fields__)
    assert len(options) == 8


README_PAGES = (README, ROOT / "docs" / "reference" / "cli.md")


def shown_commands(program: str) -> list[str]:
    """Every command of a program in README and CLI reference, in blocks, tables and sentences, without "..."."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in README_PAGES).replace("...", "")
    found = re.findall(rf"^({program} [^#\n]*)", text, re.MULTILINE) + re.findall(rf"`({program} [^`\n]+)`", text)
    return sorted({command.strip() for command in found if "<command>" not in command})


NEEDED = {"distill": "STUDENT=resnet50", "export": "RUN=run", "evaluate": "RUN=run", "fetch": "TEACHER=resnet50"}
"""Required options, for commands that a table abbreviates."""
OWN = ("help", "test", "test-all", "lint", "format", "study", "docs", "VENV=none")
"""Targets that run none of the pipelines."""


@pytest.mark.parametrize("command", shown_commands("make"))
def test_make_commands_of_the_readme(command: str) -> None:
    target = shlex.split(command)[1]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert target in [*targets, *PLAIN_NAMES, "VENV=none"]
    if target in OWN or target.startswith("bench"):
        return
    name = NEEDED.get(target, "JOBS=2")
    check_make(
        command if f" {name.partition('=')[0]}=" in command and not command.endswith("=") else f"{command} {name}"
    )


@pytest.mark.parametrize("command", [command for command in shown_commands("scalekd") if "--help" not in command])
def test_scalekd_commands_of_readme_and_reference(command: str) -> None:
    name, value = f"{NEEDED.get(shlex.split(command)[1], 'x=x')}".lower().split("=")
    option = [f"--{name}", value] if name != "x" and f"--{name}" not in shlex.split(command)[:-1] else []
    words = shlex.split(command.removesuffix(f" --{name}"))
    check_scalekd(shlex.join([*words, *option]))
