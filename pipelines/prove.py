"""Re-run the teacher on cached views and compare a student's gradients."""

import json
from typing import TYPE_CHECKING

from pipelines.command import Command, Given, run
from scalekd_cache.config.base import require
from scalekd_cache.config.options import build, options_class
from scalekd_cache.config.places import cache_places
from scalekd_cache.config.recipes import training_options
from scalekd_cache.config.stage2 import DistillConfig, teacher_files
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.remote.remote_path import open_place

if TYPE_CHECKING:
    from scalekd_cache.audit.gradients import GradientComparison
    from scalekd_cache.distributed import Process


@options_class()
class ProveConfig:
    """Options of `prove`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache. Multiple caches (separated by commas) are checked one after another."""
    student: str = "resnet18"
    """Student whose gradients are compared (a timm model name or a short name, as in distill)."""
    init: str | None = None
    """Folder of a trained student (default: random weights)."""
    heads: str | None = None
    """ScaleKD heads: cap, lite or linear (default: the recipe's, otherwise cap)."""
    feature_share: float | None = None
    """Fraction of samples used by the feature losses (default: the recipe's, otherwise all samples with stored
    features)."""
    recipe: str | None = None
    """Training recipe (default: the training options stored in the cache)."""
    views: int = 256
    """Number of views on which to re-run the teacher."""
    seed: int = 0
    """Seed for sampling views and for the student's weights."""
    teacher_weights: str | None = None
    """The teacher's weights file (default: the path used in stage 1); with multiple caches, one file per cache."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (default: the path recorded in this cache)."""
    data: str | None = None
    """Path of the dataset, for a cache without pixels (default: the path used in stage 1)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        require(self.views >= 2, "views", self.views, ">= 2")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


def main(given: Given) -> int:
    """Print the result. Returns exit code 1 if the cached targets do not match the teacher's outputs."""
    config = build(ProveConfig, given)
    places = cache_places(config.cache)
    files = teacher_files(config.teacher_weights, len(places))
    for place in places:
        check_cache_path(place)
    from scalekd_cache.distributed import this_process

    process = this_process(config.device)
    proofs = [_compare(config, place, file, process) for place, file in zip(places, files, strict=True)]
    if config.json:
        print(json.dumps(proofs[0].to_json() if len(proofs) == 1 else [proof.to_json() for proof in proofs]))
    else:
        print("\n".join(proof.sentence() for proof in proofs))
    return 0 if all(proof.holds for proof in proofs) else 1


def _compare(config: ProveConfig, place: str, weights: str | None, process: "Process") -> "GradientComparison":
    """Run the comparison for one cache."""
    facts = read_manifest(open_place(place)).facts
    options = {
        "cache": place,
        "init": config.init,
        "teacher_weights": weights,
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

    return compare_gradients(training, process, config.views)


COMMAND = Command("prove", main, [ProveConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
