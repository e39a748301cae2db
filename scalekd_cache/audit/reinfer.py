"""Shows some stored views to the teacher again and compares its answers with those in the cache.

In: a finished cache, its teacher. Out: how well they agree, and the records that do not.
Invariant: only a teacher with the cache's own weights is asked; a seed chooses the records, so a check can be repeated.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.data.base import sample_indices
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.loader.pixels import decode_features
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.store.base import Record
from scalekd_cache.store.fidelity_summary import summarize
from scalekd_cache.store.reader import Cache

BATCH = 16
MARGIN = 0.02
"""How far below the codec's own first percentile a cosine may fall: other hardware rounds differently, another teacher
or another view is much further off."""


Place = tuple[int, int]
"""(view, position) of a record."""


class TeacherAgreement(NamedTuple):
    """What the teacher said when it was asked again."""

    records: int
    figures: dict[str, dict[str, float]]
    """{cosine, cosine_mean_removed: {mean, p1, count}} between fresh and decoded features."""
    top1_percent: float | None
    """Records whose largest logit is the same class; None without a classifier."""
    wrong: list[tuple[int, int, str, str]]
    """(view, position, key, what) of records that are not the teacher's answer."""


def reinfer(cache: Cache, teacher: Teacher, checker: RecordChecker, records: int, seed: int = 0) -> TeacherAgreement:
    """Ask the teacher about `records` views drawn at random; records that cannot be read are left to other checks.

    Args:
        cache: a finished cache.
        teacher: its teacher.
        checker: of this cache; it knows where the pixels are.
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
        places, batch, pixels = _load(chosen[start : start + BATCH], checker)
        if not batch:
            continue
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        output = teacher(images.to(teacher.device))
        features = decode_features(checker.codec, batch).features
        close = fidelity(output.features.cpu(), features)
        for name, values in close._asdict().items():
            figures.setdefault(name, []).extend(values.tolist())
        if teacher.spec.has_classifier:
            stored = checker.logits(batch, features).argmax(1)
            same += (output.logits.argmax(1).cpu().numpy() == stored).tolist()
        for place, record, cosine in zip(places, batch, close.cosine_mean_removed.tolist(), strict=True):
            if not cosine >= lowest:
                what = f"the teacher's features now have cosine {cosine:.4f} (mean removed) with those stored"
                wrong.append((*place, record.key, f"{what}, expected at least {lowest:.4f}"))
    top1 = 100 * float(np.mean(same)) if same else None
    return TeacherAgreement(len(figures.get("cosine", ())), summarize(figures), top1, wrong)


def _choose(cache: Cache, records: int, seed: int) -> list[tuple[Place, Record]]:
    """Records at random, without repeats."""
    total = len(cache) * cache.manifest.num_views
    chosen = []
    for place in sample_indices(total, records, seed=seed):
        view, position = divmod(place, len(cache))
        try:
            chosen.append(((view, position), cache.read([position], view)[0]))
        except UserError:
            continue
    return chosen


def _load(chosen: list[tuple[Place, Record]], checker: RecordChecker) -> tuple[list[Place], list[Record], list[Any]]:
    """Places, records and pixels of those that can be decoded."""
    places, records, pixels = [], [], []
    for place, record in chosen:
        try:
            picture = checker.picture(record, *place)
        except (UserError, UnreadableImage):
            continue
        if picture is not None and checker.usable(record):
            places.append(place)
            records.append(record)
            pixels.append(picture)
    return places, records, pixels
