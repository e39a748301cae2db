"""The configuration of stage 1, from the options that the user set.

In: options keyed by dotted name. Out: a `CacheTeacherConfig`, and the options of a student to check.
Invariant: the command and the Python function build their configurations here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.recipes import DEMO, OTHER, check_recipe, different_views, recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.progress import print_rank0
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.manifest import ManifestFacts, read_manifest
from scalekd_cache.store.plan import read_plan

Stage1 = TypeVar("Stage1", bound=CacheTeacherConfig)
Given = Mapping[str, Any]
"""The options that the user set, keyed by dotted name."""


def cache_teacher_config(config_class: type[Stage1], given: Given) -> Stage1:
    """Build the stage-1 configuration from defaults, the recipe and the given options.

    A cache with shared pixels takes its views, dataset and recipe from the cache that stores the pixels.

    Args:
        config_class: `CacheTeacherConfig` or a subclass.
        given: options keyed by dotted name.
    """
    if given.get("teachers") and given.get("teacher.name"):
        raise UserError("set either --teacher or --teachers, not both")
    pixels_from = given.get("cache.pixels_from")
    if pixels_from:
        check_cache_path(pixels_from, "--pixels-from")
    shared = read_manifest(Path(pixels_from)).facts if pixels_from else None
    source = given.get("data.source") or (shared.data["source"] if shared else DataConfig.source)
    recipe = given.get("recipe") or (shared.recipe if shared else default_recipe(source))
    section = recipe_section(recipe, "cache")
    if shared is not None:
        check_given_recipe(given, shared, pixels_from)
        section = _of_pixels(section, shared)
    defaults = {"cache.path": default_cache(source), "workers": default_workers()}
    config = build(config_class, defaults, section, {"recipe": recipe}, given)
    return config if shared is not None or given.keys() & {"cache", "cache.num_views"} else _with_stored_views(config)


def _with_stored_views(config: Stage1) -> Stage1:
    """An existing cache grows only if the views are set, not because its recipe has more."""
    try:
        stored = read_plan(Path(config.cache.path)).num_views
    except UserError:  # no cache, or a damaged plan, which is reported later
        return config
    if stored >= config.cache.num_views:
        return config
    print_rank0(
        f"{config.cache.path} has {counted(stored, 'view')} per image; to add views, set --views "
        f"(recipe {config.recipe}: {config.cache.num_views})"
    )
    return replace(config, cache=replace(config.cache, num_views=stored))


def checked_student(config: CacheTeacherConfig) -> DistillConfig | None:
    """The training options for the student that stage 1 checks before it starts; None without a student.

    Raises:
        UserError: the recipe's training options are invalid (checked even without a student).
    """
    student = {"student.name": config.student} if config.student else {}
    training = build(DistillConfig, recipe_section(config.recipe, "distill"), student)
    return training if config.student else None


def default_recipe(source: str) -> str:
    """The default recipe for a dataset: `demo` for the built-in digits, otherwise `traditional`."""
    return DEMO if source == DataConfig.source else OTHER


def check_given_recipe(given: Given, facts: ManifestFacts, where: object) -> None:
    """Check that the given recipe has the same view options as the cache.

    A cache's views can differ from its own recipe if `views.*` options were set in stage 1. This is only a note.

    Raises:
        UserError: view options of another recipe differ; the message lists them.
    """
    recipe, kept = given.get("recipe"), facts.view_recipe
    if not recipe:
        return
    views = to_plain(build(CacheTeacherConfig, recipe_section(recipe, "cache")).views)
    if recipe != facts.recipe:
        check_recipe(kept, recipe, views, where)
    elif different := different_views(kept, views):
        found = ", ".join(f"views.{name}={kept.get(name)}" for name in different)
        print_rank0(f"the cache's views differ from those of its recipe {recipe}: {found}")


def _of_pixels(section: dict[str, Any], shared: ManifestFacts) -> dict[str, Any]:
    """Replace a recipe's views and dataset with those of the cache that stores the shared pixels."""
    data = {name: shared.data[name] for name in DataConfig.__dataclass_fields__ if name in shared.data}
    views = {"num_views": shared.num_views}
    return {**section, "views": shared.view_recipe, "data": data, "cache": {**section.get("cache", {}), **views}}
