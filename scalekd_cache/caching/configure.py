"""The configuration of stage 1, from the options that the user set.

In: options keyed by dotted name. Out: a `CacheTeacherConfig`, and the options of a student to check.
Invariant: the command and the Python function build their configurations here.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scalekd_cache.config.base import flat, from_plain, to_plain
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.recipes import DEMO, OTHER, check_recipe, different_views, recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.progress import print_rank0
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.manifest import ManifestFacts, read_manifest
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.shared_pixels import shared_pixels_path

Stage1 = TypeVar("Stage1", bound=CacheTeacherConfig)
Given = Mapping[str, Any]
"""The options that the user set, keyed by dotted name."""


def cache_teacher_config(config_class: type[Stage1], given: Given) -> Stage1:
    """Build the stage-1 configuration from defaults, the recipe and the given options.

    Options that are not set come from the cache, if it exists. A cache with shared pixels takes its views, dataset and
    recipe from the cache that stores the pixels.

    Args:
        config_class: `CacheTeacherConfig` or a subclass.
        given: options keyed by dotted name.
    """
    if given.get("teachers") and given.get("teacher.name"):
        raise UserError("set either --teacher or --teachers, not both")
    pixels_from = given.get("cache.pixels_from")
    if pixels_from:
        check_cache_path(pixels_from, "--pixels-from")
    stored = stored_facts(given)
    if stored is not None:
        return _stored_config(config_class, given, stored)
    shared = read_manifest(Path(pixels_from)).facts if pixels_from else None
    source = shared.data["source"] if shared and not given.get("data.source") else given_source(given)
    recipe = given.get("recipe") or (shared.recipe if shared else default_recipe(source))
    section = recipe_section(recipe, "cache")
    if shared is not None:
        check_given_recipe(given, shared, pixels_from)
        section = _of_pixels(section, shared)
    defaults = {"cache.path": default_cache(source), "workers": default_workers()}
    config = build(config_class, defaults, section, {"recipe": recipe}, given)
    first = facts_at(Path(config.per_teacher()[0].cache.path)) if config.teachers else None
    if first is None or not _keeps_views(config.cache.path, first.num_views, config, given):
        return config
    return replace(config, cache=replace(config.cache, num_views=first.num_views))


def stored_facts(given: Given) -> ManifestFacts | None:
    """The facts of the cache that the options name; None without a cache, or if they name several teachers."""
    if given.get("teachers") or (given.get("cache.pixels_from") and not given.get("cache.path")):
        return None
    return facts_at(stored_place(given))


def facts_at(root: Path) -> ManifestFacts | None:
    """The facts of a cache from its plan, or without one from its manifest; None without a readable manifest, which
    stage 1 writes again.

    Raises:
        UserError: the plan is damaged.
    """
    if is_there(root / PLAN):
        return read_plan(root).facts
    try:
        return read_manifest(root).facts
    except UserError:
        return None


def stored_place(given: Given) -> Path:
    """The cache that the options name."""
    return Path(given.get("cache.path") or default_cache(given_source(given)))


def given_source(given: Given) -> str:
    """The dataset that the options name, also by their recipe; without one, the built-in digits."""
    section = recipe_section(given["recipe"], "cache") if given.get("recipe") else {}
    return str(given.get("data.source") or flat(section).get("data.source") or DataConfig.source)


def _stored_config(config_class: type[Stage1], given: Given, facts: ManifestFacts) -> Stage1:
    """The options stored in a cache, changed by the given ones. Another teacher has its own weights."""
    root = stored_place(given)
    check_given_recipe(given, facts, root)
    stored = to_plain(stage1_config(facts, root, data=given.get("data.source"), workers=default_workers()))
    if given.get("teacher.name") not in (None, stored["teacher"]["name"]):
        del stored["teacher"]
    elif "teacher.pretrained" in given:
        stored["teacher"]["weights"] = None
    name = given.get("recipe") or facts.recipe
    if name != facts.recipe:
        again = shell_command("distill", cache=root, recipe=name)
        print_rank0(f"{root} keeps the training options of its recipe {facts.recipe}; to use those of {name}: {again}")
    with contextlib.suppress(UserError):  # the recipe was a file that is gone
        recipe = build(CacheTeacherConfig, recipe_section(name, "cache"), {"recipe": name})
        _keeps_views(root, facts.num_views, recipe, given)
    return build(config_class, stored, given)


def _keeps_views(place: object, stored: int, recipe: CacheTeacherConfig, given: Given) -> bool:
    """Whether an existing cache keeps its number of views although the recipe has more; prints a note. A cache grows
    only if the views are set."""
    if "cache.num_views" in given or stored >= recipe.cache.num_views:
        return False
    print_rank0(
        f"{place} has {counted(stored, 'view')} per image; to add views, set --views "
        f"(recipe {recipe.recipe}: {recipe.cache.num_views})"
    )
    return True


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


def stage1_config(
    facts: ManifestFacts,
    root: Path,
    *,
    data: str | None = None,
    weights: str | None = None,
    pixels_from: str | None = None,
    workers: int = 0,
) -> CacheTeacherConfig:
    """A cache's stage-1 options from its plan, with the current locations of the data, weights and pixels."""
    from scalekd_cache.caching.codec_selection import codec_options
    from scalekd_cache.data.source import data_config
    from scalekd_cache.models.teacher import cache_teacher_config as recorded_teacher

    fields = facts.fingerprint_fields
    if facts.pixels_from and pixels_from is None:
        pixels_from = str(shared_pixels_path(root, facts))
    return CacheTeacherConfig(
        recipe=facts.recipe,
        data=data_config(facts.data, data),
        views=ViewConfig(**from_plain(fields["views"])),
        teacher=recorded_teacher(facts.teacher["config"], weights),
        cache=StoreConfig(
            path=str(root),
            backend=facts.backend,  # type: ignore[arg-type]  # checked when the plan was read
            **_codec_options(fields, codec_options(root) if "state_sha256" in fields["codec"] else {}),
            num_views=sum(len(group) for group in facts.groups),
            views_per_group=max(len(group) for group in facts.groups),
            stored_features=1 / facts.features_every,
            samples_per_shard=facts.samples_per_shard,
            pixels_from=pixels_from,
        ),
        workers=workers,
    )


def _codec_options(fields: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """The codec options; a fitted codec's preset is stored next to its state."""
    logits = fields["logit_codec"]
    kept = {
        "logits-top-k": {"logits": "top_k", "top_k": logits.get("k")},
        "logits-recomputed": {"logits": "recomputed"},
    }
    return {"codec": fields["codec"]["id"], **kept.get(logits["id"], {}), **preset}
