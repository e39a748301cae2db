"""Stage 2: train a student from a cache (`make distill STUDENT=resnet50`)."""

import dataclasses

from pipelines.command import parse, recipe_section, run, value_of
from scalekd_cache.agreement import check_recipe
from scalekd_cache.config import CacheTeacherConfig, DistillConfig, to_plain
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.remote import open_place


def main(argv: list[str]) -> None:
    """Parse the options of stage 2, hold the recipe against the cache, and train."""
    cache = open_place(value_of(argv, "--cache") or DistillConfig().cache)
    manifest = None if "--help" in argv or "-h" in argv else read_manifest(cache)
    recipe = value_of(argv, "--recipe") or (manifest.recipe if manifest else "demo")
    config = parse(
        DistillConfig, "distill", argv, {**recipe_section(recipe, "distill"), "recipe": recipe}, __doc__ or ""
    )
    assert manifest is not None
    views = parse(CacheTeacherConfig, "cache_teacher", [], recipe_section(recipe, "cache"), "").views
    check_recipe(manifest.view_recipe, recipe, to_plain(views), cache)
    if config.run is None:
        suffix = "" if config.train.targets == "cached" else f"-{config.train.targets}"
        config = dataclasses.replace(config, run=f"runs/{config.student.name}{suffix}")
    from scalekd_cache.distill import distill
    from scalekd_cache.processes import this_process

    distill(config, this_process(config.device))


if __name__ == "__main__":
    run(main)
