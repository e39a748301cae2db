"""Forecast the cost of a cache and its students before running anything."""

import contextlib
import json
import sys
from typing import Any

from pipelines.command import STAGE1_DEFAULTS, Command, Given, run
from scalekd_cache.caching.configure import cache_teacher_config, stored_facts
from scalekd_cache.config.base import flat, require
from scalekd_cache.config.options import build, options_class
from scalekd_cache.config.recipes import recipe_section, training_options
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import ManifestFacts


@options_class()
class PlanConfig(CacheTeacherConfig):
    """Options of `plan`, in addition to all stage-1 options."""

    students: int = 8
    """Number of students to train from the cache."""
    epochs: int | None = None
    """Training epochs per student."""
    gpu: str | None = None
    """GPU model for GPU-hour estimates (default: this machine's GPU, if there is one): b200, h200, h100,
    h100-pcie, mi300x, a100, l40s, a10, l4, rtx4090."""
    heads: str | None = None
    """ScaleKD heads: cap, lite or linear (default: the recipe's, otherwise cap)."""
    feature_share: float | None = None
    """Fraction of samples used by the feature losses (default: the recipe's, otherwise all samples)."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.students > 0, "students", self.students, "> 0")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "> 0")


def main(given: Given) -> int:
    """Print the forecast. Returns exit code 1 if the cache does not fit on the disk."""
    if "://" in str(given.get("cache.path")):
        raise UserError(
            "plan cannot read a cache from a URL",
            got=f"--cache {given['cache.path']}",
            expected="a folder",
            fix="run `scalekd pull` first, or omit --cache",
        )
    with contextlib.redirect_stdout(sys.stderr if given.get("json") else sys.stdout):
        facts = stored_facts(given)
        config = cache_teacher_config(PlanConfig, given)
    training = _training(config, given, facts)
    from scalekd_cache.distributed import this_process
    from scalekd_cache.planning.forecast import forecast
    from scalekd_cache.planning.forecast_result import Forecast, describe, describe_together, fits, together

    plans: list[Forecast] = []
    with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):  # codec fitting also prints
        print(_planned(config, given, facts), flush=True)
        for one in config.per_teacher():
            plans.append(
                forecast(
                    one,
                    training,
                    this_process(config.device),
                    students=config.students,
                    epochs=config.epochs or training.train.epochs,
                    gpu=config.gpu,
                    first=plans[0] if plans else None,
                )
            )
    total = together(plans)
    if config.teachers is None:
        print(json.dumps(plans[0].to_json()) if config.json else describe(plans[0]))
    else:
        print(json.dumps(total.to_json()) if config.json else describe_together(total))
    return 0 if fits(plans) else 1


def _training(config: PlanConfig, given: Given, facts: ManifestFacts | None) -> DistillConfig:
    """The training options: those stored in the cache, or the recipe's, changed by the given ones."""
    if facts is None:
        recipe = recipe_section(config.recipe, "distill")
    else:
        recipe = training_options(given.get("recipe"), facts.recipe, facts.distill)
    options = {
        "student.name": config.student or "resnet50",
        "scalekd.projector": config.heads,
        "scalekd.feature_share": config.feature_share,
    }
    return build(DistillConfig, recipe, {name: value for name, value in options.items() if value is not None})


def _planned(config: PlanConfig, given: Given, facts: ManifestFacts | None) -> str:
    """One line: which cache is planned, and from which data."""
    data = f"data {config.data.source}"
    if facts is None and config.data.source == DataConfig.source and "data.source" not in given:
        data = "the built-in demo images (the default; set --data to plan for other images)"
    new = " (no such cache yet)" if "cache.path" in given else ""
    stored = new if facts is None else " (an existing cache, planned with its stored options)"
    return f"plan for {config.cache.path}{stored}: {data}, recipe {config.recipe}"


def _recipe_options(name: str) -> dict[str, Any]:
    """The `plan` options set by a recipe."""
    training = flat(recipe_section(name, "distill"))
    return {**flat(recipe_section(name, "cache")), "epochs": training.get("train.epochs", TrainConfig.epochs)}


COMMAND = Command("plan", main, [PlanConfig], __doc__, recipe_options=_recipe_options, defaults=STAGE1_DEFAULTS)

if __name__ == "__main__":
    run(COMMAND)
