"""The frozen teacher: a timm transformer that maps uint8 views to features and logits.

In: a `TeacherConfig`, and uint8 images (B, 3, H, W). Out: `TeacherOutput` in float32; `TeacherSpec`; the `Tail`.
Invariant: the teacher is always in eval mode and computes no gradients. Features are taken after the final norm, which
`tail.py` defines for each family. Features, logits and pooled embeddings come from a single forward pass.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.devices import autocast, autocast_dtype
from scalekd_cache.errors import UserError
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.tail import Tail, TailParts, build_tail, family_of, features_of, to_map
from scalekd_cache.models.taps import Taps, pooled_width, run_with_taps, usable_shapes
from scalekd_cache.models.teacher_spec import TeacherSpec, weights_digest
from scalekd_cache.models.timm_models import (
    DEMO_CLASSES,
    DEMO_TEACHER,
    check_name,
    create_timm_model,
    default_image_size,
    is_projection,
    no_weights,
    timm_name,
)
from scalekd_cache.models.weights import load_converted, stored_shapes, weights_file
from scalekd_cache.store.manifest import Manifest


class TeacherOutput(NamedTuple):
    """A batch's features, logits and pooled embeddings."""

    features: Tensor
    """(B, C, H, W) float32, after the final norm."""
    logits: Tensor
    """(B, K) float32; (B, 0) if the teacher has no classifier."""
    pooled: Tensor
    """(B, P) float32: the pooled embedding, where P is `TeacherSpec.pooled`; (B, 0) if P is 0."""


class Teacher(nn.Module):
    """A frozen timm model with its normalization.

    Args:
        model: A timm model from a family in `tail.FAMILIES`.
        spec: The teacher's description.
        precision: float32, bfloat16 (autocast) or auto, which means bfloat16 on a GPU and float32 on a CPU.
    """

    def __init__(self, model: nn.Module, spec: TeacherSpec, precision: str = "auto") -> None:
        super().__init__()
        self.model, self.spec, self.precision = model, spec, precision
        self.parts = family_of(model, spec.name).parts(model)
        self._normalize = Normalize(spec.mean, spec.std)
        self.requires_grad_(False)
        super().train(False)

    @property
    def device(self) -> torch.device:
        """The device that the teacher runs on."""
        return self._normalize.mean.device

    @property
    def autocast_dtype(self) -> torch.dtype:
        """The dtype of the teacher's convolutions and matrix products."""
        return autocast_dtype(self.precision, self.device)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, because targets must not depend on the teacher's drop path."""
        return self

    def normalize(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, 3, H, W) to normalized float32 on the teacher's device."""
        size = self.spec.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            raise UserError(
                "the teacher's input has the wrong dtype or shape",
                got=f"{images.dtype} {tuple(images.shape)}",
                expected=f"torch.uint8 (B, 3, {size}, {size})",
                fix="pass uint8 images of the teacher's image size (views.size)",
            )
        normalized: Tensor = self._normalize(images.to(self.device))
        return normalized

    # Not inference_mode: TinyViT caches tensors from a forward pass, and autograd cannot use inference tensors.
    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Map uint8 images (B, 3, H, W) to float32 features and logits. Large images are processed a few at a time."""
        if len(images) > self.images_per_pass:
            outputs = [self._pass(part) for part in torch.split(images, self.images_per_pass)]
            return TeacherOutput(*(torch.cat(values) for values in zip(*outputs, strict=True)))
        return self._pass(images)

    @property
    def images_per_pass(self) -> int:
        """Maximum number of images in one forward pass. Batches are split only for images larger than 512 px.

        A pass then has at most as many pixels as 64 images at 224 px. At 1,024 px, attention in SAM's ViT-B takes about
        2 GB per image.
        """
        size = self.spec.image_size
        return max(1, 64 * 224**2 // size**2) if size > 512 else sys.maxsize

    def _pass(self, images: Tensor) -> TeacherOutput:
        x = self.normalize(images)
        with autocast(x.device, self.autocast_dtype):
            taps = run_with_taps(self.model, self.parts, x, pooled=self.spec.pooled > 0)
            features = features_of(self.parts, taps.after, self.spec.feature_shape[1:])
        nothing = x.new_zeros(x.shape[0], 0)
        logits = taps.logits if self.spec.has_classifier else nothing
        pooled = nothing if taps.pooled is None else taps.pooled
        return TeacherOutput(features.float().contiguous(), logits.float(), pooled.float())


def demo_teacher_args() -> dict[str, Any]:
    """Arguments that turn `swin_tiny_patch4_window7_224` into demo_swin.

    demo_swin takes 64 px images and returns maps of shape (64, 8, 8) and (128, 4, 4). It has three stages on a 16x16
    grid, so it is cheap enough to train on a CPU.
    """
    return {
        "img_size": 64,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 32,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 4],
    }


def own_image_size(name: str) -> int:
    """A teacher's native image size in pixels."""
    if name == DEMO_TEACHER:
        return int(demo_teacher_args()["img_size"])
    return default_image_size(check_name(name, "teacher"))


def size_args(name: str, image_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The timm model's required and optional arguments for this image size (`create_timm_model`).

    SAM's ViT and NaFlex resize their position embeddings in every forward pass. If they were built for a different
    size, their pretrained weights would not match.
    """
    if name == DEMO_TEACHER:
        return {**demo_teacher_args(), "img_size": image_size}, {}
    if timm.models.is_model_in_modules(name.partition(".")[0], ["vision_transformer_sam", "naflexvit"]):
        return {}, {}
    return {}, {"img_size": image_size} if image_size != own_image_size(name) else {}


def load_teacher(
    config: TeacherConfig,
    *,
    image_size: int,
    num_classes: int,
    device: torch.device,
    model_args: Mapping[str, Any] | None = None,
) -> Teacher:
    """Build the teacher and load its weights.

    Args:
        config: Name, weights, number of classes and precision.
        image_size: View size in pixels.
        num_classes: Number of classes in the dataset, used for random weights unless the configuration sets it. 0
            means that the dataset has no labels; the teacher then also returns its pooled embedding.
        device: The teacher's device.
        model_args: Additional arguments to the timm model.

    Raises:
        UserError: the name is unknown, the family or image size is not supported, or the weights are missing, unsafe or
            incompatible.
    """
    demo = config.name == DEMO_TEACHER
    name = check_name(timm_name(config.name), "teacher.name")
    if config.weights is None and config.pretrained and demo:
        raise UserError(
            f"no weights for the teacher {config.name}, which stage 1 trains",
            expected=f"the file that stage 1 writes: {weights_file(config.weights_dir, config.name)}",
            fix="restore this file, or set --teacher-weights to a copy of it",
        )
    shapes = stored_shapes(config.weights) if config.weights is not None else None
    required, optional = size_args(config.name, image_size)
    classes = teacher_classes(config, name, shapes, num_classes)
    args = {**required, **(model_args or {}), "num_classes": classes}
    fetch = config.weights is None and config.pretrained
    try:
        model, used = create_timm_model(name, json.loads(json.dumps(args)), optional, pretrained=fetch)
    except UserError:
        raise
    except Exception as error:  # hub clients raise many kinds of errors; all mean that the weights are not available
        if not fetch:
            raise
        other = "set --teacher-weights, or set --pretrained false for random weights (for testing only)"
        raise no_weights(f"the teacher {config.name}", config.name, error, other) from error
    if config.weights is not None and shapes is not None:
        load_from_file(model, config.weights, shapes, classes)
    model.requires_grad_(False).eval()
    spec = _describe(model, config.name if demo else name, used, image_size, pools=num_classes == 0)
    return Teacher(model, spec, config.precision).to(device)


def load_from_file(model: nn.Module, path: str, shapes: Mapping[str, tuple[int, ...]], classes: int) -> None:
    """Load a .safetensors file with tensors of these shapes, without the file's classifier if the model has no
    `classes`."""
    known: Any = model.pretrained_cfg
    heads = tuple(f"{head}." for head in _classifiers(known.get("classifier"))) if classes == 0 else ()
    kept = {tensor: shape for tensor, shape in shapes.items() if not tensor.startswith(heads)}
    load_converted(model, path, kept, heads)


def teacher_classes(
    config: TeacherConfig, name: str, shapes: Mapping[str, tuple[int, ...]] | None, data_classes: int
) -> int:
    """Width of the teacher's classifier.

    It is 0 if configured as 0. Otherwise, it is taken from the weights, the options or the dataset, in this order.
    CLIP's projection to its image-text embedding does not count as a classifier unless the options or the dataset have
    the same number of classes. `name` must be timm's current name (`check_name`), because only that name gives the
    number of classes in pretrained weights.
    """
    known = timm.get_pretrained_cfg(name)
    if known is None:  # a model registered by a plugin, whose classifier tensor is unknown
        return data_classes if config.num_classes is None else config.num_classes
    if shapes is not None:
        stored = next(
            (shapes[f"{head}.weight"][0] for head in _classifiers(known.classifier) if shapes.get(f"{head}.weight")), 0
        )
    elif config.pretrained:
        stored = DEMO_CLASSES if config.name == DEMO_TEACHER else known.num_classes
    elif known.num_classes == 0:
        return config.num_classes or 0
    else:
        return data_classes if config.num_classes is None else config.num_classes
    if config.num_classes not in (None, 0, stored):
        source = "the demo teacher" if config.name == DEMO_TEACHER else f"timm's weights for {name}"
        raise UserError(
            "the teacher's weights have a classifier for a different number of classes"
            if stored
            else "the teacher's weights have no classifier",
            got=f"teacher.num_classes={config.num_classes}",
            expected=f"{stored} or 0" if stored else 0,
            where=config.weights or source,
            fix="omit teacher.num_classes, set it to 0 to use features only, or use weights with as many classes",
        )
    if config.num_classes is None and stored and stored != data_classes and is_projection(name, stored):
        return 0
    return int(stored if config.num_classes is None else config.num_classes)


def _classifiers(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of a timm model's classifiers from its `pretrained_cfg`: none, one, or two for distilled models."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _describe(model: nn.Module, name: str, args: dict[str, Any], image_size: int, *, pools: bool) -> TeacherSpec:
    """Run a black image through the model to get its shapes, and build its specification.

    Args:
        model: the model, on the CPU.
        name: the model name.
        args: the model's arguments.
        image_size: image size in pixels.
        pools: whether to check if the pooled embedding differs from the mean of the map.
    """
    family = family_of(model, name)
    parts = family.parts(model)
    taps = probe_taps(model, parts, name, image_size)
    tail_shape, feature_shape = usable_shapes(taps, parts, name, image_size)
    timm_model: Any = model
    has_classifier = bool(timm_model.num_classes > 0) and not isinstance(timm_model.get_classifier(), nn.Identity)
    return TeacherSpec(
        name=name,
        timm_version=timm.__version__,
        model_args=json.loads(json.dumps(args)),
        family=family.name,
        num_classes=taps.logits.shape[1] if has_classifier else 0,
        image_size=image_size,
        mean=tuple(timm_model.pretrained_cfg["mean"]),
        std=tuple(timm_model.pretrained_cfg["std"]),
        feature_shape=feature_shape,
        tail_shape=tail_shape,
        weights_sha256=weights_digest(model.state_dict()),
        has_classifier=has_classifier,
        pooled=pooled_width(model, parts, feature_shape[1:], image_size) if pools else 0,
    )


@torch.no_grad()
def probe_taps(model: nn.Module, parts: TailParts, name: str, image_size: int) -> Taps:
    """Outputs of the tapped layers for a black image.

    Raises:
        UserError: the model does not accept images of this size.
    """
    try:
        return run_with_taps(model, parts, torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        own = own_image_size(name)
        raise UserError(
            f"the teacher failed on images of {image_size} x {image_size} pixels: {error}",
            got=name,
            fix="choose a different teacher"
            if own == image_size
            else f"choose a different image size (this teacher's is {own} px) or a different teacher",
        ) from error


class MetaTeacher(NamedTuple):
    """A teacher on the meta device."""

    model: nn.Module
    tail: Tail
    params: int
    tail_params: int


def meta_teacher(name: str, image_size: int, num_classes: int) -> MetaTeacher:
    """Build a teacher with this many classes. Call this under `torch.device("meta")`."""
    required, optional = size_args(name, image_size)
    model, _ = create_timm_model(
        check_name(timm_name(name), "teacher"), {"num_classes": num_classes, **required}, optional
    )
    model.requires_grad_(False).eval()
    ends = family_of(model, name).parts(model)
    taps = probe_taps(model, ends, name, image_size)
    tail = build_tail(model, name, *usable_shapes(taps, ends, name, image_size))
    return MetaTeacher(model, tail, num_params(model), num_params(tail))


def num_params(module: nn.Module) -> int:
    """Number of parameters, including frozen ones."""
    return sum(value.numel() for value in module.parameters())


def split_tail(teacher: Teacher) -> Tail:
    """A copy of the teacher's tail, on the teacher's device."""
    return build_tail(teacher.model, teacher.spec.name, teacher.spec.tail_shape, teacher.spec.feature_shape)


@torch.no_grad()
def check_tail(teacher: Teacher, images: Tensor) -> float:
    """Largest float32 difference between the tail's and the teacher's features, relative to the largest feature.

    Args:
        teacher: The teacher to check.
        images: (B, 3, H, W) uint8.
    """
    spec, parts = teacher.spec, teacher.parts
    x = teacher.normalize(images)
    with autocast(x.device, torch.float32):
        taps = run_with_taps(teacher.model, parts, x)
        expected = features_of(parts, taps.after, spec.feature_shape[1:])
        prefix = taps.before[:, : parts.prefix] if parts.prefix else None
        before = to_map(taps.before, parts.layout, parts.prefix, spec.tail_shape[1:], parts.unrolled[0])
        got = split_tail(teacher)(before, prefix)
    return float((got - expected).abs().max() / expected.abs().max())


def cache_teacher_config(
    options: Mapping[str, Any], weights: str | None, precision: str | None = None
) -> TeacherConfig:
    """The teacher's options recorded in a cache, with the current path of the weights file.

    Args:
        options: `teacher["config"]` from a manifest or plan.
        weights: the weights file (None: the file used in stage 1).
        precision: precision of the forward pass (None: as recorded, where `auto` depends on the device).

    Raises:
        UserError: the weights file does not exist.
    """
    if weights is not None and not Path(weights).is_file():
        exists = Path(weights).exists()
        what = "--teacher-weights is not a file" if exists else "the teacher's weights file does not exist"
        raise UserError(what, got=weights, fix="correct --teacher-weights")
    fields = dict(from_plain(options))
    return TeacherConfig(
        **{**fields, "weights": weights or fields["weights"], "precision": precision or fields["precision"]}
    )


def load_cache_teacher(manifest: Manifest, config: TeacherConfig, device: torch.device) -> Teacher:
    """Load a cache's complete teacher. `config` comes from `cache_teacher_config`.

    It is built with the same arguments as in stage 1: the view size, the dataset's number of classes and, for random
    weights, the view seed.

    Raises:
        UserError: the teacher cannot be loaded, or its weights differ from those used for the cache.
    """
    size, classes = manifest.facts.view_recipe["size"], len(manifest.facts.class_names)
    torch.manual_seed(manifest.facts.view_recipe["seed"])
    teacher = load_teacher(config, image_size=size, num_classes=classes, device=device)
    expected = manifest.facts.teacher["spec"]["weights_sha256"]
    if teacher.spec.weights_sha256 != expected:
        raise UserError(
            "these are not the weights of the cache's teacher",
            got=f"teacher.weights_sha256 {teacher.spec.weights_sha256}",
            expected=expected,
            where=config.weights,
            fix="set --teacher-weights to a .safetensors file with the weights that the cache was made with",
        )
    return teacher
