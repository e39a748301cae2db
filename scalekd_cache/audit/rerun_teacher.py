"""Re-runs the teacher on stored views and compares its outputs with the stored targets.

This is the only check that finds wrong targets with correct checksums.

In: a finished cache, its teacher. Out: fidelity metrics, and the records whose targets do not match.
Invariant: the teacher has the weights that the cache was made with. A seed selects the records, so a check can be
repeated.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.caching.encode_batch import pooled_maps
from scalekd_cache.codec.fidelity import Fidelity, fidelity
from scalekd_cache.data.base import sample_indices
from scalekd_cache.data.images import UnreadableImage
from scalekd_cache.errors import UserError
from scalekd_cache.loader.record_pixels import decode_features, decode_pooled
from scalekd_cache.models.teacher import Teacher, TeacherOutput
from scalekd_cache.store.base import Record
from scalekd_cache.store.fidelity_summary import POOLED_COSINE, summarize
from scalekd_cache.store.reader import Cache

BATCH = 16
MARGIN = 0.02
"""How far a cosine may fall below the codec's own 1st percentile. Different hardware rounds differently, but a
different teacher or view gives a much lower cosine."""


COMPARED = {"cosine_mean_removed": "features: mean-removed cosine", POOLED_COSINE: "pooled embeddings: cosine"}
"""Metrics for which each record must reach a minimum, with their names for messages."""
Place = tuple[int, int]
"""(view, position) of a record."""


class TeacherAgreement(NamedTuple):
    """How well the stored targets match the teacher's outputs."""

    records: int
    figures: dict[str, dict[str, float]]
    """Cosines between live and decoded features: {cosine, cosine_mean_removed: {mean, p1, count}}."""
    top1_percent: float | None
    """Percentage of records whose stored and live logits have the same top class; None if there is no classifier."""
    wrong: list[tuple[int, int, str, str]]
    """(view, position, key, problem) for each record that does not match the teacher."""


class RerunBatch(NamedTuple):
    """A batch of stored views and the teacher's outputs for them."""

    places: list[Place]
    records: list[Record]
    output: TeacherOutput
    """The live teacher's outputs on the CPU."""
    decoded: Tensor
    """(B, C, H, W) float32 features, decoded from the cache."""
    close: Fidelity
    """Cosines between `output.features` and `decoded`, one value per view."""
    pooled_cosine: Tensor | None
    """(B,) cosines between `output.pooled` and the stored embeddings; None for a cache without embeddings."""


def sample_places(cache: Cache, count: int, seed: int) -> list[Place]:
    """(view, position) of at most `count` records: a random sample without repeats, in reading order.

    For a sparse cache, returns about `count` records, all of which have features.
    """
    total = len(cache) * cache.manifest.num_views
    sampled = sample_indices(total, count * cache.manifest.facts.features_every, seed=seed)
    return [place for place in (divmod(index, len(cache)) for index in sampled) if has_features(cache, place)]


def has_features(cache: Cache, place: Place) -> bool:
    """Whether the record at this place has features."""
    view, position = place
    return bool(cache.has_features(np.array([position]), view)[0])


def rerun_teacher(
    cache: Cache, teacher: Teacher, checker: RecordChecker, places: Sequence[Place]
) -> Iterator[RerunBatch]:
    """Run the teacher on stored views, batch by batch; unusable records are skipped."""
    for start in range(0, len(places), BATCH):
        loaded = [
            (place, record, pixels)
            for place in places[start : start + BATCH]
            for record, pixels in _load(cache, checker, place)
        ]
        if not loaded:
            continue
        kept, records, pixels = map(list, zip(*loaded, strict=True))
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        output = TeacherOutput(*(part.cpu() for part in teacher(images.to(teacher.device))))
        decoded = decode_features(checker.codec, records).features
        close, pooled = fidelity(output.features, decoded), _pooled_cosine(checker, records, output)
        yield RerunBatch(kept, records, output, decoded, close, pooled)


def _pooled_cosine(checker: RecordChecker, records: Sequence[Record], output: TeacherOutput) -> Tensor | None:
    if checker.second_codec is None:
        return None
    stored = decode_pooled(checker.second_codec, records)
    return fidelity(pooled_maps(output), stored[..., None, None]).cosine


def _load(cache: Cache, checker: RecordChecker, place: Place) -> Iterator[tuple[Record, NDArray[np.uint8]]]:
    """Yield the record and its pixels, or nothing if they cannot be read or decoded."""
    view, position = place
    try:
        record = cache.read([position], view)[0]
        pixels = checker.picture(record, view, position)
    except (UserError, UnreadableImage):
        return
    if pixels is not None and checker.usable(record):
        yield record, pixels


def check_targets(
    cache: Cache, teacher: Teacher, checker: RecordChecker, records: int, seed: int = 0
) -> TeacherAgreement:
    """Compare stored targets with the teacher's outputs on a random sample of readable records.

    Args:
        cache: a finished cache.
        teacher: its teacher.
        checker: the cache's checker, which can access the pixels.
        records: maximum number of views.
        seed: seed for the random sample.
    """
    figures: dict[str, list[float]] = {}
    same: list[bool] = []
    wrong: list[tuple[int, int, str, str]] = []
    lowest = {name: row["p1"] - MARGIN for name, row in cache.manifest.fidelity.items()}
    for batch in rerun_teacher(cache, teacher, checker, sample_places(cache, records, seed)):
        found = {
            **batch.close._asdict(),
            **({} if batch.pooled_cosine is None else {POOLED_COSINE: batch.pooled_cosine}),
        }
        for name, values in found.items():
            figures.setdefault(name, []).extend(values.tolist())
        if teacher.spec.has_classifier:
            stored = checker.logits(batch.records, batch.decoded).argmax(1)
            same += (batch.output.logits.argmax(1).numpy() == stored).tolist()
        for name, what in COMPARED.items():
            least = lowest.get(name, 1.0 - MARGIN)
            for place, record, cosine in zip(batch.places, batch.records, found.get(name, ()), strict=False):
                if not cosine >= least:
                    message = f"stored vs. live {what} {cosine:.4f}, expected >= {least:.4f}"
                    wrong.append((*place, record.key, message))
    top1 = 100 * float(np.mean(same)) if same else None
    return TeacherAgreement(len(figures.get("cosine", ())), summarize(figures), top1, wrong)
