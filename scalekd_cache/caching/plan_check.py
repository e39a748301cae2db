"""Compares a job's options with the plan of the cache that it resumes.

In: the fields in plan.json, and the same fields from the job. Out: nothing, or an error that lists the differences.
Invariant: all units in a cache have the same teacher, view recipe, codec, dataset and layout.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalekd_cache.config.base import flat
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.manifest import FEATURES_EVERY


def check_plan(kept: Mapping[str, Any], asked: Mapping[str, Any], where: Path) -> None:
    """Check that a cache is resumed with the same teacher, views, codec, data and layout.

    Raises:
        UserError: fields differ; the message lists them with both values.
    """
    there, here = flat(kept), flat(asked)
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different:
        raise UserError(
            "the cache was made with different options",
            got=_differences(different, here, there),
            where=where,
            fix="use a different --cache, or the options that the cache was made with" + _renamed(different),
        )


SHOWN = 3
"""Maximum number of differences in the message: one option can change a dozen fields."""
DERIVED = ("sha256", "shape", "image_size", "img_size", "fingerprint")
"""Suffixes of fields that are derived from options and files. These fields are listed last."""


def _differences(different: Sequence[str], here: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """The first differing fields with both values, options first."""
    names = sorted(different, key=lambda name: name.endswith(DERIVED))
    lines = []
    for name in names[:SHOWN]:
        plain, values = name.removeprefix("fingerprint_fields."), [here.get(name), there.get(name)]
        if plain == FEATURES_EVERY:
            plain, values = "stored_features", [f"{1 / int(every or 1):.6g}" for every in values]
        lines.append(f"{plain}: {str(values[0])[:40]} (requested) / {str(values[1])[:40]} (cache)")
    return "; ".join(lines) + (f"; and {counted(len(names) - SHOWN, 'more field')}" if len(names) > SHOWN else "")


def _renamed(different: Sequence[str]) -> str:
    """Advice for a changed teacher order, changed images or changed labels."""
    if "fingerprint_fields.pixels" in different:
        return ". The first teacher's cache stores the pixels, so the order of --teachers must not change"
    if not any(name.endswith("data.listing") for name in different):
        return ""
    return (
        ". Images have been added, removed, renamed or relabeled since then. To add views to the cache, restore the "
        "names listed in units/*/keys.txt. Training on the existing views needs no images if pixels are baked"
    )
