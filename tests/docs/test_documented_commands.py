"""Commands written in docs/METHOD.md and in the recipes' headers: make knows them, and the real parsers take them."""

import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT, execute
from torch.distributed.run import get_args_parser

from pipelines.command import RECIPES, parse, recipe_section, value_of, with_flags
from pipelines.evaluate import EvaluateConfig
from pipelines.export import ExportConfig
from pipelines.fetch import FetchConfig
from pipelines.import_upstream import ImportConfig
from pipelines.inspect_cache import InspectConfig
from pipelines.plan import PlanConfig
from pipelines.prove import ProveConfig
from pipelines.repair import RepairConfig
from pipelines.report import ReportConfig
from pipelines.verify import VerifyConfig
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig

README = ROOT / "README.md"
PAGES = [ROOT / "docs" / "METHOD.md", *sorted(RECIPES.glob("*.yaml"))]
SECTIONS = {
    "pipelines.distill": (DistillConfig, "distill"),
    "pipelines.cache_teacher": (CacheTeacherConfig, "cache"),
    "pipelines.plan": (PlanConfig, "cache"),
}
OTHERS = {
    "pipelines.evaluate": EvaluateConfig, "pipelines.export": ExportConfig, "pipelines.report": ReportConfig,
    "pipelines.verify": VerifyConfig, "pipelines.inspect_cache": InspectConfig, "pipelines.prove": ProveConfig,
    "pipelines.fetch": FetchConfig, "pipelines.repair": RepairConfig, "pipelines.import_upstream": ImportConfig,
}  # fmt: skip
"""Commands without a recipe."""


def commands_of(page: Path) -> list[str]:
    """Whole commands of a page; what stands for something else (`...`, `[OPTION=]`) is none."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        text = re.sub(r"^#", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = re.findall(r"make (?:cache-teacher|distill) [^`\n]*|torchrun [^`\n]*", text)
    return [command for command in found if "..." not in command and "[" not in command]


def check(words: list[str]) -> None:
    """One `pipelines.<name> --option value ...`."""
    words = [word for word in words if word != "--dry-run"]
    if "--plugin" in words:
        place = words.index("--plugin")
        words = words[:place] + words[place + 2 :]
    if words[0] in OTHERS:
        words = with_flags(words, "--json", "--deep")
        parse(OTHERS[words[0]], words[0].partition(".")[2], words[1:], {}, "")
        return
    config_class, section = SECTIONS[words[0]]
    recipe = value_of(words, "--recipe") or "demo"  # a cache whose pixels are shared knows its own
    parse(config_class, section, words[1:], recipe_section(recipe, section), "")


def check_make(command: str) -> None:
    """One `make target NAME=value ...`: make knows it, and what make would run is understood."""
    words = shlex.split(command, comments=True)
    given = [] if any(word.startswith("RECIPE=") for word in words) else ["RECIPE=demo"]
    printed = execute("make", "-n", *words[1:], *given, "VENV=none", "CACHE=x").replace("\\\n", " ")
    calls = [line for line in printed.splitlines() if "pipelines." in line]
    assert calls, command
    for call in calls:
        call_words = shlex.split(call)
        check(call_words[next(i for i, word in enumerate(call_words) if word.startswith("pipelines.")) :])


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_commands_parse(page: Path) -> None:
    commands = commands_of(page)
    assert len(commands) >= {"METHOD": 13, "demo": 1}.get(page.stem, 3)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            assert options.module
            check([options.training_script, *options.training_script_args])
            continue
        check_make(command)


def test_switches_of_the_ablations_are_options() -> None:
    page = (ROOT / "docs" / "METHOD.md").read_text(encoding="utf-8")
    table = page.partition("## Ablations")[2].partition("## Cost")[0]
    switches = re.findall(r"scalekd\.\w+=\w+", table)
    assert len(switches) > 10
    for switch in switches:
        parse(DistillConfig, "distill", [f"--{switch}"], {}, "")
    names = next(line for line in table.splitlines() if line.startswith("| weights, temperature"))
    options = [name.removeprefix("scalekd.") for name in re.findall(r"`([\w.]+)`", names)]
    assert set(options) <= set(ScaleKDConfig.__dataclass_fields__)
    assert len(options) == 8


def readme_commands() -> list[str]:
    """Every `make ...` of the README: in blocks, in tables, in sentences; "..." stands for what is said before."""
    text = README.read_text(encoding="utf-8").replace("...", "")
    found = re.findall(r"^(make [^#\n]*)", text, re.MULTILINE) + re.findall(r"`(make [^`\n]+)`", text)
    return [command.strip() for command in found]


NEEDED = {"distill": "STUDENT=resnet50", "export": "RUN=run", "evaluate": "RUN=run", "fetch": "TEACHER=resnet50"}
"""What a command cannot do without, for those that a table shortens."""
OWN = ("help", "test", "test-all", "lint", "format", "study", "docs", "VENV=none")
"""Targets that run none of the pipelines."""


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme(command: str) -> None:
    target = shlex.split(command)[1]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert target in [*targets, "VENV=none"]
    if target in OWN or target.startswith("bench"):
        return
    name = NEEDED.get(target, "NPROC=1")
    check_make(
        command if f" {name.partition('=')[0]}=" in command and not command.endswith("=") else f"{command} {name}"
    )
