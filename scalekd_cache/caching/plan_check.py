"""Compares a job's options with the plan of the cache that it resumes.

In: the fields in plan.json, and the same fields from the job. Out: nothing, or an error that lists the differences.
Invariant: all units in a cache have the same teacher, view recipe, codec, dataset and layout.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalekd_cache.config.base import flat, from_plain
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.errors import UserError, counted, some_of
from scalekd_cache.models.timm_models import DEMO_TEACHER, check_name, timm_name
from scalekd_cache.models.weights import weights_available, weights_file
from scalekd_cache.store.manifest import FEATURES_EVERY, TeacherFacts
from scalekd_cache.store.sidecar import read_keys, read_unit

LISTING = {"fingerprint", "fingerprint_fields.data.listing", "fingerprint_fields.data.samples"}
"""Fields that differ if only the dataset's files have changed."""


def check_plan(
    kept: Mapping[str, Any], asked: Mapping[str, Any], where: Path, keys: Callable[[], list[str]] = list
) -> None:
    """Check that a cache is resumed with the same teacher, views, codec, data and layout.

    Args:
        kept: the fields in plan.json.
        asked: the same fields from the job.
        where: the cache's folder.
        keys: returns the sample keys of the job's dataset, or none if the pixels come from another cache.

    Raises:
        UserError: fields differ; the message lists them with both values. If only the dataset's files have changed, it
            names some of them.
    """
    there, here = flat(kept), flat(asked)
    different = sorted(name for name in there | here if there.get(name) != here.get(name))
    if different and LISTING.issuperset(different) and (listed := keys()):
        samples = there.get("fingerprint_fields.data.samples")
        raise UserError(
            "the dataset's files have changed since the cache was made",
            got=_changed_files(where, listed, samples),
            where=where,
            fix="restore these files, set --data.max_samples to the value used for the cache, or use a different "
            "--cache. If views.pixels=baked, training on the existing views does not need the training images",
        )
    if different:
        raise UserError(
            "the cache was made with different options",
            got=_differences(different, here, there),
            where=where,
            fix="use a different --cache, or the options that the cache was made with" + _renamed(different),
        )


def check_teacher_given(kept: TeacherFacts, teacher: TeacherConfig, where: Path) -> None:
    """Compare the teacher's options with the cache's before a missing teacher is trained or downloaded.

    Raises:
        UserError: the cache was made with a different teacher, with another weights file, or with random weights.
    """
    if weights_available(teacher):
        return
    recorded = TeacherConfig(**from_plain(kept["config"]))
    name = teacher.name if teacher.name == DEMO_TEACHER else check_name(timm_name(teacher.name), "teacher.name")
    found = None if recorded.weights == str(weights_file(teacher.weights_dir, teacher.name)) else recorded.weights
    if name == kept["spec"]["name"] and found is None and recorded.pretrained:
        return
    random = " --pretrained false" if not recorded.pretrained and recorded.weights is None else ""
    raise UserError(
        "the teacher options differ from those that the cache was made with",
        got=f"--teacher {teacher.name} "
        + (f"with --teacher-weights {teacher.weights}" if teacher.weights else "without --teacher-weights"),
        expected=f"--teacher {recorded.name}{random}" + (f" --teacher-weights {found}" if found else ""),
        where=where,
        fix="repeat all options that the cache was made with (--views may be larger), or use a different --cache",
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


def _changed_files(root: Path, keys: list[str], samples: object) -> str:
    """The first missing and new keys, compared with the keys in the committed units. An unfinished cache does not hold
    the keys of all `samples`, so new keys are unknown."""
    known: set[str] = set()
    for file in sorted(root.glob("units/g*-r*/unit.json")):
        with contextlib.suppress(UserError):
            info, _ = read_unit(file.parent)
            known.update(read_keys(file.parent, info), (row["key"] for row in info.skipped))
    missing = sorted(known.difference(keys))
    new = sorted(set(keys) - known) if len(known) == samples else []
    both = ((missing, "missing"), (new, "new"))
    changes = [f"{len(names):,} {what}: {some_of(names)}" for names, what in both if names]
    if changes:
        return "; ".join(changes)
    if len(known) == samples:
        return "the same files with different labels"
    return f"{counted(len(keys), 'file')}; the cache was started with {samples}"


def _renamed(different: Sequence[str]) -> str:
    """Advice for a changed teacher order, changed images or changed labels."""
    if "fingerprint_fields.pixels" in different:
        return ". The first teacher's cache stores the pixels, so the order of --teachers must not change"
    if not any(name.endswith("data.listing") for name in different):
        return ""
    return (
        ". Images have been added, removed, renamed or relabeled since then. To add views to the cache, restore the "
        "names listed in units/*/keys.txt. If views.pixels=baked, training on the existing views does not need the "
        "training images"
    )
