"""Forecast the cost of a cache and its students before running anything."""

import contextlib
import json
import sys
from typing import Any

from pydantic.dataclasses import dataclass

from pipelines.command import STAGE1_DEFAULTS, Command, Given, run
from scalekd_cache.api import cache_teacher_config
from scalekd_cache.config.base import STRICT, flat, require
from scalekd_cache.config.options import build
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig(CacheTeacherConfig):
    """Options of `plan`, in addition to all stage-1 options."""

    students: int = 8
    """Number of students to train from the cache."""
    epochs: int | None = None
    """Training epochs per student."""
    gpu: str = "h100"
    """GPU model for GPU-hour estimates: b200, h200, h100, h100-pcie, mi300x, a100, l40s, a10, l4, rtx4090."""
    heads: str | None = None
    """Student heads: cap, lite or linear (default: the recipe's, otherwise cap)."""
    feature_share: float | None = None
    """Fraction of samples used by the feature losses (default: the recipe's, otherwise all samples)."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.students > 0, "students", self.students, "> 0")
        require(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "> 0")


def main(given: Given) -> int:
    """Print the forecast. Returns exit code 1 if the cache does not fit on the disk."""
    config = cache_teacher_config(PlanConfig, given)
    options = {
        "student.name": config.student or "resnet50",
        "scalekd.projector": config.heads,
        "scalekd.feature_share": config.feature_share,
    }
    given_options = {name: value for name, value in options.items() if value is not None}
    training = build(DistillConfig, recipe_section(config.recipe, "distill"), given_options)
    from scalekd_cache.distributed import this_process
    from scalekd_cache.planning.forecast import forecast
    from scalekd_cache.planning.forecast_result import Forecast, describe, describe_together, together

    plans: list[Forecast] = []
    with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):  # codec fitting also prints
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
    return 0 if total.total_bytes <= total.free_bytes else 1


def _recipe_options(name: str) -> dict[str, Any]:
    """The `plan` options set by a recipe."""
    training = flat(recipe_section(name, "distill"))
    return {**flat(recipe_section(name, "cache")), "epochs": training.get("train.epochs", TrainConfig.epochs)}


COMMAND = Command("plan", main, [PlanConfig], __doc__, recipe_options=_recipe_options, defaults=STAGE1_DEFAULTS)

if __name__ == "__main__":
    run(COMMAND)
