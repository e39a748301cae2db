"""Recipes: YAML files with options of both stages (`pipelines/recipes`, or a file of the user).

In: the name or path of a recipe. Out: its file, or the options of one section as plain values.
Invariant: at most `RECIPE_BYTES` of a regular file are read, and only by PyYAML's safe loader.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalekd_cache.errors import UserError, unknown_name

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
RECIPE_BYTES = 1 << 20
"""Size limit of a recipe file, bytes."""


def recipe_file(name: str) -> Path:
    """The YAML file of a recipe, by name or path.

    Raises:
        UserError: there is no such recipe; the message gives the closest names.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not file.is_file():
        known = [path.stem for path in RECIPES.glob("*.yaml")]
        raise unknown_name("recipe", name, known, "RECIPE=, or the path of a YAML file")
    return file


def recipe_section(name: str, section: str) -> dict[str, Any]:
    """The options of one section, `cache` or `distill`, of a recipe.

    Raises:
        UserError: no such recipe, not YAML, too large, or not two mappings `cache:` and `distill:`.
    """
    file = recipe_file(name)
    try:
        recipe = yaml.safe_load(_read(file))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError("the recipe is not valid YAML", got=error, where=file, fix="correct the file") from error
    if not isinstance(recipe, dict) or not set(recipe) <= {"cache", "distill"}:
        got = list(recipe) if isinstance(recipe, dict) else type(recipe).__name__
        raise UserError("a recipe has two sections", got=got, expected="cache: and distill:", where=file)
    options = recipe.get(section) or {}
    if not isinstance(options, dict):
        raise UserError(f"section {section} of the recipe is not a mapping", got=options, where=file)
    return options


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise UserError("the recipe cannot be read", got=error.strerror or error, where=file) from error
    if len(data) > RECIPE_BYTES:
        raise UserError("the recipe is too large", expected=f"at most {RECIPE_BYTES:,} bytes", where=file)
    return data.decode("utf-8")


def check_recipe(kept: Mapping[str, Any], recipe: str, asked: Mapping[str, Any], where: object) -> None:
    """The view recipe of a training recipe must be that of the cache, because augmentation happens in stage 1.

    The seed and the pixel format may differ.
    """
    own = {"seed", "pixels", "pixel_format", "jpeg_quality", "jpeg_subsampling"}
    different = [name for name in asked if name not in own and kept.get(name) != asked[name]]
    if different:
        raise UserError(
            f"the cache holds other views than recipe {recipe} trains on",
            got=", ".join(f"views.{name}={kept.get(name)}" for name in different),
            expected=", ".join(f"views.{name}={asked[name]}" for name in different),
            where=where,
            fix="remove RECIPE= to train with the recipe of the cache, "
            f"or make a cache with RECIPE={recipe} and no views.* options",
        )
