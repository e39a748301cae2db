"""Stage 1: run the teacher once over augmented views and keep what students need (`make cache-teacher`)."""

from pipelines.command import parse, recipe_section, run, value_of
from scalekd_cache.config import CacheTeacherConfig, DistillConfig


def main(argv: list[str]) -> None:
    """Parse the options of stage 1 and run it."""
    recipe = value_of(argv, "--recipe") or "demo"
    section = {**recipe_section(recipe, "cache"), "recipe": recipe}
    config = parse(CacheTeacherConfig, "cache_teacher", argv, section, __doc__ or "")
    student = None
    if config.student:
        training = recipe_section(recipe, "distill")
        student = parse(DistillConfig, "distill", ["--student.name", config.student], training, "")
    from scalekd_cache.cache_teacher import cache_teacher
    from scalekd_cache.processes import this_process

    cache_teacher(config, this_process(config.device), student)


if __name__ == "__main__":
    run(main)
