"""Checks before hours are spent.

In: what a job is about to use. Out: nothing, or the error that the job would have met much later.
Invariant: nothing is written here.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.codec.base import feature_norms
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import batches_that_fit, micro_batches_of_rank
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import Teacher, TeacherOutput, check_tail, split_tail
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.views.pixels import decode_pixels
from scalekd_cache.views.view import apply_view, sample_view

TAIL_TOLERANCE = 1e-5
"""Largest relative difference between the teacher's features and its tail run on what comes before."""
PROBE_IMAGES = 16
"""Images that are drawn to try the teacher."""


def probe_views(source: Source | PixelCache, views: ViewConfig) -> torch.Tensor:
    """First views of a few images: pixels (B, 3, S, S) uint8.

    Raises:
        UserError: when none of the images tried can be decoded.
    """
    if isinstance(source, PixelCache):
        records = source.cache.read(range(min(PROBE_IMAGES, len(source.cache))), 0)
        decoded = np.stack([decode_pixels(record.pixels, views.size) for record in records])
        return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
    pixels, reason = [], ""
    for index in np.linspace(0, len(source.samples) - 1, min(PROBE_IMAGES, len(source.samples))).astype(int).tolist():
        key = source.samples[index].key
        try:
            image = decode_image(source.read(index), key)
        except UnreadableImage as error:
            reason = str(error)
            continue
        view = apply_view(sample_view(views, key, 0, image.shape[1], image.shape[0]), image, views)
        pixels.append(torch.from_numpy(view).permute(2, 0, 1))
    if not pixels:
        raise UserError("no image of the data set could be decoded", got=reason, where=source.name, fix="check DATA=")
    return torch.stack(pixels)


def check_teacher(teacher: Teacher, class_names: Sequence[str], pixels: torch.Tensor) -> None:
    """The teacher fits the data, gives finite outputs, and its tail is the end of it."""
    spec = teacher.spec
    if spec.has_classifier and spec.num_classes != len(class_names):
        raise UserError(
            "the teacher's classes are not the data set's",
            got=f"{spec.name} has {spec.num_classes} classes",
            expected=f"{len(class_names)} classes ({', '.join(class_names[:3])}, ...)",
            fix="fine-tune the teacher on this data set and give TEACHER_WEIGHTS=file.safetensors",
        )
    if spec.feature_shape[1:] == (1, 1):
        raise UserError(
            "the teacher's last map has one position, so nothing is left after its mean is removed",
            got=f"features {spec.feature_shape} at {spec.image_size} px",
            fix="use larger views (views.size) or a teacher with a finer last stage",
        )
    error = check_tail(teacher, pixels[:4])
    if not error <= TAIL_TOLERANCE:
        raise UserError(
            "the teacher's last stage does not reproduce its features",
            got=f"relative difference {error:.2g}",
            expected=f"at most {TAIL_TOLERANCE:g}",
            where=f"{spec.name}, family {spec.family}",
            fix="report this teacher; its family needs a tail of its own",
        )


def check_disk_space(path: Path, views: int, needed: float) -> None:
    """The `needed` bytes of `views` views fit on the disk."""
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            "the cache does not fit on the disk",
            got=f"{free / 1e9:.2f} GB free",
            expected=f"{needed / 1e9:.2f} GB: {views:,} views of about {needed / views:,.0f} bytes",
            where=folder,
            fix="fewer VIEWS, another CODEC, or CACHE= on a larger disk",
        )


def check_batches(train: TrainConfig, num_samples: int, world_size: int) -> str:
    """The batches of a training recipe can be shared by as many processes as make the cache; what fits is returned.

    A data set of fewer images than the global batch is no error here: stage 2 is told its options after stage 1.
    """
    if num_samples < train.global_batch_size:
        return f'with SET="{batches_that_fit(num_samples, train.micro_batch_size)}" for {num_samples} images'
    micro_batches_of_rank(train.global_batch_size, train.micro_batch_size, 0, world_size)
    return "the training recipe"


def check_student(config: DistillConfig, teacher: Teacher, num_classes: int, output: TeacherOutput) -> None:
    """One real training step of the student on two images: shapes, heads and losses fit together.

    Args:
        config: the training options of the recipe.
        teacher: the teacher.
        num_classes: classes of the data set.
        output: what the teacher says of some images.
    """
    student = build_student(config.student, num_classes=num_classes, image_size=teacher.spec.image_size)
    tail = split_tail(teacher).cpu()
    heads = ScaleKDHeads(
        config.scalekd,
        tap_shapes=student.tap_shapes,
        tail_in_shape=tail.in_shape,
        tail_out_shape=tail.out_shape,
        layer_norm=student.layer_norm,
    )
    size = teacher.spec.image_size
    s3, s4, logits = student(torch.randn(2, 3, size, size))
    features = output.features[:2].cpu()
    targets = Targets(features, feature_norms(features), output.logits[:2].cpu())
    labels = torch.zeros(2, dtype=torch.int64)
    terms = distillation_losses(config.scalekd, config.train, logits, labels, heads(s3, s4, tail), targets)
    terms.total.backward()  # type: ignore[no-untyped-call]
