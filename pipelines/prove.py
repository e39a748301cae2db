"""Ask a cache's teacher again, and compare a student's gradients (`make prove CACHE=dir [STUDENT=name]`)."""

import json
from dataclasses import dataclass

from pipelines.command import check_cache_place, parse, run, with_flags
from scalekd_cache.config.base import require
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.remote.remote_path import open_place


@dataclass(frozen=True, kw_only=True)
class ProveConfig:
    """Options of `prove`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache."""
    student: str = "resnet18"
    """The student whose gradients are compared: a short name or a timm name."""
    init: str | None = None
    """Folder with a student that has learned already (None: random weights)."""
    recipe: str | None = None
    """Recipe of the training (None: the one the cache was made with)."""
    views: int = 256
    """Views that the teacher sees again."""
    seed: int = 0
    """Chooses the views, and the weights of the student."""
    teacher_weights: str | None = None
    """The teacher's weights (None: where stage 1 found them)."""
    pixels_from: str | None = None
    """Folder of the cache whose pixels this one shares (None: where it was at stage 1)."""
    data: str | None = None
    """Where the images are, for a cache without pixels (None: where stage 1 found them)."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: bool = False
    """Print the line of JSON alone."""

    def __post_init__(self) -> None:
        require(self.views >= 2, "views", self.views, ">= 2")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


def main(argv: list[str]) -> int:
    """Print a sentence and a line of JSON; exit status 1 when the teacher says something else than the cache."""
    config = parse(ProveConfig, "prove", with_flags(argv, "--json"), {}, __doc__ or "")
    check_cache_place(config.cache)
    recipe = config.recipe or read_manifest(open_place(config.cache)).recipe
    options = {
        "cache": config.cache,
        "init": config.init,
        "teacher_weights": config.teacher_weights,
        "data": config.data,
        "pixels_from": config.pixels_from,
        "student.name": config.student,
        "train.seed": config.seed,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    training = parse(DistillConfig, "distill", words, recipe_section(recipe, "distill"), "")
    from scalekd_cache.audit.gradients import compare_gradients
    from scalekd_cache.distributed import this_process

    proof = compare_gradients(training, this_process(config.device), config.views)
    if not config.json:
        print(proof.sentence())
    print(json.dumps(proof.to_json()))
    return 0 if proof.holds else 1


if __name__ == "__main__":
    run(main)
