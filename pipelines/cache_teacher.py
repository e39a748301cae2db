"""Stage 1: run the teacher once over augmented views and store what students need (`make cache-teacher`).

--dry-run runs all checks, prints what would be done and writes nothing.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from pipelines.command import check_recipe_given, parse, run, value_of, without_flag
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.recipes import recipe_section, training_options
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.loader.order import batches_that_fit
from scalekd_cache.store.manifest import Manifest, ManifestFacts, read_manifest


def main(argv: list[str]) -> None:
    """Parse the options of stage 1 and run it, or only its checks (`--dry-run`)."""
    argv, dry = without_flag(argv, "--dry-run")
    section = stage1_section(argv)
    config = parse(CacheTeacherConfig, "cache_teacher", argv, section, __doc__ or "")
    chosen = ["--student.name", config.student] if config.student else []
    training = parse(DistillConfig, "distill", chosen, recipe_section(config.recipe, "distill"), "")
    student = training if config.student else None
    from scalekd_cache.caching.job import cache_teacher, dry_run
    from scalekd_cache.distributed import this_process

    if dry:
        dry_run(config, this_process(config.device), student)
        return
    process = this_process(config.device)
    manifest = cache_teacher(config, process, student)
    process.print_rank0(f"next: {next_command(config, manifest)}")


def next_command(config: CacheTeacherConfig, manifest: Manifest) -> str:
    """The `make distill` command for this cache, for the folder in which this command was run.

    It sets smaller batches if the recipe's global batch is larger than the data set.
    """
    options = training_options(None, manifest.facts.recipe, manifest.facts.distill)
    train = parse(DistillConfig, "distill", [], options, "").train
    words = ["make", "distill", f"STUDENT={config.student or 'resnet50'}", f"CACHE={config.cache.path}"]
    plugin = value_of(sys.argv, "--plugin")
    words += [f"PLUGIN={plugin}"] if plugin else []
    if manifest.num_samples < train.global_batch_size:
        words.append(f"SET={batches_that_fit(manifest.num_samples, train.micro_batch_size)}")
    # VENV= and PYTHON= of this make; make passes them on in MAKEFLAGS.
    given = shlex.split(os.environ.get("MAKEFLAGS", ""))
    words += [word for word in given if word.startswith(("VENV=", "PYTHON="))]
    return shlex.join(words)


def stage1_section(argv: list[str]) -> dict[str, Any]:
    """The recipe's options of stage 1, with views and data set of the cache whose pixels are shared, if any."""
    pixels_from = value_of(argv, "--cache.pixels_from")
    shared = read_manifest(Path(pixels_from)).facts if pixels_from else None
    recipe = value_of(argv, "--recipe") or (shared.recipe if shared else "demo")
    section = {**recipe_section(recipe, "cache"), "recipe": recipe}
    if shared is not None and pixels_from is not None:
        check_recipe_given(argv, shared.view_recipe, pixels_from)
        section = _of_pixels(section, shared)
    source = value_of(argv, "--data.source") or section.get("data", {}).get("source", DataConfig.source)
    section["cache"] = {"path": default_cache(source), **section.get("cache", {})}
    return section


def _of_pixels(section: dict[str, Any], shared: ManifestFacts) -> dict[str, Any]:
    """A recipe's options with views and data set replaced by those of the cache whose pixels are shared."""
    data = {name: shared.data[name] for name in DataConfig.__dataclass_fields__ if name in shared.data}
    views = {"num_views": shared.num_views}
    return {**section, "views": shared.view_recipe, "data": data, "cache": {**section.get("cache", {}), **views}}


if __name__ == "__main__":
    run(main)
