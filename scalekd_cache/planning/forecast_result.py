"""A forecast's results, per teacher and in total, as JSON or text.

Invariant: nothing is measured or counted here.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from scalekd_cache.errors import counted
from scalekd_cache.progress import size_text


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast for one teacher. Byte units are decimal (1 GB = 1e9)."""

    cache: str
    data: str
    images: int
    views: int
    teacher: str
    teacher_available: bool
    """Whether the weights are available. If not, sizes are measured on random features with the teacher's shapes."""
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
    gpu: str
    teacher_gpu_hours: float
    """GPU-hours for stage 1, based on the teacher's measured rate if this machine has that GPU, and otherwise on FLOPs,
    the GPU table and the assumed utilization."""
    teacher_rate_measured: bool
    teacher_s_per_view_here: float | None
    """Seconds per view for the teacher, codec and store, measured on this machine (None: no weights)."""
    stage_1_here_s: float | None
    """Stage-1 time in seconds, in one process on this machine, with checks and evaluation (None: no weights)."""
    draw_s_per_view: float
    """Seconds to sample a view, measured on one core of this machine."""
    cores_per_gpu: float
    """CPU cores that stage 1 needs per GPU: the GPU's views/s multiplied by draw_s_per_view."""
    student_gpu_hours: float
    """GPU-hours to train one student from the cache."""
    online_gpu_hours: float
    """GPU-hours to train one student with the teacher running in every step."""
    students: int
    epochs: int
    saved_gpu_hours: float
    """GPU-hours saved over all students: the online cost minus the cached cost, which includes stage 1."""
    breaks_even_after_students: int
    images_per_s: float
    """Training throughput on one GPU."""
    read_mb_per_s: float
    """Read rate for one training GPU."""
    step_memory: dict[str, float]
    """Bytes for a step with one micro-batch on one GPU: weights, gradients, optimizer, activations, total."""
    alternatives: list[dict[str, Any]]
    assumptions: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def _duration(hours: float, kind: str = "") -> str:
    """Format a time in hours, minutes or seconds with three digits. `kind` goes before the unit."""
    if abs(hours) * 3600 < 0.01:
        return f"< 0.01 {kind}seconds"
    units = (("hours", 1), ("minutes", 60), ("seconds", 3600))
    unit, scale = next((pair for pair in units if abs(hours * pair[1]) >= 1), units[-1])
    return f"{float(f'{hours * scale:.3g}'):,.10g} {kind}{unit}"


def _gpu_time(hours: float) -> str:
    return _duration(hours, "GPU-")


def describe(plan: Forecast) -> str:
    """The forecast as text."""
    one, memory, total = plan.bytes_per_view, plan.step_memory, plan.images * plan.views
    logits = f"target (logits {plan.logit_bytes:,}, label, view record)"
    share = f", {plan.stored_features:.3g} of the views" if plan.stored_features < 1 else ""
    names = {
        "features": f"features ({plan.codec}{share})",
        "target": logits,
        "pixels": "pixels",
        "index": "index, headers",
    }
    short = plan.free_bytes < plan.total_bytes
    lines = [
        f"{counted(plan.images, 'image')} of {plan.data} x {counted(plan.views, 'view')}, "
        f"teacher {plan.teacher}, student {plan.student}",
        "",
        f"  {'bytes per view':<48}{'':>10}{'total':>14}",
        *(f"  {name:<48}{one[part]:>10,.0f}{size_text(one[part] * total):>14}" for part, name in names.items()),
        f"  {'tail and codec, stored once':<48}{'':>10}{size_text(plan.once_bytes):>14}",
        f"  {'total':<48}{one['total']:>10,.0f}{size_text(plan.total_bytes):>14}",
        f"  {'free at ' + plan.cache:<58}{size_text(plan.free_bytes):>14}{'  DOES NOT FIT' if short else ''}",
        "",
        f"  stage 1 on one {plan.gpu}: {_gpu_time(plan.teacher_gpu_hours)}, {plan.cores_per_gpu:.0f} CPU cores "
        f"per GPU ({plan.draw_s_per_view * 1e3:.1f} ms per view on a core of this machine)",
        f"  one student from the cache, {counted(plan.epochs, 'epoch')}: {_gpu_time(plan.student_gpu_hours)}; "
        f"with the teacher running in every step: {_gpu_time(plan.online_gpu_hours)}",
        f"  the cache breaks even with student {plan.breaks_even_after_students}; {counted(plan.students, 'student')}: "
        f"{_gpu_time(plan.saved_gpu_hours)} saved",
        f"  one {plan.gpu} trains on {plan.images_per_s:,.0f} images/s and reads {plan.read_mb_per_s:,.0f} MB/s",
        f"  memory for a step with one micro-batch in float32: {size_text(memory['total'])} "
        f"(weights {size_text(memory['weights'])}, gradients {size_text(memory['gradients'])}, "
        f"optimizer {size_text(memory['optimizer'])}, activations {size_text(memory['activations'])})",
        "",
        f"  {'alternative':<30}{'total':>14}{'stage 1':>20}",
        *(
            f"  {row['change']:<30}{size_text(row['bytes']):>14}{_gpu_time(row['gpu_hours']):>20}"
            for row in plan.alternatives
        ),
        "",
        f"  GPU figures: {plan.assumptions['peak_tflops']:g} TFLOP/s dense bfloat16 (data sheet); "
        f"{'measured' if plan.teacher_rate_measured else 'assumed'} utilization "
        f"{plan.assumptions['forward_utilization']:.0%} for the teacher, "
        f"assumed {plan.assumptions['student_utilization']:.0%} for the student and "
        f"{plan.assumptions['heads_utilization']:.0%} for the heads; FLOPs as in docs/COSTS.md",
    ]
    if plan.teacher_s_per_view_here is not None:
        lines.append(
            f"  measured here: {plan.teacher_s_per_view_here * 1e3:.1f} ms per view for teacher, codec and store; "
            f"stage 1 in one process {_duration((plan.stage_1_here_s or 0.0) / 3600)}, with checks and evaluation"
        )
    else:
        lines.append(
            "  NO TEACHER WEIGHTS: sizes are based on random features with the teacher's shapes; they are exact for "
            "fixed-size codecs in tars"
        )
    return "\n".join(lines)


class Together(NamedTuple):
    """The forecast for stage 1 with multiple teachers in a single pass over the images."""

    plans: list[Forecast]
    total_bytes: float
    free_bytes: int
    teacher_gpu_hours: float
    cores_per_gpu: float
    """CPU cores that stage 1 needs per GPU, where each view is sampled once for all teachers."""

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return self._asdict() | {"plans": [plan.to_json() for plan in self.plans]}


def together(plans: list[Forecast]) -> Together:
    """Sum the forecasts for all teachers in a job."""
    return Together(
        plans,
        sum(plan.total_bytes for plan in plans),
        min(plan.free_bytes for plan in plans),
        sum(plan.teacher_gpu_hours for plan in plans),
        1 / sum(1 / plan.cores_per_gpu for plan in plans),
    )


def describe_together(total: Together) -> str:
    """The forecasts for multiple teachers and their total, as text."""
    short = "  DOES NOT FIT" if total.total_bytes > total.free_bytes else ""
    return "\n\n".join(
        [
            *(f"{plan.cache}\n{describe(plan)}" for plan in total.plans),
            f"all teachers: {size_text(total.total_bytes)}, {size_text(total.free_bytes)} free{short}\n"
            f"  stage 1 on one {total.plans[0].gpu}: {_gpu_time(total.teacher_gpu_hours)}, "
            f"{total.cores_per_gpu:.0f} CPU cores per GPU",
        ]
    )
