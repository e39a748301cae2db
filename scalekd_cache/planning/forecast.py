"""Forecasts the cost of a cache and its students.

In: options for stage 1 and for training, the number of students, and a GPU model. Out: a `Forecast`.
Invariant: bytes and this machine's times are measured on a small real unit (`caching/size_probe.py`) and on one real
training step (`step.py`). FLOPs and step memory are counted for the real modules on the meta device. Assumptions
(utilization) and missing teacher weights are reported along with the figures.
"""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scalekd_cache.caching.codec_selection import AUTO, CALIBRATION_VIEWS, check_codec_options, select_codec
from scalekd_cache.caching.job_plan import make_logit_codec, make_stage
from scalekd_cache.caching.make_units import Stage, unit_ranges
from scalekd_cache.caching.pixel_cache import PixelCache, open_shared_views
from scalekd_cache.caching.prepare import images_besides, open_validation
from scalekd_cache.caching.size_probe import SizeProbe, measure_sizes
from scalekd_cache.codec import FITTED, make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.pooled import pooled_codec
from scalekd_cache.codec.transform import TransformCodec
from scalekd_cache.codec.transform_state import MAX_TOKENS, state_bytes
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_source
from scalekd_cache.devices import describe_device, memory_errors
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.batch_size import BatchLimits
from scalekd_cache.models.tail import tail_tensors
from scalekd_cache.models.teacher import Teacher, load_teacher, meta_teacher, split_tail, teacher_classes
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.models.timm_models import check_name, timm_name
from scalekd_cache.models.weights import find_weights
from scalekd_cache.planning.costs import PairCosts, pair_costs
from scalekd_cache.planning.forecast_result import Forecast, GpuTimes, HereTimes
from scalekd_cache.planning.gpus import (
    FORWARD_UTILIZATION,
    GPUS,
    HEADS_UTILIZATION,
    STUDENT_UTILIZATION,
    gpu_name,
    name_of_device,
)
from scalekd_cache.planning.step import TrainingStep, step_memory
from scalekd_cache.scalekd.losses import check_loss
from scalekd_cache.store.durable_files import free_bytes
from scalekd_cache.training.targets import samples_of_share

MAX_EXTRA_S = 60.0
"""Time limit in seconds for fitting codecs that were not requested."""


class _Measured(NamedTuple):
    """What stage 1 would use, and its measurements on this machine."""

    stage: Stage
    available: bool
    """Whether the teacher has its weights; if not, they are random."""
    classes: int
    found: SizeProbe
    before_s: float
    """Seconds to load the teacher and to fit the codec."""
    others: int
    """Images that the teacher processes for checks and evaluation."""


class _Sizes(NamedTuple):
    """Sizes in bytes; `per_view` is split by part."""

    images: int
    views: int
    per_view: dict[str, float]
    once: int
    total: float


def forecast(
    config: CacheTeacherConfig,
    training: DistillConfig,
    process: Process,
    *,
    students: int,
    epochs: int,
    gpu: str | None = None,
    first: Forecast | None = None,
) -> Forecast:
    """Measure sizes and times, and count FLOPs, for a cache and its students.

    Args:
        config: all options for stage 1.
        training: the recipe's training options, including the student.
        process: this process.
        students: number of students to train.
        epochs: number of epochs per student.
        gpu: a name in `gpus.GPUS` (None: this machine's GPU; without one in the table, there are no GPU-hours).
        first: with multiple teachers, the forecast for the first one, whose cache stores the pixels.

    Raises:
        UserError: stage 1 does not accept an option, a codec must be fitted but the teacher weights are missing, or no
            loss is left.
    """
    here = name_of_device(process.device)
    gpu = gpu_name(gpu) if gpu else here  # raises before anything is measured
    check_codec_options(config)
    training = _with_share(config, training)
    source = open_shared_views(config) if config.cache.pixels_from else open_source(config.data, "train")
    training = training.on_data(classes=len(source.class_names))
    shares = first is not None and config.views.pixels == "baked"
    measured = _measure(config, source, process, shares_pixels=shares)
    stage, sizes = measured.stage, _sizes(config, measured.stage, measured.found)
    labeled, logits = bool(source.class_names), stage.teacher.spec.has_classifier
    check_loss(training.scalekd, training.train, labeled=labeled, logits=logits)
    costs = _costs(config, training, measured)
    step_s, note = _step(config, training, measured)
    read_bytes = sizes.per_view["total"] + _shared_pixels(source, first if shares else None)
    return Forecast(
        cache=config.cache.path,
        data=config.data.source,
        images=sizes.images,
        views=sizes.views,
        teacher=_label(config),
        teacher_available=measured.available,
        student=training.student.name,
        codec=_name(stage.codec),
        stored_features=1 / config.cache.features_every,
        bytes_per_view=sizes.per_view,
        logit_bytes=stage.logit_codec.record_bytes,
        once_bytes=sizes.once,
        total_bytes=sizes.total,
        free_bytes=free_bytes(Path(config.cache.path)),
        stored_bytes=sum(file.stat().st_size for file in Path(config.cache.path).rglob("*") if file.is_file()),
        here=_times_here(config, measured, sizes, step_s, students, epochs),
        students=students,
        epochs=epochs,
        step_memory=_step_memory(config, training, measured),
        gpu=_gpu_times(gpu, costs, measured, sizes, students, epochs, read_bytes, known=gpu == here) if gpu else None,
        alternatives=_alternatives(config, measured, sizes.once, process),
        notes=list(filter(None, [_classes_note(measured.stage), note, _batch_note(config, training, sizes.images)])),
    )


def _label(config: CacheTeacherConfig) -> str:
    """The teacher's name, marked if its weights are random."""
    return teacher_label({"spec": {"name": config.teacher.name}, "config": to_plain(find_weights(config.teacher))})


def _costs(config: CacheTeacherConfig, training: DistillConfig, measured: _Measured) -> PairCosts:
    return pair_costs(
        config.teacher.name,
        training.student.name,
        training.scalekd,
        config.views.size,
        measured.classes,
        training.student.image_size,
        labeled=bool(measured.stage.source.class_names),
        batch=training.train.micro_batch_size,
    )


def _measure(
    config: CacheTeacherConfig, source: Source | PixelCache, process: Process, *, shares_pixels: bool
) -> _Measured:
    """Load the teacher, make its codecs, and write a small unit."""
    started = time.perf_counter()
    teacher, available = _teacher(config, len(source.class_names), process)
    codec = _codec(config, source, teacher, process, available=available)
    before_s = time.perf_counter() - started
    logits = make_logit_codec(config.cache, teacher, exact=codec.id == "float32")
    second = pooled_codec(codec.id, teacher.spec.pooled)
    codecs = (codec, logits, second)
    stage = make_stage(config, process, source, teacher, *codecs, fingerprint="", shares_pixels=shares_pixels)
    found = measure_sizes(stage, config.cache)
    others = images_besides(config, stage, found.pass_s, open_validation(config, dry_run=True))
    classes = len(source.class_names) or teacher.spec.num_classes
    return _Measured(stage, available, classes, found, before_s, others)


def _with_share(config: CacheTeacherConfig, training: DistillConfig) -> DistillConfig:
    """The training options, with the feature share for this cache.

    Raises:
        UserError: `distill` would not accept the feature share.
    """
    stored, asked = 1 / config.cache.features_every, training.scalekd.share_of()
    samples_of_share(asked, config.cache.features_every, training.train.micro_batch_size, config.cache.path)
    share = (stored if stored < 1 else None) if asked is None else asked
    return dataclasses.replace(training, scalekd=dataclasses.replace(training.scalekd, feature_share=share))


def _sizes(config: CacheTeacherConfig, stage: Stage, found: SizeProbe) -> _Sizes:
    """The cache's size, estimated from a small unit."""
    ranges, views = unit_ranges(stage.source, config.cache.samples_per_shard), config.cache.num_views
    images, parts = sum(map(len, ranges)), found.bytes_of(ranges, views)
    per_view = {part: round(value / (images * views), 1) for part, value in parts.items()}
    per_view["total"] = round(sum(parts.values()) / (images * views), 1)
    once = sum(value.numel() * value.element_size() for value in tail_tensors(split_tail(stage.teacher)).values())
    once += len(state_bytes(stage.codec.state)) if isinstance(stage.codec, TransformCodec) else 0
    return _Sizes(images, views, per_view, once, sum(parts.values()) + once)


def _stage_1_s(config: CacheTeacherConfig, measured: _Measured, views: int) -> float:
    """Stage-1 time in seconds for this number of views, in one process on this machine, with checks and evaluation.

    On a CPU, the workers and the teacher share the cores. On a GPU, the slower of the two determines the time.
    """
    stage, found = measured.stage, measured.found
    ranges = unit_ranges(stage.source, config.cache.samples_per_shard)
    groups = -(-views // config.cache.views_per_group)
    sample_s = found.sample_s / max(1, config.workers)
    shared = stage.device.type == "cpu" or config.workers == 0
    view_s = sample_s + found.teacher_s if shared else max(sample_s, found.teacher_s)
    units = len(ranges) * groups + 2  # the disk space check makes two units
    views_s = sum(map(len, ranges)) * views * view_s
    return measured.before_s + views_s + units * found.unit_s + measured.others * found.teacher_s


def _step(config: CacheTeacherConfig, training: DistillConfig, measured: _Measured) -> tuple[float, str | None]:
    """Seconds per image for a training step on this machine, and a note about the heads."""
    with torch.device(measured.stage.device):
        step = TrainingStep(
            training, split_tail(measured.stage.teacher), config.views.size, measured.classes, _pooled_width(measured)
        )
    return step.seconds(), step.note()


def _pooled_width(measured: _Measured) -> int:
    """Width of the pooled target; 0 with labels."""
    spec = measured.stage.teacher.spec
    return 0 if measured.stage.source.class_names else spec.pooled or spec.feature_shape[0]


def _classes_note(stage: Stage) -> str | None:
    """A note if `cache-teacher` would not accept the teacher's classifier for this dataset."""
    classes, needed = stage.teacher.spec.num_classes, len(stage.source.class_names)
    if classes == 0 or needed in (0, classes):
        return None
    return (
        f"note: the teacher has {counted(classes, 'class')}, the dataset {needed:,}: to make this cache, use "
        "--teacher.num_classes 0 (features only) or --teacher-weights fine-tuned on this data"
    )


def _batch_note(config: CacheTeacherConfig, training: DistillConfig, images: int) -> str | None:
    """A note if the recipe's batch gives few steps per epoch or drops many images."""
    train = training.train
    ranges = -(-images // config.cache.samples_per_shard)
    share, every = training.scalekd.share_of(), config.cache.features_every
    limits = BatchLimits.of_dataset(images, train.micro_batch_size, share=share, every=every, ranges=ranges)
    batch = limits.suitable(train.global_batch_size)
    if batch == train.global_batch_size:
        return None
    return (
        f"note: with {counted(images, 'image')}, use a smaller batch than {train.global_batch_size}: "
        f"`scalekd distill --batch {batch}`"
    )


def _times_here(
    config: CacheTeacherConfig, measured: _Measured, sizes: _Sizes, step_s: float, students: int, epochs: int
) -> HereTimes:
    """The times on this machine, in one process."""
    found, stage_1_s = measured.found, _stage_1_s(config, measured, sizes.views)
    quick = 4 * measured.stage.batch_size * found.teacher_s < MAX_EXTRA_S
    forward_s = _forward_s(measured.stage) if quick else found.teacher_s
    student_s, live_s = (sizes.images * epochs * seconds for seconds in (step_s, forward_s))
    return HereTimes(
        device=describe_device(measured.stage.device),
        draw_s_per_view=found.sample_s,
        teacher_s_per_view=found.teacher_s,
        step_s_per_image=step_s,
        stage_1_s=stage_1_s,
        student_s=student_s,
        online_s=student_s + live_s,
        breaks_even_after_students=math.ceil(stage_1_s / max(live_s, 1e-9)),
        saved_s=students * live_s - stage_1_s,
    )


def _gpu_times(
    name: str,
    costs: PairCosts,
    measured: _Measured,
    sizes: _Sizes,
    students: int,
    epochs: int,
    read_bytes: float,
    *,
    known: bool,
) -> GpuTimes:
    """GPU time computed from FLOPs. If this machine has the GPU (`known`), the teacher's time is measured."""
    card = GPUS[name]
    peak = card.peak_tflops * 1e12
    at_peak_s = costs.teacher.forward / peak
    forward_s = _forward_s(measured.stage) if known else at_peak_s / FORWARD_UTILIZATION
    step_s = (costs.student.total / STUDENT_UTILIZATION + costs.heads_total / HEADS_UTILIZATION) / peak
    stage_1_h = sizes.images * sizes.views * forward_s / 3600
    student_h, live_h = (sizes.images * epochs * seconds / 3600 for seconds in (step_s, forward_s))
    return GpuTimes(
        name=name,
        teacher_gpu_hours=stage_1_h,
        teacher_rate_measured=known,
        cores_per_gpu=measured.found.sample_s / forward_s,
        student_gpu_hours=student_h,
        online_gpu_hours=student_h + live_h,
        saved_gpu_hours=students * live_h - stage_1_h,
        images_per_s=1 / step_s,
        read_mb_per_s=read_bytes / step_s / 1e6,
        peak_tflops=card.peak_tflops,
        forward_utilization=at_peak_s / forward_s,
        student_utilization=STUDENT_UTILIZATION,
        heads_utilization=HEADS_UTILIZATION,
    )


@torch.no_grad()
def _forward_s(stage: Stage) -> float:
    """The teacher's seconds per view on this machine, from the fastest of three full batches after a warm-up batch."""
    size, seconds = stage.views.size, []
    with memory_errors("reduce the teacher's batch size: --teacher.batch_size=32"):
        pixels = torch.zeros(stage.batch_size, 3, size, size, dtype=torch.uint8, device=stage.device)
        for _ in range(4):
            started = time.perf_counter()
            stage.teacher(pixels).features.flatten()[0].item()  # synchronizes with the device
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / stage.batch_size


def _step_memory(config: CacheTeacherConfig, training: DistillConfig, measured: _Measured) -> dict[str, float]:
    with torch.device("meta"):
        meta = meta_teacher(config.teacher.name, config.views.size, measured.stage.teacher.spec.num_classes)
        return step_memory(training, meta, config.views.size, measured.classes, _pooled_width(measured))


def _teacher(config: CacheTeacherConfig, data_classes: int, process: Process) -> tuple[Teacher, bool]:
    """The teacher as loaded by stage 1, and True; with random weights, and False, if its weights are missing."""
    options = find_weights(config.teacher)
    load = partial(load_teacher, image_size=config.views.size, num_classes=data_classes, device=process.device)
    torch.manual_seed(config.views.seed)
    try:
        return load(options), True
    except UserError:
        if options.weights is not None or not options.pretrained:
            raise
    classes = teacher_classes(options, check_name(timm_name(options.name), "teacher.name"), None, data_classes)
    return load(dataclasses.replace(options, pretrained=False, num_classes=classes)), False


def _codec(
    config: CacheTeacherConfig, source: Source | PixelCache, teacher: Teacher, process: Process, *, available: bool
) -> FeatureCodec:
    if config.cache.codec not in (*FITTED, AUTO):
        return make_codec(config.cache.codec, teacher.spec.feature_shape)
    if not available:
        raise UserError(
            "this codec's output size depends on the teacher's features, but the teacher's weights are not available",
            got=f"--codec {config.cache.codec}, teacher {config.teacher.name}",
            fix=f"run `scalekd fetch --teacher {config.teacher.name}` on a machine with network access, "
            "set --teacher-weights, or plan with --codec int8",
        )
    return select_codec(config, source, teacher, process.device).codec


def _name(codec: FeatureCodec) -> str:
    return f"{codec.id}, noise {codec.noise:g}" if isinstance(codec, TransformCodec) else codec.id


def _shared_pixels(source: Source | PixelCache, first: Forecast | None) -> float:
    """Bytes read per view to get shared pixels; 0 without them. Complete records are read, including features."""
    if isinstance(source, PixelCache):
        return float(source.cache.manifest.bytes_per_view["total"])
    return 0.0 if first is None else first.bytes_per_view["total"]


def _alternatives(config: CacheTeacherConfig, measured: _Measured, once: int, process: Process) -> list[dict[str, Any]]:
    """Total bytes and stage-1 time on this machine with fewer or more views, and with different codecs."""
    stage, found = measured.stage, measured.found
    ranges = unit_ranges(stage.source, config.cache.samples_per_shard)
    views, every = config.cache.num_views, config.cache.features_every
    rows: list[dict[str, Any]] = []
    for other in sorted({*(max(every, views // part // every * every) for part in (4, 2)), 2 * views} - {views}):
        size = sum(found.bytes_of(ranges, other).values()) + once
        rows.append({"change": f"--views {other}", "bytes": size, "stage_1_s": _stage_1_s(config, measured, other)})
    total, stage_1_s = sum(found.bytes_of(ranges, views).values()) + once, _stage_1_s(config, measured, views)
    for name, size in _other_codecs(config, measured, process).items():
        if name != stage.codec.id:
            change = (size - found.per_view["features"]) * sum(map(len, ranges)) * views
            rows.append({"change": f"--codec {name}", "bytes": total + change, "stage_1_s": stage_1_s})
    return rows


def _other_codecs(config: CacheTeacherConfig, measured: _Measured, process: Process) -> dict[str, float]:
    """Bytes per view for features with int8, float16 and, if fitting is quick, the fitted codecs."""
    stage, found, every = measured.stage, measured.found, config.cache.features_every
    teacher, images = stage.teacher, sum(map(len, unit_ranges(stage.source, config.cache.samples_per_shard)))
    codecs = {name: make_codec(name, teacher.spec.feature_shape) for name in ("int8", "float16")}
    quick = found.teacher_s * min(CALIBRATION_VIEWS, images) < MAX_EXTRA_S
    fits = math.prod(teacher.spec.feature_shape[1:]) <= MAX_TOKENS
    if measured.available and quick and fits and stage.codec.id != "transform":
        started = time.perf_counter()
        for name in FITTED[:2]:
            store = dataclasses.replace(config.cache, codec=name, codec_target=None)
            other = dataclasses.replace(config, cache=store)
            codecs[name] = select_codec(other, stage.source, teacher, process.device).codec
            if time.perf_counter() - started > MAX_EXTRA_S / 2:
                break
    seconds = {name: pooled_codec(name, teacher.spec.pooled) for name in codecs}
    return {
        name: codec.record_bytes / every + (0 if (second := seconds[name]) is None else second.record_bytes)
        for name, codec in codecs.items()
    }
