"""The student: any timm model, with its last two feature maps recorded in one ordinary forward pass.

In: a `StudentConfig`; normalized float images (B, 3, H, W). Out: `StudentOutput` (S3, S4, logits).
Invariant: the logits are exactly `model(images)`, and `Student.model` is an unmodified timm module, whose state dict is
exported.

Choice of S3 and S4. In hierarchical models (ResNet, MobileNet, ConvNeXt, Swin), they are the outputs of the last two
stages in timm's `feature_info`. In models with a single resolution (ViT), they are the patch tokens after the first
three quarters of the blocks and after the last block. In Mixers, they are the outputs of the third-to-last and the last
block. For ViT, Swin and ConvNeXt, S4 is taken after the model's final norm. If timm normalizes after pooling, that norm
is applied at every position instead. All other maps are taken without a norm. These choices follow upstream where its
code is explicit (docs/METHOD.md).

Hooks record the maps during a forward pass of the whole model, because ZeRO 3 gathers parameters only when a module is
called.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from timm.models.convnext import ConvNeXt
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from scalekd_cache.codec import Shape
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.activation_checkpointing import check_tapped, last_called, recompute_blocks
from scalekd_cache.models.mixer_b14 import mixer_b14_224
from scalekd_cache.models.timm_models import check_name, create_timm_model, default_image_size

POOLED_VIT: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
"""No class token. Every token is normalized before mean pooling, whereas timm pools first by default."""
MOBILENET_FORM: dict[str, Any] = {"act_layer": "relu"}
"""ReLU instead of timm's default, ReLU6."""
CONVNEXT_FORM: dict[str, Any] = {"head_norm_first": True}
"""Every position is normalized before mean pooling, whereas timm pools first by default."""
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv1": ("mobilenetv1_100", MOBILENET_FORM),
    "resnet50": ("resnet50", {}),
    "resnet50d": ("resnet50d", {}),  # the model in upstream's advanced "ResNet-50" recipe
    "convnext_tiny": ("convnext_tiny", CONVNEXT_FORM),
    "mixer_s16": ("mixer_s16_224", {}),
    "mixer_b16": ("mixer_b16_224", {}),
    "mixer_b14": (mixer_b14_224.__name__, {}),  # registered with timm by `mixer_b14`
    "vit_small": ("vit_small_patch16_224", POOLED_VIT),
    "vit_base": ("vit_base_patch16_224", POOLED_VIT),
    "vit_base_14": ("vit_base_patch16_224", {**POOLED_VIT, "patch_size": 14}),  # for a teacher with 14-pixel patches
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
}
"""The paper's students by short name: the timm name, and arguments that make timm's model compute the same function as
upstream's. Models given by a timm name keep timm's defaults."""


FINAL_NORMS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (SwinTransformer, ("norm",)),
    (SwinTransformerV2, ("norm",)),
    (ConvNeXt, ("norm_pre", "head.norm")),
)
"""Final norms in hierarchical models. The first one that is not an identity is applied to S4."""
TOKEN_NORMS = ("norm", "fc_norm")
"""Final norms in models with a single resolution, used in the same way."""


class StudentOutput(NamedTuple):
    """The output of a student's forward pass."""

    s3: Tensor
    """(B, C3, H3, W3)"""
    s4: Tensor
    """(B, C4, H4, W4)"""
    logits: Tensor
    """(B, K); for a student without a classifier, the pooled embedding (B, E)."""


class TapPlan(NamedTuple):
    """The modules of a timm model that produce S3 and S4."""

    modules: tuple[str, str]
    channels: tuple[int, int]
    indices: tuple[int, int]
    """Indices of these modules in `feature_info`."""
    reduction: int | None
    """Pixels per token in models with a single resolution; None in hierarchical models."""
    norm: str | None
    """Module applied to S4, or None."""


class _Tap:
    """A forward hook that records a module's output only while `armed`, so that a plain `model(x)` keeps no tensors."""

    def __init__(self) -> None:
        self.armed = False
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.armed:
            self.value = output


def plan_taps(model: Any, name: str) -> TapPlan:
    """Choose S3 and S4 from timm's `feature_info`. Raises `UserError` if it lists fewer than two maps."""
    info = [dict(entry) for entry in getattr(model, "feature_info", None) or []]
    if len(info) < 2 or not all("module" in entry for entry in info):
        raise _unfit(name, "timm does not list its feature maps")
    known = {module for module, _ in model.named_modules()}
    absent = [entry["module"] for entry in info if entry["module"] not in known]
    if absent:  # Twins and MViT list modules that do not exist
        raise _unfit(name, f"timm lists a feature map from {absent[-1]}, but the model has no such module")
    last = info[-1]
    shallower = [entry for entry in info if entry["reduction"] != last["reduction"]]
    reduction = None
    norms: tuple[str, ...] = next((names for kind, names in FINAL_NORMS if isinstance(model, kind)), ())
    position = len(shallower) - 1
    if not shallower and isinstance(model, MlpMixer):
        position, reduction = max(len(info) - 3, 0), int(last["reduction"])
    elif not shallower:
        position = min(math.ceil(len(info) * 3 / 4), len(info) - 1) - 1
        norms = TOKEN_NORMS
        reduction = int(last["reduction"]) if isinstance(last["reduction"], int) else int(last["reduction"][0])
    norm = next((name for name in norms if _is_norm(model, name)), None)
    s3, indices = info[position], (position, len(info) - 1)
    return TapPlan((s3["module"], last["module"]), (s3["num_chs"], last["num_chs"]), indices, reduction, norm)


def _is_norm(model: nn.Module, name: str) -> bool:
    modules = dict(model.named_modules())
    return not isinstance(modules.get(name), nn.Identity | None)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a student has BatchNorm layers, synchronized or not. The projectors have the same kind of norm."""
    return any(isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) for module in model.modules())


class Student(nn.Module):
    """A timm model with hooks on its last two feature maps.

    Args:
        model: The timm model.
        name: Its timm name, kept as `model_name`.
        args: The arguments that built the model, kept as `model_args`.
        image_size: Image size in pixels, kept as `image_size`.
        grad_checkpointing: Recompute blocks in the backward pass (`activation_checkpointing.py`).
    """

    def __init__(
        self, model: nn.Module, name: str, args: dict[str, Any], image_size: int, grad_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.model, self.model_name, self.model_args, self.image_size = model, name, args, image_size
        self.plan = plan_taps(model, name)
        self.layer_norm = not has_batch_norm(model)
        self.prefix = 0  # tokens before the patch tokens, set by `_probe`
        self._first_pass = recompute_blocks(model, name) if grad_checkpointing else None
        self._taps = (_Tap(), _Tap())
        for module, tap in zip(self.plan.modules, self._taps, strict=True):
            tapped = model.get_submodule(module)
            (last_called(tapped) if grad_checkpointing else tapped).register_forward_hook(tap)
        self.tap_shapes = self._probe(image_size)

    def replace_model(self, model: nn.Module) -> None:
        """Use a converted copy of the model. A conversion drops the hooks of the modules that it replaces."""
        self.model = model
        for module, tap in zip(self.plan.modules, self._taps, strict=True):
            tapped = model.get_submodule(module)
            if tap not in tapped._forward_hooks.values():
                tapped.register_forward_hook(tap)

    def forward(self, images: Tensor) -> StudentOutput:
        """Map normalized images (B, 3, H, W) to S3, S4 (both NCHW) and logits, in the dtype of the forward pass."""
        with self._first_pass() if self._first_pass is not None else nullcontext():
            s3, s4, logits = self._tapped(images)
        if self._first_pass is not None:
            check_tapped(s3, self.model_name)
        return StudentOutput(self._to_map(s3), self._to_map(self._normed(s4)), logits)

    @property
    def num_classes(self) -> int:
        """Width of the classifier; 0 without one."""
        return int(self.model_args["num_classes"])

    @property
    def pooled_width(self) -> int:
        """Width of the embedding returned by `pooled`."""
        return self._width if self.num_classes == 0 else self.tap_shapes[1][0]

    def pooled(self, output: StudentOutput) -> Tensor:
        """The pooled embedding (B, E) to train: the model's own, or the mean of S4 if there is a classifier. In the
        latter case, the layers between S4 and the logits learn from the logits."""
        return output.logits if self.num_classes == 0 else output.s4.mean((2, 3))

    def embed(self, images: Tensor) -> Tensor:
        """Map normalized images (B, 3, H, W) to pooled embeddings (B, E): the classifier's input, as in timm."""
        if self.num_classes == 0:
            return self.forward(images).logits
        model: Any = self.model
        pooled: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
        return pooled

    def _tapped(self, images: Tensor) -> StudentOutput:
        """Run the model once and return the maps in the model's own layout."""
        for tap in self._taps:
            tap.armed = True
        logits = self.model(images)
        s3, s4 = (tap.value for tap in self._taps)
        for tap in self._taps:
            tap.armed, tap.value = False, None
        for module, value in zip(self.plan.modules, (s3, s4), strict=True):
            if value is None:
                raise _unfit(
                    self.model_name, f"its forward pass does not call {module}, which should return a feature map"
                )
            if not isinstance(value, Tensor):
                raise _unfit(self.model_name, f"{module} returns a {type(value).__name__} instead of one feature map")
        assert s3 is not None
        assert s4 is not None
        return StudentOutput(s3, s4, logits)

    def _normed(self, s4: Tensor) -> Tensor:
        if self.plan.norm is None or (self.plan.reduction is not None and s4.ndim != 3):
            return s4
        normed: Tensor = self.model.get_submodule(self.plan.norm)(s4)
        return normed

    def _to_map(self, x: Tensor) -> Tensor:
        """Convert NHWC, or tokens with a prefix, to NCHW."""
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2) if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else x
        x = x[:, self.prefix :].transpose(1, 2)
        side = math.isqrt(x.shape[2])
        return x.reshape(x.shape[0], x.shape[1], side, side)

    @torch.no_grad()
    def _probe(self, image_size: int) -> tuple[Shape, Shape]:
        """Get the shapes from a noise image, and compare the recorded maps with those from `forward_intermediates`."""
        mode = self.model.training
        self.model.eval()
        x = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0), device="cpu")
        x = x.to(next(self.model.parameters()).device)  # the meta device gives only shapes
        try:
            raw = self._tapped(x)
            if self.plan.reduction is not None and raw.s3.ndim == 3:  # CaiT and XCiT add their class token later
                self.prefix = raw.s3.shape[1] - (image_size // self.plan.reduction) ** 2
            maps = [self._to_map(raw.s3), self._to_map(raw.s4)]
            method: Any = getattr(self.model, "forward_intermediates", None)
            known = method(x, indices=list(self.plan.indices), intermediates_only=True) if method else maps
        except (AssertionError, RuntimeError) as error:
            raise _unfit(
                self.model_name,
                f"it failed on images of {image_size} x {image_size} pixels: {error}",
                fix="choose a different student or image size",
            ) from error
        finally:
            self.model.train(mode)
        for got, expected, channels in zip(maps, known, self.plan.channels, strict=True):
            same = got.shape == expected.shape and (got.is_meta or torch.allclose(got, expected, rtol=1e-3, atol=1e-4))
            if not same or got.shape[1] != channels:
                raise _unfit(self.model_name, "its stages do not return plain feature maps")
        self._width = raw.logits.shape[1]
        shapes = [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]
        return shapes[0], shapes[1]


def _unfit(name: str, reason: str, fix: str = "choose a different student") -> UserError:
    return UserError(
        f"this model cannot be used as a student: {reason}",
        got=name,
        expected="a timm model with two feature maps, such as resnet50, mobilenetv1_100, convnext_tiny, swin_tiny, "
        "vit_small, mixer_s16",
        fix=fix,
    )


def check_student_name(name: str) -> tuple[str, dict[str, Any]]:
    """A student's timm name, and the arguments implied by its short name.

    Args:
        name: a short name or timm name.

    Raises:
        UserError: the name is unknown; the message suggests the closest names.
    """
    name, known = SHORT_NAMES.get(name, (name, {}))
    return check_name(name, "student.name"), known


def build_student(
    config: StudentConfig, *, num_classes: int, image_size: int, args: Mapping[str, Any] | None = None
) -> Student:
    """Build a student with random weights.

    Args:
        config: Name, image size, drop path rate and activation checkpointing.
        num_classes: Width of the student's classifier.
        image_size: View size in pixels, which is also the student's image size unless `config` sets a different one.
            Models built for a fixed image size receive it as an argument.
        args: Additional arguments to the timm model, which override those implied by the short name.

    Raises:
        UserError: the name is unknown, the model does not have two usable maps at this size, or it does not support
            activation checkpointing.
    """
    name, known = check_student_name(config.name)
    image_size = config.image_size or image_size
    optional: dict[str, Any] = {"drop_path_rate": config.drop_path}
    if image_size != default_image_size(name):
        optional["img_size"] = image_size
    model, used = create_timm_model(name, {**known, **(args or {}), "num_classes": num_classes}, optional)
    return Student(model, name, used, image_size, config.grad_checkpointing)
