"""Whether what is asked agrees with what a cache holds.

In: options as plain dicts, a cache's facts. Out: nothing, or an error that names each field with both values.
Invariant: light (no torch): commands call this before anything else.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalekd_cache.config.base import flat
from scalekd_cache.errors import UserError


def check_plan(kept: Mapping[str, Any], asked: Mapping[str, Any], where: Path) -> None:
    """A cache is continued only by the job that began it: same teacher, views, codec, data and layout.

    Raises:
        UserError: naming each field that differs, with both values.
    """
    there, here = flat(kept), flat(asked)
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different:
        lines = [f"{name}: {here.get(name)} (asked) / {there.get(name)} (cache)" for name in different]
        raise UserError(
            "the cache was made with other options",
            got="; ".join(lines),
            where=where,
            fix="choose another CACHE=, or give the options the cache was made with" + _renamed(different),
        )


def _renamed(different: Sequence[str]) -> str:
    """What to do when images or labels have changed: a rename must not cost a cache."""
    if not any(name.endswith("data.listing") for name in different):
        return ""
    return (
        ". Images were added, removed, renamed or labeled differently since: give them back the names in "
        "units/*/keys.txt to let the cache grow. Training from the views that are there needs no images where "
        "pixels are baked"
    )


def check_recipe(kept: Mapping[str, Any], recipe: str, asked: Mapping[str, Any], where: object) -> None:
    """The view recipe of a training recipe is the one in the cache: augmentation lives in the cache.

    The seed and the form in which pixels are kept are the cache's own business.
    """
    own = {"seed", "pixels", "pixel_format", "jpeg_quality", "jpeg_subsampling"}
    different = [name for name in asked if name not in own and kept.get(name) != asked[name]]
    if different:
        raise UserError(
            f"the cache holds other views than recipe {recipe} trains on",
            got=", ".join(f"views.{name}={kept.get(name)}" for name in different),
            expected=", ".join(f"views.{name}={asked[name]}" for name in different),
            where=where,
            fix="leave RECIPE= out to train on the cache's own views with the options of the cache's own recipe, "
            f"or make a cache with RECIPE={recipe} and no views.* options",
        )
