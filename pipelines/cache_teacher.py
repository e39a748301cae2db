"""Stage 1: run the teacher once over augmented views and keep what students need (`make cache-teacher`).

With --dry-run it says what would be done, after all checks, and writes nothing.
"""

from pathlib import Path
from typing import Any

from pipelines.command import parse, recipe_section, run, value_of, without_flag
from scalekd_cache.agreement import check_recipe
from scalekd_cache.config import CacheTeacherConfig, DataConfig, DistillConfig, to_plain
from scalekd_cache.store.manifest import Manifest, read_manifest


def main(argv: list[str]) -> None:
    """Parse the options of stage 1 and run it; `--dry-run` says what would be done."""
    argv, dry = without_flag(argv, "--dry-run")
    section = stage1_section(argv)
    config = parse(CacheTeacherConfig, "cache_teacher", argv, section, __doc__ or "")
    student = None
    if config.student:
        training = recipe_section(config.recipe, "distill")
        student = parse(DistillConfig, "distill", ["--student.name", config.student], training, "")
    from scalekd_cache.cache_teacher import cache_teacher, try_out
    from scalekd_cache.processes import this_process

    if dry:
        try_out(config, this_process(config.device), student)
        return
    cache_teacher(config, this_process(config.device), student)


def stage1_section(argv: list[str]) -> dict[str, Any]:
    """The recipe's options of stage 1, with those of the cache whose pixels are shared."""
    pixels_from = value_of(argv, "--cache.pixels_from")
    shared = read_manifest(Path(pixels_from)) if pixels_from else None
    recipe = value_of(argv, "--recipe") or (shared.recipe if shared else "demo")
    section = {**recipe_section(recipe, "cache"), "recipe": recipe}
    if shared is not None and pixels_from is not None:
        if value_of(argv, "--recipe"):
            asked = parse(CacheTeacherConfig, "cache_teacher", [], recipe_section(recipe, "cache"), "").views
            check_recipe(shared.view_recipe, recipe, to_plain(asked), Path(pixels_from))
        section = _of_pixels(section, shared)
    return section


def _of_pixels(section: dict[str, Any], shared: Manifest) -> dict[str, Any]:
    """A recipe's options with the views and the data set of the cache whose pixels are shared."""
    data = {name: shared.data[name] for name in DataConfig.__dataclass_fields__ if name in shared.data}
    views = {"num_views": shared.num_views}
    return {**section, "views": shared.view_recipe, "data": data, "cache": {**section.get("cache", {}), **views}}


if __name__ == "__main__":
    run(main)
