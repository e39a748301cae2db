"""Recipes: YAML files with options for both stages (in `pipelines/recipes`, or the user's own).

In: the name or path of a recipe. Out: its file, or the options of one section as plain values. A cache stores its
recipe's training options, so a run does not depend on the file.
Invariant: only regular files are read, up to `RECIPE_BYTES`, and only with a subclass of PyYAML's safe loader.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from scalekd_cache.config.base import flat
from scalekd_cache.errors import UserError, unknown_name

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
RECIPE_BYTES = 1 << 20
"""Maximum size of a recipe file, in bytes."""
KEPT = ("student", "scalekd", "optim", "train")
"""The parts of `distill:` that a cache stores. The others are machine-specific paths and resources."""
DEMO, OTHER = "demo", "traditional"
"""The default recipes: for the built-in digits, and for all other datasets."""
LOCAL = ("train.deepspeed",)
"""Machine-specific paths among these options; a cache does not store them."""


class PlainLoader(yaml.SafeLoader):
    """A YAML loader that rejects aliases, because a few lines of them can expand to billions of values, and repeated
    keys, because YAML would silently drop all but the last."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"{key} is set {count} times")
        return super().construct_mapping(node, deep)


def recipe_names() -> list[str]:
    """Names of the recipes in `RECIPES`."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The YAML file of a recipe, by name or path.

    Raises:
        UserError: there is no such recipe; the message suggests the closest names.
    """
    own = name.endswith((".yaml", ".yml"))
    file = Path(name) if own else RECIPES / f"{name}.yaml"
    if own and not file.is_file():
        beside = [str(path) for end in ("*.yaml", "*.yml") for path in file.parent.glob(end)]
        raise unknown_name("recipe file", name, beside, "--recipe", listed=0)
    if not file.is_file():
        raise unknown_name("recipe", name, recipe_names(), "--recipe takes a name or a path that ends in .yaml or .yml")
    return file


def recipe_section(name: str, section: str) -> dict[str, Any]:
    """The options in one section of a recipe: `cache` or `distill`.

    Raises:
        UserError: no such recipe, not YAML, too large, or not two mappings `cache:` and `distill:`.
    """
    file = recipe_file(name)
    try:
        recipe = PlainLoader(_read(file)).get_single_data()
    except UserError:
        raise
    except Exception as error:  # PyYAML's constructors raise errors of many kinds
        raise UserError("cannot parse the recipe", got=error, where=file, fix="correct the file") from error
    if not isinstance(recipe, dict) or not set(recipe) <= {"cache", "distill"}:
        got = ", ".join(map(str, recipe)) if isinstance(recipe, dict) else type(recipe).__name__
        raise UserError(
            "the recipe has an invalid structure",
            got="an empty file" if recipe is None else got,
            expected="a mapping with a cache section, a distill section or both",
            where=file,
        )
    options = recipe.get(section) or {}
    if not isinstance(options, dict):
        raise UserError(f"section {section} of the recipe is not a mapping", got=options, where=file)
    return options


def kept_options(name: str) -> dict[str, dict[str, Any]]:
    """The training options that a cache stores from a recipe, as JSON values.

    Raises:
        UserError: as for `recipe_section`, or a part is not a mapping of JSON values.
    """
    kept: dict[str, dict[str, Any]] = {}
    for part, options in recipe_section(name, "distill").items():
        if part not in KEPT:
            continue
        try:
            values = json.loads(json.dumps(dict(options), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"section distill.{part} of the recipe is invalid",
                got="nothing" if options is None else options,
                expected="a mapping of option names to finite numbers, text, true, false, null or lists",
                where=recipe_file(name),
            ) from error
        kept[part] = {key: value for key, value in values.items() if f"{part}.{key}" not in LOCAL}
    return kept


def local_options(name: str) -> list[str]:
    """Names of a recipe's training options that a cache does not store."""
    options = recipe_section(name, "distill")
    return [*(part for part in options if part not in KEPT), *(one for one in LOCAL if one in flat(options))]


def training_options(given: str | None, name: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's stage 2 options, with the recipe's name.

    Args:
        given: the requested recipe, by name or path; its file is read.
        name: the cache's recipe.
        kept: the training options stored in the cache; used when no recipe is given.

    Raises:
        UserError: as for `recipe_section`.
    """
    return {**(recipe_section(given, "distill") if given else kept), "recipe": given or name}


def has_changed(name: str, kept: Mapping[str, Any]) -> bool:
    """Whether the recipe file exists and its training options differ from those stored in the cache."""
    try:
        return kept_options(name) != kept
    except UserError:
        return False


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise UserError("cannot read the recipe", got=error.strerror or error, where=file) from error
    if len(data) > RECIPE_BYTES:
        raise UserError("the recipe is too large", expected=f"at most {RECIPE_BYTES:,} bytes", where=file)
    return data.decode("utf-8")


def different_views(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Names of the view options that differ between a cache's view recipe and another one. The seed and the pixel
    format may differ."""
    own = {"seed", "pixels", "pixel_format", "jpeg_quality", "jpeg_subsampling"}
    return [name for name in asked if name not in own and kept.get(name) != asked[name]]


def check_recipe(kept: Mapping[str, Any], recipe: str, asked: Mapping[str, Any], where: object) -> None:
    """Check that a training recipe has the cache's view recipe, because augmentation happens in stage 1."""
    if different := different_views(kept, asked):
        raise UserError(
            f"the views in the cache differ from those of recipe {recipe}",
            got=", ".join(f"views.{name}={kept.get(name)}" for name in different),
            expected=", ".join(f"views.{name}={asked[name]}" for name in different),
            where=where,
            fix="remove --recipe to train with the cache's recipe, "
            f"or make a cache with --recipe {recipe} and no views.* options",
        )
