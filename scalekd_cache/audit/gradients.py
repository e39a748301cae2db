"""Measures how cached targets change a student's gradients (`scalekd prove`).

The cache's teacher is re-run on a sample of its views. A student's gradients from the stored targets are compared
with those from the live targets.
In: a finished cache, its teacher, training options. Out: a `GradientComparison`: the fidelity of the stored targets,
and the gradient error relative to the gradient's sampling noise.
Invariant: nothing is written. Both gradients use the same images, weights, random numbers and BatchNorm groups, so
they differ only in the targets.

For micro-batch i, the gradient of the full loss with respect to the student's parameters is g_i with live targets and
g_i + e_i with cached targets. The sampling noise s^2 is the variance of g_i over micro-batches. The mean of |e_i|^2
splits into a constant part (bias) and a part that averages out (variance). A batch of k micro-batches has sampling
noise s^2 / k and codec noise bias^2 + variance / k. Their ratio shows how precise the stored targets need to be.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd_cache import __version__
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import kl_divergence
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.devices import recorded_versions
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.batch_size import BatchLimits
from scalekd_cache.loader.loader import Batch, MicroBatches, Slot
from scalekd_cache.loader.order import steps_per_epoch
from scalekd_cache.models.evaluate import percent
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import Tail
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.scalekd.losses import Targets, check_loss
from scalekd_cache.store.fidelity_summary import Summary, summarize
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.training.init_weights import load_init_weights
from scalekd_cache.training.run_cache import has_logits
from scalekd_cache.training.targets import (
    TargetSource,
    feature_samples,
    load_cache_classifier,
    load_cache_tail,
    make_order,
    pooled_width,
)
from scalekd_cache.training.trainer import DistillModel

TOLERANCE = 0.01
"""How far the 1st percentile of the mean-removed cosine may fall below its stage 1 value."""


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """A comparison of targets and gradients. Its fields form the JSON output."""

    cache: str
    fingerprint: str
    codec: dict[str, Any]
    teacher: str
    student: str
    start: str | None
    """Folder that holds the student's weights (None: random weights)."""
    views: int
    """Number of views on which the teacher was re-run."""
    micro_batches: int
    micro_batch_size: int
    global_batch_size: int
    fidelity: Summary
    """Cosines of decoded features, KL and top-1 agreement of stored logits, all against the live teacher."""
    as_cached: Summary
    """The same metrics, measured in stage 1."""
    holds: bool
    """Whether the 1st percentile in `fidelity` is at most `TOLERANCE` below the one in `as_cached`."""
    gradient_cosine: float
    """Cosine between the gradients from cached and live targets, over all views."""
    gradient_relative_error: float
    """Norm of the difference between these gradients divided by the norm of the live gradient."""
    micro_batch_cosine: float
    """Per-micro-batch cosine, averaged over micro-batches."""
    micro_batch_relative_error: float
    noise_ratio: float
    """Variance added by the codec to a global batch's gradient, divided by the sampling variance."""
    noise_ratio_db: float | None
    """Ratio of sampling noise to codec noise in decibels (None: no codec noise)."""
    bias_share: float
    """Fraction of the codec's squared error that is bias, i.e., constant across micro-batches (0 for unbiased
    targets)."""
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    def sentence(self) -> str:
        """The result as one sentence."""
        cosine = self.fidelity["cosine_mean_removed"]
        start = f"{self.cache}: teacher {self.teacher} re-run on {counted(self.views, 'view')}; mean-removed cosine "
        if not self.holds:
            before = self.as_cached["cosine_mean_removed"]["p1"]
            return (
                f"{start}{cosine['p1']:.5f} (1st percentile), {before:.5f} in stage 1: "
                "cached targets do not match this teacher's outputs"
            )
        batch = 100 / (1 + self.noise_ratio)
        noise = "none" if self.noise_ratio_db is None else f"{self.noise_ratio_db:.1f} dB below sampling noise"
        return (
            f"{start}{cosine['mean']:.5f}; gradient of {self.student}, cached vs. live targets: cosine "
            f"{self.gradient_cosine:.6f}, relative error {self.gradient_relative_error:.2g}; codec noise: {noise}, "
            f"equivalent to training with {percent(batch)} of the batch size ({self.global_batch_size})"
        )


def compare_gradients(config: DistillConfig, process: Process, views: int) -> GradientComparison:
    """Re-run a cache's teacher on a sample of its views and compare targets and gradients.

    Args:
        config: training options, such as cache, student, method, micro-batch size, and `init` for a trained student.
        process: this process (one rank).
        views: number of views, sampled with `train.seed`; fewer if the cache has fewer.

    Raises:
        UserError: the cache is unfinished or damaged, the teacher differs, or there are fewer than two micro-batches.
    """
    cache = Cache.open(config.cache, config.remote)
    manifest, device = cache.manifest, process.device
    precision = manifest.facts.fingerprint_fields["precision"]
    options = cache_teacher_config(manifest.facts.teacher["config"], config.teacher_weights, precision)
    teacher = load_cache_teacher(manifest, options, device)
    micro = _micro_batch(config, cache, views)
    features = feature_samples(config.scalekd, cache, micro)
    order = make_order(dataclasses.replace(config.train, shuffle_block=1, shuffle_window=len(cache)), cache, process)
    data = MicroBatches(
        cache,
        order,
        micro,
        micro,
        pixels=open_shared_pixels(cache, config.pixels_from, manifest.num_views, config.remote),
        data=config.data,
    )
    each = steps_per_epoch(order, micro)
    count = min(views // micro, manifest.num_views * each)
    if count < 2:
        raise _too_few(cache, counted(count, "micro-batch"), 2 * micro)
    config = config.on_data(classes=len(manifest.facts.class_names))
    check_loss(config.scalekd, config.train, labeled=manifest.facts.labeled, logits=has_logits([manifest.facts]))
    model, tail = _student(config, cache, device)
    codecs = data.targets[0].codecs
    classifier = load_cache_classifier(config, cache, codecs.logits, process)
    cached = TargetSource(codecs, classifier, features=features)
    compare = _GradientSums(model, tail, cached, cached._replace(teacher=teacher), config.train.seed)
    for number in range(count):
        compare.add(data[Slot(number % manifest.num_views, number // manifest.num_views, 0, True)].to(device))
    return _summarize(config, cache, compare, micro, device)


def _micro_batch(config: DistillConfig, cache: Cache, views: int) -> int:
    """The largest micro-batch, up to the training one, of which there are at least two in `views` views of the cache.

    Raises:
        UserError: there are too few views.
    """
    every = cache.manifest.facts.features_every
    largest = config.train.micro_batch_size
    unit = BatchLimits.of_dataset(len(cache), largest, share=config.scalekd.share_of(), every=every).unit
    unit = unit if unit <= largest else 1  # the share is an error, reported later
    stored = len(cache) if cache.manifest.num_views > 1 else len(cache) // 2
    micro = min(largest, stored, views // 2) // unit * unit
    if micro == 0:
        few = views // 2 < unit
        raise _too_few(cache, counted(views if few else stored, "view"), 2 * unit, views=few)
    return micro


def _too_few(cache: Cache, got: str, least: int, *, views: bool = False) -> UserError:
    """The error for fewer than two micro-batches: of the views that were asked for, or in the cache."""
    return UserError(
        "cannot estimate gradient noise from fewer than two micro-batches",
        got=got,
        expected=f"at least {counted(least, 'view')}",
        where=cache.root,
        fix=f"set --views {least} or more" if views else "use a cache with more images",
    )


def _student(config: DistillConfig, cache: Cache, device: torch.device) -> tuple[DistillModel, Tail]:
    """The model and the tail, as stage 2 builds them."""
    manifest = cache.manifest
    torch.manual_seed(config.train.seed)
    student = build_student(
        config.student, num_classes=manifest.facts.num_classes, image_size=manifest.facts.view_recipe["size"]
    )
    tail = load_cache_tail(cache).to(device)
    heads = make_heads(config, student, tail, pooled_width(manifest.facts))
    if config.init is not None:
        load_init_weights(config.init, student.model, heads)
    return DistillModel(config, student, [heads]).to(device), tail


class _GradientSums:
    """Running sums over micro-batches, so memory use does not grow with the number of micro-batches."""

    def __init__(
        self,
        model: DistillModel,
        tail: Tail,
        cached: TargetSource,
        live: TargetSource,
        seed: int,
    ) -> None:
        self.model, self.tail, self.seed = model, tail, seed
        self.cached_source, self.live_source = cached, live
        self.parameters = [parameter for parameter in model.student.parameters() if parameter.requires_grad]
        size = sum(parameter.numel() for parameter in self.parameters)
        device = self.parameters[0].device
        self.live, self.error = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
        self.squares: list[tuple[float, float, float]] = []
        """|g|^2, |e|^2 and the cosine for each micro-batch."""
        self.figures: dict[str, list[float]] = {}

    def add(self, batch: Batch) -> None:
        """Add a micro-batch."""
        live, cached = self.live_source(batch), self.cached_source(batch)
        self._add_fidelity(live, cached)
        one, other = self._gradient(batch, live), self._gradient(batch, cached)
        error = other - one
        cosine = float((one @ other) / (one.norm() * other.norm()).clamp_min(1e-300))
        self.squares.append((float(one @ one), float(error @ error), cosine))
        self.live += one
        self.error += error

    def _gradient(self, batch: Batch, targets: Targets) -> Tensor:
        """The student's full gradient, (n,) float64."""
        torch.manual_seed(self.seed)
        terms = self.model(batch.images, batch.labels, [targets], [self.tail])
        parts = torch.autograd.grad(terms.total, self.parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().double() for part in parts])

    def _add_fidelity(self, live: Targets, cached: Targets) -> None:
        close = fidelity(live.features, cached.features)._asdict()
        if live.logits.shape[1]:
            fresh, stored = live.logits.cpu().numpy(), cached.logits.cpu().numpy()
            if not cached.partial:  # top-k logits lack values for the other classes
                close["logit_kl"] = kl_divergence(fresh, stored)
            close["logit_top1_agreement"] = (fresh.argmax(1) == stored.argmax(1)).astype(np.float64)
        for name, values in close.items():
            self.figures.setdefault(name, []).extend(values.tolist())


def _summarize(
    config: DistillConfig, cache: Cache, found: _GradientSums, micro: int, device: torch.device
) -> GradientComparison:
    manifest, count = cache.manifest, len(found.squares)
    squares = np.array(found.squares)
    live, error = found.live / count, found.error / count
    sampling = count * (float(squares[:, 0].mean()) - float(live @ live)) / (count - 1)
    codec, sampling = float(squares[:, 1].mean()), max(sampling, 1e-300)
    bias = min(codec, max(0.0, (count * float(error @ error) - codec) / (count - 1)))
    parts = max(1, config.train.global_batch_size // micro)
    ratio = (parts * bias + codec - bias) / sampling if codec else 0.0
    close, measured = summarize(found.figures), manifest.fidelity
    cached = live + error
    return GradientComparison(
        cache=config.cache,
        fingerprint=manifest.facts.fingerprint,
        codec=manifest.facts.codec,
        teacher=teacher_label(manifest.facts.teacher),
        student=config.student.name,
        start=config.init,
        views=count * micro,
        micro_batches=count,
        micro_batch_size=micro,
        global_batch_size=config.train.global_batch_size,
        fidelity=close,
        as_cached=measured,
        holds=close["cosine_mean_removed"]["p1"] >= measured["cosine_mean_removed"]["p1"] - TOLERANCE,
        gradient_cosine=float(live @ cached / (live.norm() * cached.norm()).clamp_min(1e-300)),
        gradient_relative_error=float(error.norm() / live.norm().clamp_min(1e-300)),
        micro_batch_cosine=float(squares[:, 2].mean()),
        micro_batch_relative_error=float(np.sqrt(squares[:, 1] / squares[:, 0].clip(1e-300)).mean()),
        noise_ratio=ratio,
        noise_ratio_db=-10 * math.log10(ratio) if ratio > 0 else None,
        bias_share=bias / codec if codec else 0.0,
        versions={"scalekd_cache": __version__, **recorded_versions(device)},
    )
