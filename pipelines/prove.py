"""Re-run the teacher on cached views and compare a student's gradients."""

import json

from pydantic.dataclasses import dataclass

from pipelines.command import Command, Given, check_cache_path, run
from scalekd_cache.config.base import STRICT, require
from scalekd_cache.config.options import build
from scalekd_cache.config.recipes import training_options
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.remote.remote_path import open_place


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProveConfig:
    """Options of `prove`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache."""
    student: str = "resnet18"
    """Student whose gradients are compared: a short name or a timm name."""
    init: str | None = None
    """Folder with a trained student (default: random weights)."""
    heads: str | None = None
    """Heads: cap, lite or linear (default: from the recipe)."""
    feature_share: float | None = None
    """Share of the samples that the feature losses use (default: from the recipe, or all
    samples with stored features)."""
    recipe: str | None = None
    """Training recipe (default: the training options stored in the cache)."""
    views: int = 256
    """Number of views on which the teacher is re-run."""
    seed: int = 0
    """Seed for the choice of views and the student's weights."""
    teacher_weights: str | None = None
    """File with the teacher's weights (default: the path used in stage 1)."""
    pixels_from: str | None = None
    """Folder or URL of the cache that holds the shared pixels (default: the path recorded in this cache)."""
    data: str | None = None
    """Path of the data set, for a cache without pixels (default: the path used in stage 1)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print one JSON object instead of a sentence."""

    def __post_init__(self) -> None:
        require(self.views >= 2, "views", self.views, ">= 2")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


def main(given: Given) -> int:
    """Print what was found; exit code 1 when cached targets do not match the teacher's outputs."""
    config = build(ProveConfig, given)
    check_cache_path(config.cache)
    facts = read_manifest(open_place(config.cache)).facts
    options = {
        "cache": config.cache,
        "init": config.init,
        "teacher_weights": config.teacher_weights,
        "data": config.data,
        "pixels_from": config.pixels_from,
        "student.name": config.student,
        "scalekd.projector": config.heads,
        "scalekd.feature_share": config.feature_share,
        "train.seed": config.seed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    training = build(DistillConfig, training_options(config.recipe, facts.recipe, facts.distill), options)
    from scalekd_cache.audit.gradients import compare_gradients
    from scalekd_cache.distributed import this_process

    proof = compare_gradients(training, this_process(config.device), config.views)
    print(json.dumps(proof.to_json()) if config.json else proof.sentence())
    return 0 if proof.holds else 1


COMMAND = Command("prove", main, [ProveConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
