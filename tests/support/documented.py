"""Checks commands from the documents with make and the real parsers."""

import shlex

from commands import execute

from pipelines.command import parse, value_of, with_flags
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
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig

SECTIONS = {
    "pipelines.distill": (DistillConfig, "distill"),
    "pipelines.cache_teacher": (CacheTeacherConfig, "cache"),
    "pipelines.plan": (PlanConfig, "cache"),
}


OTHERS = {
    "pipelines.evaluate": EvaluateConfig,
    "pipelines.export": ExportConfig,
    "pipelines.report": ReportConfig,
    "pipelines.verify": VerifyConfig,
    "pipelines.inspect_cache": InspectConfig,
    "pipelines.prove": ProveConfig,
    "pipelines.fetch": FetchConfig,
    "pipelines.repair": RepairConfig,
    "pipelines.import_upstream": ImportConfig,
}
"""Commands without a recipe."""


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
    recipe = value_of(words, "--recipe") or "demo"  # a cache with shared pixels has no data option
    parse(config_class, section, words[1:], recipe_section(recipe, section), "")


def check_make(command: str) -> None:
    """Check one `make target NAME=value ...`: the target exists, and the parsers accept what make would run."""
    words = shlex.split(command, comments=True)
    given = [] if any(word.startswith("RECIPE=") for word in words) else ["RECIPE=demo"]
    printed = execute("make", "-n", *words[1:], *given, "VENV=none", "CACHE=x").replace("\\\n", " ")
    calls = [line for line in printed.splitlines() if "pipelines." in line]
    assert calls, command
    for call in calls:
        call_words = shlex.split(call)
        check(call_words[next(i for i, word in enumerate(call_words) if word.startswith("pipelines.")) :])
