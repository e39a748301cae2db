"""Counts FLOPs and parameters for a teacher and a student on the meta device.

In: timm model names, and a `ScaleKDConfig`. Out: one `Part` each for the student, every head, the tail and the teacher.
Invariant: no tensor memory is allocated, and nothing is computed. PyTorch's counter counts a multiply-add in matrix
products, convolutions and attention as two FLOPs. Figures are per image in a batch of `BATCH` images (heads: in a
micro-batch), because a learned query is projected once per batch. With a feature share, the heads process only that
fraction of the batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalekd_cache.codec import Shape
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.errors import counted
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.models.teacher import MetaTeacher, meta_teacher, num_params, own_image_size
from scalekd_cache.progress import size_text
from scalekd_cache.scalekd.heads import ScaleKDHeads, make_heads

BATCH = 32
"""Batch size used for counting."""
FEW = 2
"""The number of samples in a second count of the heads, which shows what does not depend on the number of samples."""
CLASSES = 1000
SWIN_L = "swin_large_patch4_window7_224"
BEIT_L = "eva_large_patch14_196"
"""The paper's BEiT-L/14, with 304M parameters, pretrained by EVA and run at 224 px."""
PAPER_STUDENTS = (
    "mobilenetv1",
    "resnet50",
    "convnext_tiny",
    "mixer_s16",
    "mixer_b16",
    "vit_small",
    "swin_tiny",
    "vit_base",
)
PAPER_PAIRS = (
    *((SWIN_L, student) for student in PAPER_STUDENTS),
    (SWIN_L, "resnet50d"),
    ("swin_small_patch4_window7_224", "resnet50"),
    ("swin_base_patch4_window7_224", "resnet50"),
    (BEIT_L, "resnet50"),
    (BEIT_L, "mixer_b16"),
    (BEIT_L, "vit_base_14"),
)
"""The teacher-student pairs reported and released with the paper. Mixer-B/16 replaces the paper's Mixer-B/14, which
timm does not have."""
PAPER_IMAGE_SIZE = 224


class Part(NamedTuple):
    """Cost of a part of the training step."""

    name: str
    params: int
    """Number of parameters, including frozen ones."""
    forward: float
    """FLOPs per image."""
    backward: float
    """FLOPs per image; 0 without a backward pass."""

    @property
    def total(self) -> float:
        """FLOPs per image for forward and backward passes."""
        return self.forward + self.backward


class PairCosts(NamedTuple):
    """Cost of a teacher-student pair."""

    teacher_name: str
    student_name: str
    image_size: int
    """Image size in pixels."""
    student: Part
    heads: list[Part]
    """The projectors for both taps, and the passes through the frozen tail."""
    teacher: Part

    @property
    def heads_total(self) -> float:
        """Forward and backward FLOPs per image for all heads."""
        return sum(part.total for part in self.heads)

    @property
    def ceiling(self) -> float:
        """Upper bound on the speedup from caching: (student + heads + teacher forward) / (student + heads)."""
        offline = self.student.total + self.heads_total
        return (offline + self.teacher.forward) / offline


def pair_costs(
    teacher: str,
    student: str,
    config: ScaleKDConfig | None = None,
    image_size: int | None = None,
    num_classes: int = CLASSES,
    student_size: int | None = None,
    *,
    labeled: bool = True,
    batch: int = BATCH,
) -> PairCosts:
    """Count the costs of a teacher-student pair.

    Args:
        teacher: the teacher's name.
        student: the student's name.
        config: the method's hyperparameters (None: the published ones).
        image_size: view size in pixels (None: the teacher's native size).
        num_classes: number of classes for teacher and student.
        student_size: the student's image size in pixels (None: the view size).
        labeled: whether the data has labels. Without labels, the heads also map the student's pooled embedding to
            the teacher's.
        batch: micro-batch size, for the work that the heads do once per batch.

    Raises:
        UserError: stage 1 or 2 does not accept the name, family or image size.
    """
    config = config or ScaleKDConfig()
    image_size = image_size or own_image_size(teacher)
    with torch.device("meta"):
        parts, teacher_cost = _teacher_cost(teacher, image_size, num_classes)
        learner = build_student(
            StudentConfig(name=student, image_size=student_size), num_classes=num_classes, image_size=image_size
        )
        pooled = 0 if labeled else _pooled_width(parts, image_size)
        width = learner.pooled_width if pooled else 0
        heads = make_heads(DistillConfig(scalekd=config), learner, parts.tail, pooled)
        return PairCosts(
            teacher,
            student,
            image_size,
            _student_cost(learner),
            _head_costs(heads, learner.tap_shapes, parts, _Share(config.share_of() or 1, batch), width),
            teacher_cost,
        )


@functools.lru_cache(maxsize=2)
def _teacher_cost(name: str, image_size: int, num_classes: int) -> tuple[MetaTeacher, Part]:
    """A teacher's cost, which is counted once even if multiple pairs share the teacher."""
    parts, images = meta_teacher(name, image_size, num_classes), torch.empty(BATCH, 3, image_size, image_size)
    return parts, Part("teacher", parts.params, _flops(lambda: _no_grad(parts.model, images)), 0.0)


def _pooled_width(teacher: MetaTeacher, image_size: int) -> int:
    """Width of the pooled target: timm's pooled embedding if there is one, otherwise the mean of the feature map."""
    model: Any = teacher.model
    if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
        images = torch.empty(1, 3, image_size, image_size)
        shape = model.forward_head(model.forward_features(images), pre_logits=True).shape
        if len(shape) == 2:
            return int(shape[1])
    return teacher.tail.out_shape[0]


def _flops(run: Callable[[], object]) -> float:
    """FLOPs per image for a call on `BATCH` images."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _conv_backward}
    ) as counter:
        run()
    return float(counter.get_total_flops()) / BATCH


def _conv_backward(grad: Sequence[int], image: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """FLOPs for a convolution's gradients, each of which costs as much as the forward pass.

    PyTorch's own count ignores groups in the weight gradient, which overestimates MobileNet by a factor of ten.
    """
    mask = args[-1]  # whether the input, weight and bias gradients are needed
    return 2 * grad[0] * math.prod(grad[2:]) * math.prod(weight) * sum(map(int, mask[:2]))


@torch.no_grad()
def _no_grad(model: nn.Module, images: Tensor) -> Tensor:
    output: Tensor = model(images)
    return output


def _student_cost(student: Student) -> Part:
    """Cost of the student, without a gradient for its images."""
    images = torch.empty(BATCH, 3, student.image_size, student.image_size)
    outputs: list[Tensor] = []
    forward = _flops(lambda: outputs.extend(student(images)))
    # All outputs are used, because the losses are summed.
    backward = _flops(lambda: torch.autograd.backward([output.sum() for output in outputs]))
    return Part("student", num_params(student), forward, backward)


def _map_cost(
    name: str, params: int, run: Callable[..., Tensor | tuple[Tensor, ...]], *shapes: tuple[int, ...], of: "_Share"
) -> Part:
    """Cost of a module that maps between feature maps, with gradients for its inputs and trainable parameters."""

    def flops(samples: int) -> tuple[float, float]:
        outputs: list[Tensor] = []
        inputs = [torch.empty(samples, *shape, requires_grad=True) for shape in shapes]

        def forward() -> None:
            output = run(*inputs)
            outputs.extend(output if isinstance(output, tuple) else (output,))

        return _flops(forward), _flops(lambda: torch.autograd.backward([output.sum() for output in outputs]))

    counts = flops(BATCH)
    return Part(name, params, *(counts if of == (1.0, BATCH) else map(of.per_image, flops(FEW), counts)))


class _Share(NamedTuple):
    """The samples that a head processes, as a share of a micro-batch."""

    share: float
    batch: int

    def per_image(self, few: float, many: float) -> float:
        """FLOPs per image of the micro-batch, from the counts for `FEW` and for `BATCH` samples, divided by `BATCH`.

        The work that does not depend on the number of samples (a learned query) is divided among the images.
        """
        sample = (many - few) * BATCH / (BATCH - FEW)
        return self.share * sample + (many - sample) * BATCH / self.batch


def _head_costs(
    heads: ScaleKDHeads, taps: tuple[Shape, Shape], teacher: MetaTeacher, share: _Share, width: int
) -> list[Part]:
    """Cost of the heads. `width` is the width of the student's pooled embedding, which is projected for the whole
    batch; 0 with labels."""
    rows = []
    modules: dict[str, Any] = dict(heads.s4.items())
    pooled: Any = heads.pooled
    if width and "linear" in modules:
        modules["linear"], pooled = modules["linear"].map, modules["linear"].pooled
    if pooled is not None:
        rows.append(_map_cost("pooled projector", num_params(pooled), pooled, (width,), of=share._replace(share=1.0)))
    for view, module in heads.s3.items():
        rows.append(_map_cost(f"S3 projector, {view}", num_params(module), module, taps[0], of=share))
    for view, module in modules.items():
        query = [teacher.tail.out_shape] if heads.hand_over else []
        rows.append(_map_cost(f"S4 projector, {view}", num_params(module), module, taps[1], *query, of=share))
    if heads.tpp and len(heads.s3):
        one = _map_cost("", teacher.tail_params, teacher.tail, teacher.tail.in_shape, of=share)
        passes = len(heads.s3)
        rows.append(
            Part(f"frozen tail, {counted(passes, 'pass')}", one.params, passes * one.forward, passes * one.backward)
        )
    return rows


def report(costs: PairCosts) -> str:
    """A pair as a Markdown table with one row per part."""
    lines = [
        f"{costs.teacher_name} -> {costs.student_name}, {costs.image_size} px",
        "",
        "| part | parameters, M | forward, GFLOP | backward, GFLOP | total, GFLOP |",
        "|---|---:|---:|---:|---:|",
    ]
    for part in (costs.student, *costs.heads, costs.teacher):
        figures = (part.params / 1e6, part.forward / 1e9, part.backward / 1e9, part.total / 1e9)
        lines.append(f"| {part.name} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    lines += [
        "",
        f"all heads: {costs.heads_total / 1e9:.1f} GFLOP, {_heads_params(costs) / 1e6:.0f}M trainable "
        f"parameters; maximum speedup {costs.ceiling:.2f}x",
        "",
        _update_line(_heads_params(costs)),
    ]
    return "\n".join(lines)


def _update_line(params: int) -> str:
    """One line about the cost of an optimizer step for the heads, which a feature share does not reduce."""
    sgd, adamw = (size_text(4 * params * OPTIMIZER_TRAFFIC[name]) for name in ("SGD", "AdamW"))
    return (
        f"Regardless of the feature share, each optimizer step all-reduces {size_text(4 * params)} of float32 "
        f"head gradients, and reads and writes {sgd} with SGD or {adamw} with AdamW."
    )


def summary_row(costs: PairCosts) -> str:
    """A pair as a row in the table with the header `SUMMARY_HEAD`."""
    figures = (
        costs.teacher.params / 1e6,
        costs.teacher.forward / 1e9,
        costs.student.params / 1e6,
        costs.student.total / 1e9,
        _heads_params(costs) / 1e6,
        costs.heads_total / 1e9,
    )
    numbers = " | ".join(f"{figure:.1f}" for figure in figures)
    return f"| {costs.teacher_name} | {costs.student_name} | {numbers} | {costs.ceiling:.2f}x |"


def sum_line(several: Sequence[PairCosts]) -> str:
    """One line about a student with heads for multiple teachers."""
    heads = sum(costs.heads_total for costs in several)
    offline = several[0].student.total + heads
    live = offline + sum(costs.teacher.forward for costs in several)
    return (
        f"all {len(several)} teachers: heads {heads / 1e9:.1f} GFLOP, {sum(map(_heads_params, several)) / 1e6:.0f}M "
        f"trainable parameters; maximum speedup {live / offline:.2f}x"
    )


SUMMARY_HEAD = (
    "| teacher | student | teacher parameters, M | teacher forward, GFLOP | student parameters, M "
    "| student forward + backward, GFLOP | head parameters, M | heads forward + backward, GFLOP | maximum speedup |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|"
)


def _heads_params(costs: PairCosts) -> int:
    """Number of trainable parameters in the heads, excluding the frozen tail."""
    return sum(part.params for part in costs.heads if not part.name.startswith("frozen"))


OPTIMIZER_TRAFFIC = {"SGD": 5, "AdamW": 7}
"""Number of parameter-sized tensors that a step reads and writes: weight, gradient and optimizer state."""
