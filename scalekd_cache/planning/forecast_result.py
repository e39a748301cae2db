"""A forecast's results, per teacher and in total, as JSON or text.

Invariant: nothing is measured or counted here.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scalekd_cache.errors import counted
from scalekd_cache.models.timm_models import DEMO_TEACHER
from scalekd_cache.progress import duration_text, size_text


@dataclass(frozen=True, kw_only=True)
class GpuTimes:
    """The forecast for one GPU model, from FLOPs, the GPU table and the assumed utilization."""

    name: str
    teacher_gpu_hours: float
    """GPU-hours for stage 1, based on the teacher's measured rate if this machine has that GPU."""
    teacher_rate_measured: bool
    cores_per_gpu: float
    """CPU cores that stage 1 needs per GPU: the GPU's views/s multiplied by draw_s_per_view."""
    student_gpu_hours: float
    """GPU-hours to train one student from the cache."""
    online_gpu_hours: float
    """GPU-hours to train one student with the teacher running in every step."""
    saved_gpu_hours: float
    """GPU-hours saved over all students: the online cost minus the cached cost, which includes stage 1."""
    images_per_s: float
    """Training throughput."""
    read_mb_per_s: float
    """Read rate for training."""
    peak_tflops: float
    forward_utilization: float
    student_utilization: float
    heads_utilization: float


@dataclass(frozen=True, kw_only=True)
class HereTimes:
    """Measured seconds for one process on this machine."""

    device: str
    draw_s_per_view: float
    """To sample a view on one core."""
    teacher_s_per_view: float
    """For the teacher, codec and store."""
    step_s_per_image: float
    """For a training step."""
    stage_1_s: float
    """Stage 1, with checks and evaluation."""
    student_s: float
    """Training one student from the cache."""
    online_s: float
    """Training one student with the teacher running in every step."""
    breaks_even_after_students: int
    """The first student for which stage 1 costs less time than running the teacher in every step."""
    saved_s: float
    """Saved over all students: the online time minus the cached time, which includes stage 1."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast for one teacher. Byte units are decimal (1 GB = 1e9)."""

    cache: str
    data: str
    images: int
    views: int
    teacher: str
    """The teacher's name, marked if its weights are random (--pretrained false)."""
    teacher_available: bool
    """Whether the weights are available. If not, sizes and times are measured with random weights."""
    student: str
    codec: str
    stored_features: float
    """Fraction of each image's views with features."""
    bytes_per_view: dict[str, float]
    """The same parts as in a manifest: features, target (label, view record, digest, logits), pixels, index, total."""
    logit_bytes: int
    """Bytes for a view's logits, which are included in the `target` part."""
    once_bytes: int
    """Bytes for the tail and codec state, which are stored once per cache."""
    total_bytes: float
    free_bytes: int
    stored_bytes: int
    """Bytes of the cache that are on the disk already."""
    here: HereTimes
    students: int
    epochs: int
    step_memory: dict[str, float]
    """Bytes for a step with one micro-batch: weights, gradients, optimizer, activations, total."""
    gpu: GpuTimes | None
    """None if no GPU was named and this machine has none in the table."""
    alternatives: list[dict[str, Any]]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


MOST_CORES = 64
"""If a GPU would need more CPU cores than this, which few machines have, their total time is printed instead."""


def _row(name: str, value: str, middle: str = "") -> str:
    return f"  {name:<48}{middle:>10}{value:>14}"


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _saved(seconds: float, kind: str = "") -> str:
    return f"{duration_text(abs(seconds), kind)} {'saved' if seconds >= 0 else 'more than without a cache'}"


def _gpu_hours(hours: float) -> str:
    return duration_text(3600 * hours, "GPU-")


def _cores(per_gpu: float, total_s: float) -> str:
    if per_gpu > MOST_CORES:
        return f"the CPU cores that sample the views limit the speed ({duration_text(total_s, 'core-')} in total)"
    return f"{max(1, math.ceil(per_gpu))} CPU cores per GPU"


def _gpu_lines(plan: Forecast, gpu: GpuTimes) -> list[str]:
    draw_s = plan.here.draw_s_per_view
    return [
        "",
        f"  stage 1 on one {gpu.name}: {_gpu_hours(gpu.teacher_gpu_hours)}; "
        f"{_cores(gpu.cores_per_gpu, plan.images * plan.views * draw_s)}",
        f"  one student from the cache: {_gpu_hours(gpu.student_gpu_hours)}; "
        f"with the teacher running in every step: {_gpu_hours(gpu.online_gpu_hours)}; "
        f"{counted(plan.students, 'student')}: {_saved(3600 * gpu.saved_gpu_hours, 'GPU-')}",
        f"  one {gpu.name} trains on {gpu.images_per_s:,.0f} images/s and reads {gpu.read_mb_per_s:,.0f} MB/s",
        f"  GPU figures: {gpu.peak_tflops:g} TFLOP/s dense bfloat16 (data sheet); "
        f"{'measured' if gpu.teacher_rate_measured else 'assumed'} utilization "
        f"{gpu.forward_utilization:.0%} for the teacher, assumed {gpu.student_utilization:.0%} for the student and "
        f"{gpu.heads_utilization:.0%} for the heads; FLOPs as in docs/COSTS.md",
    ]


def _time_lines(plan: Forecast) -> list[str]:
    here, student = plan.here, f"stage 2: one student, {counted(plan.epochs, 'epoch')}, without evaluation"
    return [
        f"  time on this machine, in one process; {here.device}",
        _row("stage 1, with checks and evaluation", duration_text(here.stage_1_s)),
        _row(student, duration_text(here.student_s)),
        _row("the same with the teacher running in every step", duration_text(here.online_s)),
        f"  the cache breaks even with student {here.breaks_even_after_students}; {counted(plan.students, 'student')}: "
        f"{_saved(here.saved_s)}",
        f"  measured per image: {_short(here.draw_s_per_view)} to sample a view on one core, "
        f"{_short(here.teacher_s_per_view)} for teacher, codec and store, "
        f"{_short(here.step_s_per_image)} for a training step",
    ]


def fits(plans: Sequence[Forecast]) -> bool:
    """Whether the caches fit on the disk, with what is stored already."""
    missing: float = sum(max(0.0, plan.total_bytes - plan.stored_bytes) for plan in plans)
    return missing <= min(plan.free_bytes for plan in plans)


def describe(plan: Forecast) -> str:
    """The forecast as text."""
    one, memory, total = plan.bytes_per_view, plan.step_memory, plan.images * plan.views
    share = f", {plan.stored_features:.3g} of the views" if plan.stored_features < 1 else ""
    names = {
        "features": f"features ({plan.codec}{share})",
        "target": f"target (logits {plan.logit_bytes:,}, label, view record)",
        "pixels": "pixels",
        "index": "index, headers",
    }
    short = "" if fits([plan]) else "  DOES NOT FIT"
    lines = [
        f"{counted(plan.images, 'image')} of {plan.data} x {counted(plan.views, 'view')}, "
        f"teacher {plan.teacher}, student {plan.student}",
        "",
        *_time_lines(plan),
        *(_gpu_lines(plan, plan.gpu) if plan.gpu else []),
        "",
        _row("bytes per view", "total"),
        *(_row(name, size_text(one[part] * total), f"{one[part]:,.0f}") for part, name in names.items()),
        _row("tail and codec, stored once", size_text(plan.once_bytes)),
        _row("total", size_text(plan.total_bytes), f"{one['total']:,.0f}"),
        *([_row("stored already", size_text(plan.stored_bytes))] if plan.stored_bytes else []),
        f"  {'free at ' + plan.cache:<58}{size_text(plan.free_bytes):>14}{short}",
        "",
        f"  memory for a step with one micro-batch in float32: {size_text(memory['total'])} "
        f"(weights {size_text(memory['weights'])}, gradients {size_text(memory['gradients'])}, "
        f"optimizer {size_text(memory['optimizer'])}, activations {size_text(memory['activations'])})",
        "",
        f"  {'alternative':<30}{'total':>14}{'stage 1 here':>20}",
        *(
            f"  {row['change']:<30}{size_text(row['bytes']):>14}{duration_text(row['stage_1_s']):>20}"
            for row in plan.alternatives
        ),
        *(["", *plan.notes] if plan.notes else []),
    ]
    if not plan.teacher_available:
        lines += [
            "",
            "NO TEACHER WEIGHTS: sizes and times are measured with random weights; sizes are exact for fixed-size "
            "codecs in tars"
            + (
                ""
                if plan.teacher.startswith(DEMO_TEACHER)
                else f" (`scalekd fetch --teacher {plan.teacher}` downloads the weights)"
            ),
        ]
    return "\n".join(lines)


class Together(NamedTuple):
    """The forecast for stage 1 with multiple teachers in a single pass over the images."""

    plans: list[Forecast]
    total_bytes: float
    free_bytes: int
    stage_1_s: float
    """The sum over the teachers. The job takes less, because it samples each view once for all teachers."""
    teacher_gpu_hours: float | None
    cores_per_gpu: float | None
    """CPU cores that stage 1 needs per GPU, where each view is sampled once for all teachers."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return self._asdict() | {"plans": [plan.to_json() for plan in self.plans]}


def together(plans: list[Forecast]) -> Together:
    """Sum the forecasts for all teachers in a job."""
    gpus = [plan.gpu for plan in plans if plan.gpu]
    return Together(
        plans,
        sum(plan.total_bytes for plan in plans),
        min(plan.free_bytes for plan in plans),
        sum(plan.here.stage_1_s for plan in plans),
        sum(gpu.teacher_gpu_hours for gpu in gpus) if gpus else None,
        1 / sum(1 / gpu.cores_per_gpu for gpu in gpus) if gpus else None,
    )


def describe_together(total: Together) -> str:
    """The forecasts for multiple teachers and their total, as text."""
    short, first = "" if fits(total.plans) else "  DOES NOT FIT", total.plans[0]
    lines = [
        f"all teachers: {size_text(total.total_bytes)}, {size_text(total.free_bytes)} free{short}",
        f"  stage 1 on this machine, in one process: at most {duration_text(total.stage_1_s)}",
    ]
    if first.gpu and total.teacher_gpu_hours is not None and total.cores_per_gpu is not None:
        drawn_s = first.images * first.views * first.here.draw_s_per_view
        lines.append(
            f"  stage 1 on one {first.gpu.name}: {_gpu_hours(total.teacher_gpu_hours)}; "
            f"{_cores(total.cores_per_gpu, drawn_s)}"
        )
    return "\n\n".join([*(f"{plan.cache}\n{describe(plan)}" for plan in total.plans), "\n".join(lines)])
