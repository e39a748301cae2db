"""What a cache is going to be: its fingerprint, its view groups and its work units.

In: a `CacheTeacherConfig`, images and a teacher. Out: a `Job`, and plan.json in the cache's folder.
Invariant: a plan that is there is extended by view groups and otherwise kept: another teacher, view recipe, codec, data
set or layout is an error that names the fields.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.agreement import check_plan
from scalekd_cache.caching import Stage, Unit, plan_units
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.config import CacheTeacherConfig, fingerprint, to_plain
from scalekd_cache.errors import UserError
from scalekd_cache.images import Source, listing_digest
from scalekd_cache.processes import Process, autocast_dtype
from scalekd_cache.store import Ledger, remove_stale
from scalekd_cache.store.files import write_atomically
from scalekd_cache.teacher import Teacher

PLAN = "plan.json"
"""What a cache is going to be, written before the first unit: a job that continues it is held against this."""


class Job(NamedTuple):
    """What a stage-1 job works with."""

    stage: Stage
    plan: dict[str, Any]
    """Facts of the cache that are known before the first unit is made; they go into the manifest."""
    units: list[Unit]
    ledger: Ledger
    """Which of them are in the cache already."""


def make_plan(config: CacheTeacherConfig, process: Process, source: Source, teacher: Teacher) -> Job:
    """Everything that decides the cached bytes, and the units they come in."""
    root = Path(config.cache.path)
    codec = make_codec(config.cache.codec, teacher.spec.feature_shape)
    logit_codec = LogitCodec(teacher.spec.num_classes, exact=codec.id == "float32")
    fields = {
        "teacher": teacher.spec.to_json(),
        "precision": str(autocast_dtype(config.teacher.precision, process.device)).removeprefix("torch."),
        "views": to_plain(config.views),
        "codec": codec.get_config(),
        "logit_codec": logit_codec.get_config(),
        "data": {"listing": listing_digest(source), "samples": len(source.samples)},
    }
    fixed: dict[str, Any] = {
        "fingerprint": fingerprint(fields),
        "fingerprint_fields": fields,
        "backend": config.cache.backend,
        "samples_per_shard": config.cache.samples_per_shard,
    }
    groups: list[list[int]] = []
    if (root / PLAN).exists():
        kept = _read_plan(root)
        check_plan({name: kept[name] for name in fixed}, fixed, root)
        groups = kept["groups"]
    groups = extended_groups(groups, config.cache.num_views, config.cache.views_per_group)
    plan = {
        **fixed,
        "groups": groups,
        "recipe": config.recipe,
        "teacher_config": to_plain(config.teacher),
        "data_config": to_plain(config.data),
    }
    stage = Stage(
        root, config.cache.backend, fixed["fingerprint"], source, config.views, teacher, codec, logit_codec,
        config.teacher.batch_size, process.device, library_versions(),
    )  # fmt: skip
    units = plan_units(source, groups, config.cache.samples_per_shard)
    return Job(stage, plan, units, Ledger(root, stage.fingerprint))


def extended_groups(groups: list[list[int]], num_views: int, views_per_group: int) -> list[list[int]]:
    """View groups of a cache of at least `num_views` views that begins with `groups`: what is there stays."""
    groups = [list(group) for group in groups]
    first = sum(len(group) for group in groups)
    for start in range(first, num_views, views_per_group):
        groups.append(list(range(start, min(start + views_per_group, num_views))))
    return groups


def _read_plan(root: Path) -> dict[str, Any]:
    try:
        plan = json.loads((root / PLAN).read_text(encoding="utf-8"))
        needed = {"fingerprint", "fingerprint_fields", "backend", "samples_per_shard", "groups"}
        if not isinstance(plan, dict) or not needed <= plan.keys():
            raise ValueError(f"expected an object with {', '.join(sorted(needed))}")
    except ValueError as error:
        raise UserError(
            "the cache's plan is damaged", got=error, where=root / PLAN, fix="restore it, or choose another CACHE="
        ) from error
    return plan


def write_plan(root: Path, plan: dict[str, Any]) -> None:
    """Write plan.json in one step; `UserError` when the folder cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / PLAN, (json.dumps(plan, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(
            "the cache's folder cannot be written", got=error, where=root, fix="choose another CACHE="
        ) from error


def committed(job: Job, unit: Unit) -> bool:
    """Whether a unit is in the cache already."""
    return job.ledger.committed(unit.group, unit.range_id)


def take_over(job: Job, process: Process) -> None:
    """Rank 0: remove units that a power cut may have emptied, and say so (`store/resume.py`)."""
    for folder in job.ledger.drop_damaged([(unit.group, unit.range_id) for unit in job.units]):
        process.say(f"{folder} is damaged (its files have their lengths, not their sha256): it is made again")


def tidy(root: Path, process: Process) -> None:
    """Rank 0: remove what killed writers left, and name what may belong to living ones elsewhere."""
    others = [*remove_stale(root), *remove_stale(root / "units")]
    if others:
        oldest = max(others, key=lambda leftover: leftover.age_s)
        process.say(
            f"{root}: {len(others)} temporary files or folders of other machines, or of this one before it was started "
            f"again, are left alone; the oldest is {oldest.path.relative_to(root)}, last changed "
            f"{oldest.age_s / 3600:.1f} hours ago. Delete them when no job writes this cache."
        )


def library_versions() -> dict[str, str]:
    """Versions that explain a digest that differs; they decide nothing."""
    names = ("scalekd-cache", "torch", "torchvision", "timm", "pillow", "numpy", "webdataset", "zarr", "numcodecs")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))
