"""Forecasts the cost of a cache and its students.

In: options for stage 1 and for training, the number of students, and a GPU model. Out: a `Forecast`.
Invariant: bytes are measured on a small real unit (`caching/size_probe.py`). FLOPs and step memory are counted for the
real modules on the meta device. Assumptions (utilization) and missing teacher weights are reported along with the
figures.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from scalekd_cache.caching.codec_selection import AUTO, CALIBRATION_VIEWS, check_codec_options, select_codec
from scalekd_cache.caching.job_plan import make_logit_codec, make_stage
from scalekd_cache.caching.make_units import Stage, unit_ranges
from scalekd_cache.caching.pixel_cache import PixelCache, open_shared_views
from scalekd_cache.caching.prepare import images_besides, open_validation
from scalekd_cache.caching.size_probe import PlaceholderTeacher, SizeProbe, measure_sizes
from scalekd_cache.codec import FITTED, Shape, make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import DenseLogits, LogitCodec
from scalekd_cache.codec.pooled import pooled_codec
from scalekd_cache.codec.recomputed import RecomputedLogits
from scalekd_cache.codec.top_k import TopKLogits
from scalekd_cache.codec.transform import TransformCodec
from scalekd_cache.codec.transform_state import MAX_TOKENS, state_bytes
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_source
from scalekd_cache.devices import memory_errors
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.tail import tail_tensors
from scalekd_cache.models.teacher import Teacher, load_teacher, teacher_classes
from scalekd_cache.models.timm_models import check_name, timm_name
from scalekd_cache.models.weights import find_weights
from scalekd_cache.planning.costs import meta_teacher, pair_costs, step_memory
from scalekd_cache.planning.forecast_result import Forecast
from scalekd_cache.planning.gpus import (
    FORWARD_UTILIZATION,
    HEADS_UTILIZATION,
    STUDENT_UTILIZATION,
    Gpu,
    gpu_of,
    name_of_device,
)
from scalekd_cache.store.durable_files import free_bytes

MAX_EXTRA_S = 60.0
"""Time limit in seconds for fitting codecs that were not requested."""


@dataclass(frozen=True)
class _Teacher:
    """The teacher, or a placeholder without weights."""

    live: Teacher | PlaceholderTeacher
    shape: Shape
    classes: int
    pooled: int
    """Width of the stored pooled embeddings; 0 if none are stored."""


class _Sizes(NamedTuple):
    """Sizes in bytes; `per_view` is split by part."""

    images: int
    views: int
    per_view: dict[str, float]
    once: int
    total: float


class _Times(NamedTuple):
    """Seconds per image on one GPU, and total GPU-hours."""

    forward_s: float
    step_s: float
    stage_1_h: float
    student_h: float
    online_h: float
    utilization: float
    """Fraction of the GPU's peak throughput reached in the forward pass."""


def forecast(
    config: CacheTeacherConfig,
    training: DistillConfig,
    process: Process,
    *,
    students: int,
    epochs: int,
    gpu: str,
    first: Forecast | None = None,
) -> Forecast:
    """Measure sizes and count FLOPs for a cache and its students.

    Args:
        config: all options for stage 1.
        training: the recipe's training options, including the student.
        process: this process.
        students: number of students to train.
        epochs: number of epochs per student.
        gpu: a name in `gpus.GPUS`.
        first: with multiple teachers, the forecast for the first one, whose cache stores the pixels.

    Raises:
        UserError: stage 1 does not accept an option, or a codec must be fitted but the teacher weights are missing.
    """
    card = gpu_of(gpu)
    check_codec_options(config)
    training = _with_share(config, training)
    source = open_shared_views(config) if config.cache.pixels_from else open_source(config.data, "train")
    training = training.on_data(classes=len(source.class_names))
    started = time.perf_counter()
    teacher = _teacher(config, len(source.class_names), process)
    classes = len(source.class_names) or teacher.classes
    codec = _codec(config, source, teacher, process)
    before_s = time.perf_counter() - started
    logits = _logits(config, teacher, codec)
    second = pooled_codec(codec.id, teacher.pooled)
    shares = first is not None and config.views.pixels == "baked"
    live = cast(Teacher, teacher.live)
    stage = make_stage(config, process, source, live, codec, logits, second, fingerprint="", shares_pixels=shares)
    found = measure_sizes(stage, config.cache)
    sizes = _sizes(config, source, teacher, codec, found)
    labeled = bool(source.class_names)
    available = isinstance(teacher.live, Teacher)
    measured_s = _forward_s(stage) if available and name_of_device(process.device) == gpu.lower() else None
    times = _times(config, training, card, sizes, epochs, classes, measured_s, labeled=labeled)
    read_bytes = sizes.per_view["total"] + _shared_pixels(source, first if shares else None)
    return Forecast(
        cache=config.cache.path,
        data=config.data.source,
        images=sizes.images,
        views=sizes.views,
        teacher=config.teacher.name,
        teacher_available=available,
        student=training.student.name,
        codec=_name(codec),
        stored_features=1 / config.cache.features_every,
        bytes_per_view=sizes.per_view,
        logit_bytes=logits.record_bytes,
        once_bytes=sizes.once,
        total_bytes=sizes.total,
        free_bytes=free_bytes(Path(config.cache.path)),
        gpu=gpu.lower(),
        teacher_gpu_hours=times.stage_1_h,
        teacher_rate_measured=measured_s is not None,
        teacher_s_per_view_here=found.teacher_s if available else None,
        stage_1_here_s=before_s + _stage_1_s(config, stage, found) if available else None,
        draw_s_per_view=found.sample_s,
        cores_per_gpu=found.sample_s / times.forward_s,
        student_gpu_hours=times.student_h,
        online_gpu_hours=times.online_h,
        students=students,
        epochs=epochs,
        saved_gpu_hours=students * (times.online_h - times.student_h) - times.stage_1_h,
        breaks_even_after_students=math.ceil(sizes.views / epochs),
        images_per_s=1 / times.step_s,
        read_mb_per_s=read_bytes / times.step_s / 1e6,
        step_memory=_step_memory(config, training, teacher, classes, labeled=labeled),
        alternatives=_alternatives(config, source, teacher, codec, found, process, sizes.once, times.stage_1_h),
        assumptions={
            "peak_tflops": card.peak_tflops,
            "forward_utilization": times.utilization,
            "student_utilization": STUDENT_UTILIZATION,
            "heads_utilization": HEADS_UTILIZATION,
        },
    )


def _with_share(config: CacheTeacherConfig, training: DistillConfig) -> DistillConfig:
    """The training options, with the feature share for this cache.

    Raises:
        UserError: the feature share is larger than the fraction of views with stored features.
    """
    stored, asked = 1 / config.cache.features_every, training.scalekd.share_of()
    if asked is not None and asked > stored + 1e-9:
        raise UserError(
            "scalekd.feature_share is larger than the fraction of views with stored features",
            got=f"scalekd.feature_share={asked:g}",
            expected=f"at most {stored:g} (cache.stored_features)",
            fix="raise --stored-features, or lower --feature-share",
        )
    share = (stored if stored < 1 else None) if asked is None else asked
    return dataclasses.replace(training, scalekd=dataclasses.replace(training.scalekd, feature_share=share))


def _sizes(
    config: CacheTeacherConfig, source: Source | PixelCache, teacher: _Teacher, codec: FeatureCodec, found: SizeProbe
) -> _Sizes:
    """The cache's size, estimated from a small unit."""
    ranges, views = unit_ranges(source, config.cache.samples_per_shard), config.cache.num_views
    images, parts = sum(map(len, ranges)), found.bytes_of(ranges, views)
    per_view = {part: round(value / (images * views), 1) for part, value in parts.items()}
    per_view["total"] = round(sum(parts.values()) / (images * views), 1)
    with torch.device("meta"):
        meta = meta_teacher(config.teacher.name, config.views.size, teacher.classes)
    once = sum(value.numel() * value.element_size() for value in tail_tensors(meta.tail).values())
    once += len(state_bytes(codec.state)) if isinstance(codec, TransformCodec) else 0
    return _Sizes(images, views, per_view, once, sum(parts.values()) + once)


def _stage_1_s(config: CacheTeacherConfig, stage: Stage, found: SizeProbe) -> float:
    """Stage-1 time in seconds, in one process on this machine, once the teacher and codec are ready.

    On a CPU, the workers and the teacher share the cores. On a GPU, the slower of the two determines the time.
    """
    ranges = unit_ranges(stage.source, config.cache.samples_per_shard)
    views, groups = config.cache.num_views, -(-config.cache.num_views // config.cache.views_per_group)
    sample_s = found.sample_s / max(1, config.workers)
    shared = stage.device.type == "cpu" or config.workers == 0
    view_s = sample_s + found.teacher_s if shared else max(sample_s, found.teacher_s)
    others = images_besides(config, stage, found.pass_s, open_validation(config, dry_run=True))
    units = len(ranges) * groups + 2  # the disk space check makes two units
    return sum(map(len, ranges)) * views * view_s + units * found.unit_s + others * found.teacher_s


def _times(
    config: CacheTeacherConfig,
    training: DistillConfig,
    card: Gpu,
    sizes: _Sizes,
    epochs: int,
    classes: int,
    measured_s: float | None,
    *,
    labeled: bool,
) -> _Times:
    """GPU time computed from FLOPs. If this machine has the GPU, the teacher's time is `measured_s` (seconds per
    view)."""
    student = training.student
    costs = pair_costs(
        config.teacher.name,
        student.name,
        training.scalekd,
        config.views.size,
        classes,
        student.image_size,
        labeled=labeled,
    )
    peak = card.peak_tflops * 1e12
    at_peak_s = costs.teacher.forward / peak
    forward_s = at_peak_s / FORWARD_UTILIZATION if measured_s is None else measured_s
    step_s = (costs.student.total / STUDENT_UTILIZATION + costs.heads_total / HEADS_UTILIZATION) / peak
    student_h = sizes.images * epochs * step_s / 3600
    return _Times(
        forward_s=forward_s,
        step_s=step_s,
        stage_1_h=sizes.images * sizes.views * forward_s / 3600,
        student_h=student_h,
        online_h=student_h + sizes.images * epochs * forward_s / 3600,
        utilization=at_peak_s / forward_s,
    )


@torch.no_grad()
def _forward_s(stage: Stage) -> float:
    """The teacher's seconds per view on this machine, from the fastest of three full batches after a warm-up batch."""
    size, seconds = stage.views.size, []
    with memory_errors("lower the teacher's batch: --teacher.batch_size=32"):
        pixels = torch.zeros(stage.batch_size, 3, size, size, dtype=torch.uint8, device=stage.device)
        for _ in range(4):
            started = time.perf_counter()
            stage.teacher(pixels).features.flatten()[0].item()  # synchronizes with the device
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) / stage.batch_size


def _step_memory(
    config: CacheTeacherConfig, training: DistillConfig, teacher: _Teacher, classes: int, *, labeled: bool
) -> dict[str, float]:
    with torch.device("meta"):
        meta = meta_teacher(config.teacher.name, config.views.size, teacher.classes)
        pooled = 0 if labeled else teacher.pooled or teacher.shape[0]
        return step_memory(training, meta, config.views.size, classes, pooled)


def _teacher(config: CacheTeacherConfig, data_classes: int, process: Process) -> _Teacher:
    """The teacher as loaded by stage 1, or a placeholder with its shapes if the weights are missing."""
    options, size = find_weights(config.teacher), config.views.size
    torch.manual_seed(config.views.seed)
    try:
        teacher = load_teacher(options, image_size=size, num_classes=data_classes, device=process.device)
        spec = teacher.spec
        return _Teacher(teacher, spec.feature_shape, spec.num_classes, spec.pooled)
    except UserError:
        if options.weights is not None or not options.pretrained:
            raise
    classes = teacher_classes(options, check_name(timm_name(options.name), "teacher.name"), None, data_classes)
    if data_classes == 0:  # a forward pass, even with random weights, shows whether an embedding is stored
        random = dataclasses.replace(options, pretrained=False, num_classes=classes)
        spec = load_teacher(random, image_size=size, num_classes=0, device=torch.device("cpu")).spec
        shape, pooled = spec.feature_shape, spec.pooled
    else:
        with torch.device("meta"):
            shape, pooled = meta_teacher(options.name, size, data_classes).tail_out, 0
    return _Teacher(PlaceholderTeacher(shape, classes, pooled), shape, classes, pooled)


def _codec(
    config: CacheTeacherConfig, source: Source | PixelCache, teacher: _Teacher, process: Process
) -> FeatureCodec:
    if config.cache.codec not in (*FITTED, AUTO):
        return make_codec(config.cache.codec, teacher.shape)
    if not isinstance(teacher.live, Teacher):
        raise UserError(
            "this codec's size depends on the teacher's features, but the teacher's weights are not available",
            got=f"--codec {config.cache.codec}, teacher {config.teacher.name}",
            fix=f"run `scalekd fetch --teacher {config.teacher.name}` on a machine with network access, "
            "set --teacher-weights, or plan with --codec int8",
        )
    return select_codec(config, source, teacher.live, process.device).codec


def _logits(config: CacheTeacherConfig, teacher: _Teacher, codec: FeatureCodec) -> LogitCodec:
    exact = codec.id == "float32"
    if isinstance(teacher.live, Teacher):
        return make_logit_codec(config.cache, teacher.live, exact=exact)
    if teacher.classes == 0 or config.cache.logits == "dense":
        return DenseLogits(teacher.classes, exact=exact)
    if config.cache.logits == "top_k":
        return TopKLogits(teacher.classes, config.cache.top_k)
    return RecomputedLogits(teacher.classes, "0" * 64)


def _name(codec: FeatureCodec) -> str:
    return f"{codec.id}, noise {codec.noise:g}" if isinstance(codec, TransformCodec) else codec.id


def _shared_pixels(source: Source | PixelCache, first: Forecast | None) -> float:
    """Bytes read per view to get shared pixels; 0 without them. Complete records are read, including features."""
    if isinstance(source, PixelCache):
        return float(source.cache.manifest.bytes_per_view["total"])
    return 0.0 if first is None else first.bytes_per_view["total"]


def _alternatives(
    config: CacheTeacherConfig,
    source: Source | PixelCache,
    teacher: _Teacher,
    codec: FeatureCodec,
    found: SizeProbe,
    process: Process,
    once: int,
    stage_1: float,
) -> list[dict[str, Any]]:
    """Total bytes and teacher GPU-hours with fewer or more views, and with different codecs."""
    ranges = unit_ranges(source, config.cache.samples_per_shard)
    views, images = config.cache.num_views, sum(map(len, ranges))
    rows: list[dict[str, Any]] = []
    total = sum(found.bytes_of(ranges, views).values()) + once
    every = config.cache.features_every
    for other in sorted({*(max(every, views // part // every * every) for part in (4, 2)), 2 * views} - {views}):
        size = sum(found.bytes_of(ranges, other).values()) + once
        rows.append({"change": f"--views {other}", "bytes": size, "gpu_hours": stage_1 * other / views})
    records: dict[str, float] = {}
    for name in ("int8", "float16"):
        second = pooled_codec(name, teacher.pooled)
        maps = make_codec(name, teacher.shape).record_bytes / every
        records[name] = maps + (0 if second is None else second.record_bytes)
    quick = found.teacher_s * min(CALIBRATION_VIEWS, images) < MAX_EXTRA_S
    fits = teacher.shape[1] * teacher.shape[2] <= MAX_TOKENS
    if isinstance(teacher.live, Teacher) and quick and fits and codec.id != "transform":
        started = time.perf_counter()
        for name in FITTED[:2]:
            store = dataclasses.replace(config.cache, codec=name, codec_target=None)
            fitted = select_codec(dataclasses.replace(config, cache=store), source, teacher.live, process.device)
            second = pooled_codec(name, teacher.pooled)
            records[name] = fitted.codec.record_bytes / every + (0 if second is None else second.record_bytes)
            if time.perf_counter() - started > MAX_EXTRA_S / 2:
                break
    for name, size in records.items():
        if name != codec.id:
            change = (size - found.per_view["features"]) * images * views
            rows.append({"change": f"--codec {name}", "bytes": total + change, "gpu_hours": stage_1})
    return rows
