"""Shows some stored views to the teacher again and compares its answers with those in the cache.

In: a finished cache, its teacher. Out: how well they agree, and the records that do not.
Invariant: only a teacher with the cache's own weights is asked; a seed chooses the records, so a check can be repeated.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scalekd_cache.audit.records import Examiner, decode_features
from scalekd_cache.codec.fidelity import fidelity, summarise
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import Teacher, load_teacher
from scalekd_cache.store.base import Record
from scalekd_cache.store.manifest import Manifest
from scalekd_cache.store.reader import Cache

BATCH = 16
MARGIN = 0.02
"""How far below the codec's own first percentile a cosine may fall: other hardware rounds differently, another teacher
or another view is much further off."""


Place = tuple[int, int]
"""(view, position) of a record."""


class Agreement(NamedTuple):
    """What the teacher said when it was asked again."""

    records: int
    figures: dict[str, dict[str, float]]
    """{cosine, cosine_mean_removed: {mean, p1, count}} between fresh and decoded features."""
    top1_percent: float | None
    """Records whose largest logit is the same class; None without a classifier."""
    wrong: list[tuple[int, int, str, str]]
    """(view, position, key, what) of records that are not the teacher's answer."""


def teacher_config(facts: Mapping[str, Any], precision: str, weights: str | None) -> TeacherConfig:
    """The teacher's options as a cache keeps them, with the file of its weights where it lies now."""
    config = TeacherConfig(**{**from_plain(facts), "precision": precision})
    if weights is not None and not Path(weights).is_file():
        raise UserError("no such file of teacher weights", got=weights, fix="correct TEACHER_WEIGHTS=")
    return dataclasses.replace(config, weights=weights or config.weights)


def is_at_hand(config: TeacherConfig) -> bool:
    """Whether the teacher can be loaded without a network: its file is there, or its weights were random."""
    return Path(config.weights).is_file() if config.weights else not config.pretrained


def load_cache_teacher(manifest: Manifest, config: TeacherConfig, device: torch.device) -> Teacher:
    """The teacher of a cache.

    Raises:
        UserError: it cannot be loaded, or has other weights than the cache's.
    """
    size, classes = manifest.view_recipe["size"], len(manifest.class_names)
    torch.manual_seed(manifest.view_recipe["seed"])  # as stage 1 does: random weights are the same every time
    teacher = load_teacher(config, image_size=size, num_classes=classes, device=device)
    expected = manifest.teacher["spec"]["weights_sha256"]
    if teacher.spec.weights_sha256 != expected:
        raise UserError(
            "these are not the weights of the cache's teacher",
            got=f"teacher.weights_sha256 {teacher.spec.weights_sha256}",
            expected=expected,
            where=config.weights,
            fix="give the file the cache was made with as TEACHER_WEIGHTS=",
        )
    return teacher


def reinfer(cache: Cache, teacher: Teacher, examiner: Examiner, records: int, seed: int = 0) -> Agreement:
    """Ask the teacher about `records` views drawn at random; records that cannot be read are left to other checks.

    Args:
        cache: a finished cache.
        teacher: its teacher.
        examiner: of this cache; it knows where the pixels are.
        records: how many views, at most.
        seed: of the choice.
    """
    manifest = cache.manifest
    chosen = _choose(cache, records, seed)
    figures: dict[str, list[float]] = {}
    same: list[bool] = []
    wrong: list[tuple[int, int, str, str]] = []
    lowest = manifest.fidelity.get("cosine_mean_removed", {}).get("p1", 1.0) - MARGIN
    for start in range(0, len(chosen), BATCH):
        places, batch, pixels = _load(chosen[start : start + BATCH], examiner)
        if not batch:
            continue
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        output = teacher(images.to(teacher.mean.device))
        features = decode_features(examiner.codec, batch).features
        close = fidelity(output.features.cpu(), features)
        for name, values in close._asdict().items():
            figures.setdefault(name, []).extend(values.tolist())
        if teacher.spec.has_classifier:
            stored = examiner.logits(batch, features).argmax(1)
            same += (output.logits.argmax(1).cpu().numpy() == stored).tolist()
        for place, record, cosine in zip(places, batch, close.cosine_mean_removed.tolist(), strict=True):
            if not cosine >= lowest:
                what = f"the teacher's features now have cosine {cosine:.4f} (mean removed) with those stored"
                wrong.append((*place, record.key, f"{what}, expected at least {lowest:.4f}"))
    top1 = 100 * float(np.mean(same)) if same else None
    return Agreement(len(figures.get("cosine", ())), summarise(figures), top1, wrong)


def _choose(cache: Cache, records: int, seed: int) -> list[tuple[Place, Record]]:
    """Records at random, without repeats."""
    total = len(cache) * cache.manifest.num_views
    places = np.random.default_rng(seed).choice(total, size=min(records, total), replace=False)
    chosen = []
    for place in sorted(places.tolist()):
        view, position = divmod(place, len(cache))
        try:
            chosen.append(((view, position), cache.read([position], view)[0]))
        except UserError:
            continue
    return chosen


def _load(chosen: list[tuple[Place, Record]], examiner: Examiner) -> tuple[list[Place], list[Record], list[Any]]:
    """Places, records and pixels of those that can be decoded."""
    places, records, pixels = [], [], []
    for place, record in chosen:
        try:
            picture = examiner.picture(record, *place)
        except (UserError, UnreadableImage):
            continue
        if picture is not None and examiner.usable(record):
            places.append(place)
            records.append(record)
            pixels.append(picture)
    return places, records, pixels
