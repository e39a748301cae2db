"""What planning finds out, and how it is told to people.

In: figures of `planning.py`. Out: a `Forecast`, JSON values, a text. Invariant: nothing is computed here but sums.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from scalekd_cache.planning.gpus import FORWARD_UTILISATION, TRAINING_UTILISATION


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What was found out; bytes are decimal (1 GB = 1e9)."""

    cache: str
    data: str
    images: int
    views: int
    teacher: str
    teacher_at_hand: bool
    """False: sizes come from made-up features of the teacher's shape."""
    student: str
    codec: str
    bytes_per_view: dict[str, float]
    """features, target (label, view record, digest, logits), pixels, index, total: as in a manifest."""
    logit_bytes: int
    """Of target: a record of the logit codec."""
    once_bytes: int
    """Tail and codec state."""
    total_bytes: float
    free_bytes: int
    gpu: str
    teacher_gpu_hours: float
    """Stage 1, from FLOPs, the table of GPUs and the assumed utilisation."""
    teacher_s_per_view_here: float | None
    """Measured on this machine: teacher, codec and store (None: the teacher is not at hand)."""
    draw_s_per_view: float
    """Measured on one core of this machine."""
    cores_per_gpu: float
    """That stage 1 wants: views that the GPU takes a second x draw_s_per_view."""
    student_gpu_hours: float
    """One student from the cache."""
    online_gpu_hours: float
    """One student with the teacher beside it."""
    students: int
    epochs: int
    saved_gpu_hours: float
    """All students: online less cached, stage 1 included."""
    pays_after_students: int
    images_per_s: float
    """Of one GPU that trains."""
    read_mb_per_s: float
    """That one such GPU reads."""
    step_memory: dict[str, float]
    """Bytes of a step of one micro-batch on one GPU: weights, gradients, optimizer, activations, total."""
    alternatives: list[dict[str, Any]]
    assumptions: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def _size(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number / 1e3:.1f} KB"


def describe(plan: Forecast) -> str:
    """The forecast for people."""
    one, memory, total = plan.bytes_per_view, plan.step_memory, plan.images * plan.views
    logits = f"target (logits {plan.logit_bytes:,}, label, view record)"
    names = {"features": f"features ({plan.codec})", "target": logits, "pixels": "pixels", "index": "index, headers"}
    short = plan.free_bytes < plan.total_bytes
    lines = [
        f"{plan.images:,} images of {plan.data} x {plan.views} views, teacher {plan.teacher}, student {plan.student}",
        "",
        f"  {'bytes a view':<48}{'':>10}{'in all':>14}",
        *(f"  {name:<48}{one[part]:>10,.0f}{_size(one[part] * total):>14}" for part, name in names.items()),
        f"  {'tail and codec, once':<48}{'':>10}{_size(plan.once_bytes):>14}",
        f"  {'total':<48}{one['total']:>10,.0f}{_size(plan.total_bytes):>14}",
        f"  {'free at ' + plan.cache:<58}{_size(plan.free_bytes):>14}{'  IT DOES NOT FIT' if short else ''}",
        "",
        f"  stage 1 on one {plan.gpu}: {plan.teacher_gpu_hours:.3g} GPU-hours, {plan.cores_per_gpu:.0f} CPU cores "
        f"to keep a GPU busy ({plan.draw_s_per_view * 1e3:.1f} ms a view on a core here)",
        f"  one student from the cache, {plan.epochs} epochs: {plan.student_gpu_hours:.3g} GPU-hours; "
        f"with the teacher beside it: {plan.online_gpu_hours:.3g}",
        f"  the cache has paid for itself with student {plan.pays_after_students}; {plan.students} students save "
        f"{plan.saved_gpu_hours:.3g} GPU-hours",
        f"  a training {plan.gpu} takes {plan.images_per_s:,.0f} images/s and reads {plan.read_mb_per_s:,.0f} MB/s",
        f"  memory of a step of one micro-batch in float32: {_size(memory['total'])} "
        f"(weights {_size(memory['weights'])}, gradients {_size(memory['gradients'])}, "
        f"optimizer {_size(memory['optimizer'])}, activations {_size(memory['activations'])})",
        "",
        f"  {'instead':<30}{'in all':>14}{'GPU-hours':>12}",
        *(f"  {row['change']:<30}{_size(row['bytes']):>14}{row['gpu_hours']:>12.3g}" for row in plan.alternatives),
        "",
        f"  GPU figures: {plan.assumptions['peak_tflops']:g} TFLOP/s dense bfloat16 (data sheet), of which "
        f"the teacher is assumed to reach {FORWARD_UTILISATION:.0%} and training {TRAINING_UTILISATION:.0%}; "
        "FLOPs as in docs/COSTS.md",
    ]
    if plan.teacher_s_per_view_here is not None:
        lines.append(
            f"  measured here: {plan.teacher_s_per_view_here * 1e3:.1f} ms a view for teacher, codec and store"
        )
    else:
        lines.append(
            "  THE TEACHER'S WEIGHTS ARE NOT AT HAND: sizes come from made-up features of its shape; they hold for "
            "codecs of fixed size in tars"
        )
    return "\n".join(lines)
