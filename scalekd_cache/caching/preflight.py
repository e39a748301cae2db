"""Checks that run before a long job starts.

In: a job's dataset, teacher, student and folder. Out: nothing, or an error that would otherwise occur hours later.
Invariant: no files are left on disk.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import spread_views
from scalekd_cache.codec import check_codec_name
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.config.stage1 import CacheTeacherConfig, TeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.data.base import Source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.batch_size import BatchLimits, micro_batches_of_rank
from scalekd_cache.models.student import build_student, check_student_name
from scalekd_cache.models.teacher import (
    MetaTeacher,
    Teacher,
    TeacherOutput,
    check_tail,
    meta_teacher,
    split_tail,
    teacher_classes,
)
from scalekd_cache.models.timm_models import check_name, timm_name
from scalekd_cache.models.weights import find_weights
from scalekd_cache.progress import size_text
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.scalekd.losses import Targets, check_loss, distillation_losses
from scalekd_cache.store.durable_files import check_writable, existing_folder, free_bytes
from scalekd_cache.store.plan import NAME as PLAN

TAIL_TOLERANCE = 1e-5
"""Maximum relative difference between the teacher's features and its tail's output for the stage-3 feature map."""
PROBE_IMAGES = 16
"""Number of images for the teacher's trial run."""
PROBE_TEACHER_S = 10.0
"""Time limit for the trial run in seconds. It applies only if fewer images give the same size (`size_probe.py`)."""


def probe_views(source: Source | PixelCache, views: ViewConfig) -> torch.Tensor:
    """View 0 of a few images, as uint8 pixels (B, 3, S, S).

    Raises:
        UserError: none of these images can be decoded.
    """
    return torch.cat([item.pixels for item in spread_views(source, views, (0,), PROBE_IMAGES)])


def check_teacher(teacher: Teacher, class_names: Sequence[str], pixels: torch.Tensor) -> None:
    """Check that the teacher has as many classes as a labeled dataset, and that its tail reproduces its features."""
    spec = teacher.spec
    check_classes(spec.name, spec.num_classes, class_names)
    error = check_tail(teacher, pixels[: min(4, teacher.images_per_pass)])
    if not error <= TAIL_TOLERANCE:
        raise UserError(
            "the teacher's last stage, run separately, does not reproduce the teacher's features",
            got=f"relative difference {error:.2g}",
            expected=f"at most {TAIL_TOLERANCE:g}",
            where=f"{spec.name}, family {spec.family}",
            fix="this architecture is not supported yet: use a different teacher, or open an issue",
        )


def check_disk_space(path: Path, views: int, needed: float) -> None:
    """Check that `views` views with a total of `needed` bytes fit on the disk."""
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            "the cache does not fit on the disk",
            got=f"{size_text(free)} free",
            expected=f"{size_text(needed)} for {counted(views, 'view')} of about {needed / views:,.0f} bytes each",
            where=existing_folder(path),
            fix="use fewer --views, a different --codec, or a --cache on a larger disk",
        )


def check_names(config: CacheTeacherConfig, student: DistillConfig | None) -> None:
    """Raise `UserError` for an unknown codec, teacher or student name."""
    check_codec_name(config.cache.codec)
    check_name(timm_name(config.teacher.name), "teacher.name")
    if student is not None:
        check_student_name(student.student.name)


def check_before_weights(
    config: CacheTeacherConfig, source: Source | PixelCache, student: DistillConfig | None, process: Process
) -> None:
    """Run the checks that are possible before training a demo teacher or downloading weights.

    They cover the codec, teacher and student names; the student at this image size; its batch sizes; a new cache's
    folder; and, if the teacher's weights are missing, its classes and maps and the student's heads.
    """
    check_names(config, student)
    options = find_weights(config.teacher)
    classes, teacher = len(source.class_names), None
    if options.weights is not None and not Path(options.weights).is_file():
        raise UserError(f"--teacher-weights {options.weights} is not a file")
    root = Path(config.cache.path)
    new = not (root / PLAN).exists()  # options for an existing cache are compared with its plan, before the weights
    if options.weights is None and options.pretrained and (new or options.num_classes is None):
        teacher = teacher_without_weights(options, source.class_names, config.views.size)
    if student is not None:
        with torch.device("meta"):
            learner = build_student(student.student, num_classes=classes, image_size=config.views.size)
            if teacher is not None:
                make_heads(
                    student.on_data(classes=classes), learner, teacher.tail, 0 if classes else teacher.tail.out_shape[0]
                )
        samples = source.cache.manifest.num_samples if isinstance(source, PixelCache) else len(source.samples)
        check_batches(student, samples, process.world_size)
    if new and process.rank == 0:  # a finished cache may be read-only
        check_writable(root, "--cache")


def teacher_without_weights(options: TeacherConfig, class_names: Sequence[str], image_size: int) -> MetaTeacher | None:
    """Check a teacher whose weights are missing as `load_teacher` and `check_teacher` would with them.

    Returns:
        The teacher on the meta device; None if it cannot run there, so that it is checked only with its weights.
    """
    classes = teacher_classes(options, check_name(timm_name(options.name), "teacher.name"), None, len(class_names))
    check_classes(options.name, classes, class_names)
    try:
        with torch.device("meta"):
            return meta_teacher(options.name, image_size, classes)
    except Exception as error:  # a registered family may use operations that the meta device does not have
        if isinstance(error, UserError) and "meta" not in str(error.__cause__):
            raise
        return None


def check_classes(teacher: str, classes: int, class_names: Sequence[str]) -> None:
    """Raise `UserError` if a teacher's classifier (0: none) and a labeled dataset have different numbers of classes."""
    if class_names and classes not in (0, len(class_names)):
        raise UserError(
            "the teacher and the dataset have different numbers of classes",
            got=f"{teacher} has {counted(classes, 'class')}",
            expected=f"{counted(len(class_names), 'class')} "
            f"({', '.join([*class_names[:3], *(['...'] if class_names[3:] else [])])})",
            fix="set --teacher.num_classes 0 to use only its features, or set --teacher-weights to weights fine-tuned "
            "on this data",
        )


def check_batches(student: DistillConfig, num_samples: int, world_size: int, every: int = 1, ranges: int = 1) -> str:
    """Check that a recipe's batches can be split across this world size. One in `every` samples of each range has
    features.

    A global batch larger than the dataset is not an error, because stage 2 can use a smaller one.

    Returns:
        A note about the smaller batch needed for a small dataset; empty if the recipe's batches fit.
    """
    train = student.train
    if num_samples < train.global_batch_size:
        share, micro = student.scalekd.share_of(), train.micro_batch_size
        limits = BatchLimits.of_dataset(num_samples, micro, world_size, share=share, every=every, ranges=ranges)
        options = limits.options()
        advice = f"train with {options}" if options else "no batch can be used"
        return f"; {advice}, because the dataset has only {counted(num_samples, 'image')}"
    micro_batches_of_rank(train.global_batch_size, train.micro_batch_size, 0, world_size)
    return ""


def check_student(config: DistillConfig, teacher: Teacher, num_classes: int, output: TeacherOutput) -> None:
    """Run one training step on two images to check that the student, heads and losses are compatible, and that there is
    a loss.

    Args:
        config: the training options from the recipe.
        teacher: the teacher.
        num_classes: number of classes in the dataset; 0 without labels.
        output: the teacher's output for at least two images.
    """
    config = config.on_data(classes=num_classes)
    check_loss(config.scalekd, config.train, labeled=num_classes > 0, logits=teacher.spec.has_classifier)
    classes = num_classes or teacher.spec.num_classes
    student = build_student(config.student, num_classes=classes, image_size=teacher.spec.image_size)
    tail = split_tail(teacher).cpu()
    heads = make_heads(config, student, tail, 0 if num_classes else teacher.spec.pooled or tail.out_shape[0])
    learned = student(torch.randn(2, 3, student.image_size, student.image_size))
    features = output.features[:2].cpu()
    pooled = output.pooled[:2].cpu() if teacher.spec.pooled else None
    targets = Targets(features, feature_norms(features), output.logits[:2].cpu(), pooled=pooled)
    labels = torch.zeros(2, dtype=torch.int64)
    maps = heads(learned.s3, learned.s4, tail, student.pooled(learned))
    terms = distillation_losses(config.scalekd, config.train, learned.logits, labels, maps, targets)
    terms.total.backward()  # type: ignore[no-untyped-call]
