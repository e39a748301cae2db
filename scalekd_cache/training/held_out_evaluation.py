"""Compares a student with its teachers on held-out images, for caches without labels.

In: a trained model, the teacher outputs stored by stage 1 (`models/teacher_outputs.py`), and the held-out images.
Out: metric values by name (`FIGURES`).
Invariant: the images are split across all ranks, and every rank gets the same values. The model is not changed.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scalekd_cache.codec.base import feature_norms
from scalekd_cache.data.base import Source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import center_views, omitted
from scalekd_cache.models.probing import leave_one_out_knn, linear_probe_accuracy, retrieval_agreement
from scalekd_cache.models.tail import Tail
from scalekd_cache.models.teacher_outputs import load_held_out
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.store.base import repair_fix
from scalekd_cache.store.manifest import HELD_OUT
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import local_path
from scalekd_cache.training.run_cache import RunCache
from scalekd_cache.training.run_evaluation import Evaluation
from scalekd_cache.training.trainer import DistillModel

FIGURES = {
    "held_out_loss": "feature loss per image",
    "cosine_patch": "cosine between the student's projected map and the teacher's map, averaged over positions",
    "cosine_pooled": "cosine between the student's projected pooled embedding and the teacher's",
    "retrieval": "fraction of an image's 10 nearest neighbors shared by student and teacher",
    "knn": "leave-one-out k-NN accuracy with the student's embeddings, in percent",
    "teacher_knn": "k-NN accuracy with the teacher's embeddings",
    "linear_probe": "accuracy of a linear classifier on the student's embeddings, in percent",
    "teacher_linear_probe": "accuracy of a linear classifier on the teacher's embeddings",
}
"""Metric descriptions. The last four metrics need labels. Linear classifiers are fitted on every other image."""


OF_STUDENT = ("knn", "linear_probe")
"""Metrics that do not depend on the teacher."""
LEAST_IMAGES = 40
"""Minimum number of held-out images for k-NN metrics. With fewer, the 10 nearest neighbors would be at least a quarter
of all images."""


class TeacherComparisons:
    """The held-out images for a run's caches, with each teacher's outputs.

    Args:
        run_cache: the unlabeled caches.
        source: their validation split.
        process: this process.

    Raises:
        UserError: a teacher's output file is missing, damaged, or for different images.
    """

    def __init__(self, run_cache: RunCache, source: Source, process: Process) -> None:
        each = [TeacherComparison(cache, number, source, process) for number, cache in enumerate(run_cache.caches)]
        self._each = dict(zip(run_cache.names(), each, strict=True))

    def evaluate(
        self,
        model: DistillModel,
        tails: Sequence[Tail],
        *,
        final: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """A student's metrics (`FIGURES`), the same on every rank. With multiple teachers, the main values are means
        over the teachers, and each teacher's metrics are included. Returns None on all ranks if `stop` was true on any
        rank.

        Args:
            model: student and heads in eval mode, on this process's device.
            tails: the teachers' tails.
            final: whether to also fit linear classifiers.
            stop: called after every batch of images.
        """
        found = dict[str, dict[str, float]]()
        for (name, one), tail in zip(self._each.items(), tails, strict=True):
            figures = one.figures(model, tail, final=final, stop=stop)
            if figures is None:
                return None
            found[name] = figures
        first, *others = found.values()
        if not others:
            return Evaluation(held_out=first)
        means = {
            name: sum(one[name] for one in found.values()) / len(found)
            for name in first
            if all(name in one for one in others)
        }
        apart = {
            teacher: {name: value for name, value in figures.items() if name not in OF_STUDENT}
            for teacher, figures in found.items()
        }
        return Evaluation(held_out=means, of_teachers=apart)


def open_comparisons(run_cache: RunCache, source: Source | None, process: Process) -> TeacherComparisons | None:
    """The comparisons for unlabeled caches with validation images, otherwise None. Errors are as in
    `TeacherComparisons`."""
    if source is None or run_cache.facts[0].labeled:
        return None
    return TeacherComparisons(run_cache, source, process)


class TeacherComparison:
    """The held-out images for one cache, with its teacher's outputs. `number` is the teacher's index in the run."""

    def __init__(self, cache: Cache, number: int, source: Source, process: Process) -> None:
        self.source, self.process, self.number = source, process, number
        self.size = int(cache.manifest.facts.view_recipe["size"])
        facts = cache.manifest.facts
        self.teacher = load_held_out(local_path(cache.root / HELD_OUT), source, facts.teacher_files.get(HELD_OUT))
        spec = TeacherSpec.from_json(facts.teacher["spec"])
        found = (self.teacher.pooled.shape[1], *self.teacher.features.shape[1:])
        expected = (spec.pooled or spec.feature_shape[0], *spec.feature_shape)
        if found != expected:
            what = "the stored outputs on held-out images belong to a different teacher"
            place = cache.root / HELD_OUT
            raise UserError(what, got=found, expected=expected, where=place, fix=repair_fix(place))
        self._row_of = {index: row for row, index in enumerate(self.teacher.indices.tolist())}
        self._map_of = {row: place for place, row in enumerate(self.teacher.mapped.tolist())}
        self._teacher_figures: dict[str, float] = {}
        self._say = functools.cache(process.print_rank0)  # the same note only once, not after every epoch

    @torch.no_grad()
    def figures(
        self, model: DistillModel, tail: Tail, *, final: bool = False, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """A student's metrics relative to this teacher; None on all ranks if `stop` was true on any rank."""
        process, rows = self.process, len(self.teacher.indices)
        share = self.teacher.indices[process.rank :: process.world_size].tolist()
        sums = torch.zeros(4, dtype=torch.float64, device=process.device)
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=process.device)
        width = model.student.embed(model.prepare(blank)).shape[1]
        embeddings = torch.zeros(rows, width + 1, device=process.device)  # last column: 1 if the row is present
        for batch in center_views(self.source, share, self.size, workers=model.config.train.workers):
            if not batch.indices:
                continue
            images, places = batch.images.to(process.device), [self._row_of[index] for index in batch.indices]
            self.teacher.check_images(batch, places, self.source)
            embeddings[places, :-1] = model.student.embed(model.prepare(images)).float()
            embeddings[places, -1] = 1
            mapped = [at for at, row in enumerate(places) if row in self._map_of]
            if mapped:
                sums += self._compare_maps(model, tail, images[mapped], [places[at] for at in mapped])
            if stop():
                break
        stopped = torch.tensor(int(stop()), device=process.device)
        dist.all_reduce(stopped)
        if stopped:
            return None
        dist.all_reduce(sums)
        dist.all_reduce(embeddings)
        there = embeddings[:, -1].cpu() > 0
        if lost := rows - int(there.sum()):
            first = int(self.teacher.indices[~there][0])
            self._say(omitted(lost, "held-out image", self.source.samples[first].key))
        student, teacher = embeddings[:, :-1].cpu()[there], self.teacher.pooled[there]
        means = zip(FIGURES, (sums[:3] / sums[3]).tolist(), strict=False)
        found = {name: value for name, value in means if not math.isnan(value)}
        if len(student) >= LEAST_IMAGES:
            found["retrieval"] = retrieval_agreement(student, teacher)
        if not self.source.class_names:
            return found
        labels = torch.tensor([self.source.samples[index].label for index in self.teacher.indices[there].tolist()])
        if final or not self._teacher_figures:
            self._teacher_figures = _label_figures(teacher, labels, "teacher_", final)
        return {**found, **_label_figures(student, labels, "", final), **self._teacher_figures}

    def _compare_maps(self, model: DistillModel, tail: Tail, images: Tensor, rows: list[int]) -> Tensor:
        """Sums of loss, patch cosine and pooled cosine over uint8 images (B, 3, S, S), plus the image count: (4,)
        float64."""
        device, config = self.process.device, model.config
        features = self.teacher.features[[self._map_of[row] for row in rows]].to(device)
        pooled = self.teacher.pooled[rows].to(device)
        targets = Targets(features, feature_norms(features), features.new_zeros(len(rows), 0), pooled=pooled)
        output = model.student(model.prepare(images))
        maps = model.project(output, self.number, len(rows), tail)
        no_labels = torch.zeros(len(rows), dtype=torch.int64, device=device)
        loss = distillation_losses(config.scalekd, config.train, output.logits, no_labels, maps, targets).total
        projected = next((one for one in (maps.s4_spatial, maps.s3_spatial) if one is not None), None)
        cosines = [
            loss.new_tensor(torch.nan) if one is None else F.cosine_similarity(one.float(), target).mean()
            for one, target in ((projected, features), (maps.pooled, pooled))
        ]
        return len(rows) * torch.stack([loss, *cosines, loss.new_ones(())]).double()


def _label_figures(embeddings: Tensor, labels: Tensor, prefix: str, final: bool) -> dict[str, float]:
    """k-NN and, if `final`, linear-probe accuracy in percent; empty if there are too few images."""
    if len(labels) < 2:
        return {}
    found = {f"{prefix}knn": leave_one_out_knn(embeddings, labels)}
    parts = embeddings[::2], labels[::2], embeddings[1::2], labels[1::2]
    if final and len(set(parts[1].tolist())) > 1:
        found[f"{prefix}linear_probe"] = linear_probe_accuracy(*parts)
    return found
