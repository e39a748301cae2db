"""Converts a student's state dict to torchvision's or mmpretrain's names, e.g., for detection or segmentation.

In: a timm model and its image size. Out: the same tensors under torchvision's or mmpretrain's names.
Invariant: tensors are only renamed and reordered. A tensor without a rule, or a variant that the codebase does not
have, is an error. The result therefore loads strictly and gives the same logits.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scalekd_cache.convert.names_upstream import (
    CONVNEXT,
    MIXER,
    MOBILENET,
    RESNET_BODY,
    RESNET_DEEP_STEM,
    RESNET_POOLED,
    RESNET_STEM,
    SWIN,
    VIT,
    Pair,
    Rule,
    export_rules,
    rename,
)
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import MOBILENET_FORM, POOLED_VIT


class Codebase(NamedTuple):
    """How a codebase names the tensors of an architecture."""

    rules: tuple[Rule, ...]
    relayout: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """Converts a tensor from timm's layout, given timm's name."""
    computed: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}
    """Returns buffers that the codebase stores but timm computes."""


def timm_to_unfold(name: str, value: Tensor) -> Tensor:
    """Reorder the inputs to Swin's patch merging, (.., 4 C), from timm's order (column, row, channel) to the order of
    mmpretrain's `Unfold` (channel, row, column), as the inverse of `names_upstream.unfold_to_timm`."""
    if ".downsample." not in name:
        return value
    split = value.reshape(*value.shape[:-1], 2, 2, -1)
    return split.transpose(-1, -3).reshape(value.shape)


def swin_indices(name: str, flat: bool) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Relative position indices for each block. `name` is a template with the stage and block numbers."""

    def compute(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        swin: Any = model
        for stage, layer in enumerate(swin.layers):
            for block, module in enumerate(layer.blocks):
                index = module.attn.relative_position_index
                found[name.format(stage=stage, block=block, twice=2 * stage + 1)] = index.flatten() if flat else index
        return found

    return compute


TORCHVISION: dict[type[nn.Module], Codebase] = {
    ResNet: Codebase(((r"(conv1|bn1|layer\d+)\.", r"\1."), (r"fc\.", "fc."))),
    SwinTransformer: Codebase(
        (
            (r"patch_embed\.proj\.", "features.0.0."),
            (r"patch_embed\.norm\.", "features.0.2."),
            *(
                (rf"layers\.{stage}\.blocks\.(\d+)\.{ours}\.", rf"features.{2 * stage + 1}.\1.{theirs}.")
                for stage in range(4)
                for ours, theirs in (("(norm1|norm2|attn)", r"\2"), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"))
            ),
            # torchvision merges patches between stages; timm does so at the beginning of the next stage.
            *((rf"layers\.{stage}\.downsample\.", f"features.{2 * stage}.") for stage in (1, 2, 3)),
            (r"norm\.", "norm."),
            (r"head\.fc\.", "head."),
        ),
        computed=swin_indices("features.{twice}.{block}.attn.relative_position_index", flat=True),
    ),
    VisionTransformer: Codebase(
        (
            (r"cls_token", "class_token"),
            (r"pos_embed", "encoder.pos_embedding"),
            (r"patch_embed\.proj\.", "conv_proj."),
            (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.encoder_layer_\1.ln_\2."),
            (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.encoder_layer_\1.self_attention.in_proj_"),
            (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.encoder_layer_\1.self_attention.out_proj."),
            (r"blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layers.encoder_layer_\1.mlp.0."),
            (r"blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layers.encoder_layer_\1.mlp.3."),
            (r"norm\.", "encoder.ln."),
            (r"head\.", "heads.head."),
        )
    ),
}


def linear_pointwise(name: str, value: Tensor) -> Tensor:
    """Convert ConvNeXt's 1x1 convolutions to the linear layers that mmpretrain uses by default."""
    return value.flatten(1) if ".mlp.fc" in name and name.endswith("weight") else value


def _plain_resnet(net: Any) -> Any:
    first, deep = net.layer1[0], isinstance(net.conv1, nn.Sequential)
    bottleneck = isinstance(first, Bottleneck)
    groups = first.conv2.groups
    stem = {"stem_type": "deep", "stem_width": net.conv1[0].out_channels} if deep else {}
    return ResNet(
        Bottleneck if bottleneck else BasicBlock,
        [len(getattr(net, f"layer{number}")) for number in range(1, 5)],
        num_classes=net.num_classes,
        cardinality=groups,
        base_width=first.conv1.out_channels // groups if bottleneck else 64,
        avg_down=_pools_down(net),
        block_args={"attn_layer": "se"} if bottleneck and first.se is not None else None,
        **stem,
    )


def _pools_down(net: Any) -> bool:
    """Whether strided shortcuts consist of average pooling and a 1x1 convolution."""
    return len(net.layer2[0].downsample or ()) == 3


def _plain_swin(net: Any) -> Any:
    blocks = [layer.blocks[0] for layer in net.layers]
    windows, maps = [tuple(block.window_size) for block in blocks], [tuple(block.input_resolution) for block in blocks]
    whole = all(side % window[0] == 0 for grid, window in zip(maps, windows, strict=True) for side in grid)
    if len(set(windows)) > 1 or not whole:  # timm shrinks windows to fit small maps; mmpretrain pads and masks the maps
        raise RuntimeError(
            "mmpretrain needs one window size that divides all map sizes; "
            f"this model has windows {windows} and maps {maps}"
        )
    return SwinTransformer(
        img_size=net.patch_embed.img_size,
        patch_size=net.patch_embed.patch_size,
        num_classes=net.num_classes,
        embed_dim=net.embed_dim,
        depths=tuple(len(layer.blocks) for layer in net.layers),
        num_heads=tuple(layer.blocks[0].attn.num_heads for layer in net.layers),
        window_size=tuple(net.layers[0].blocks[0].window_size),
    )


def _plain_vit(net: Any) -> Any:
    block = net.blocks[0]
    return VisionTransformer(
        img_size=net.patch_embed.img_size,
        patch_size=net.patch_embed.patch_size,
        num_classes=net.num_classes,
        embed_dim=net.embed_dim,
        depth=len(net.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / net.embed_dim,
        **({} if net.cls_token is not None else POOLED_VIT),
    )


def _plain_mixer(net: Any) -> Any:
    block, width = net.blocks[0], net.norm.normalized_shape[0]
    tokens = block.mlp_tokens.fc1.in_features
    ratios = (block.mlp_tokens.fc1.out_features / width, block.mlp_channels.fc1.out_features / width)
    side = net.stem.proj.kernel_size[0]
    return MlpMixer(
        num_classes=net.num_classes,
        img_size=side * math.isqrt(tokens),
        patch_size=side,
        num_blocks=len(net.blocks),
        embed_dim=width,
        mlp_ratio=ratios,
    )


def _plain_convnext(net: Any) -> Any:
    return ConvNeXt(
        num_classes=net.num_classes,
        depths=tuple(len(stage.blocks) for stage in net.stages),
        dims=tuple(stage.blocks[0].conv_dw.out_channels for stage in net.stages),
        conv_mlp=isinstance(net.stages[0].blocks[0].mlp.fc1, nn.Conv2d),
        head_norm_first=not isinstance(net.norm_pre, nn.Identity),
    )


def _plain_mobilenet(net: Any) -> Any:
    return timm.create_model("mobilenetv1_100", num_classes=net.num_classes, **MOBILENET_FORM)


class Twin(NamedTuple):
    """An architecture available in mmpretrain."""

    pairs: Callable[[Any], tuple[Pair, ...]]
    plain: Callable[[Any], Any]
    """Builds timm's module with the same size, in mmpretrain's variant."""
    relayout: Callable[[str, Tensor], Tensor] = lambda name, value: value
    computed: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}


def _resnet_pairs(net: Any) -> tuple[Pair, ...]:
    stem = RESNET_DEEP_STEM if isinstance(net.conv1, nn.Sequential) else RESNET_STEM
    return stem + (RESNET_POOLED if _pools_down(net) else ()) + RESNET_BODY


MMPRETRAIN: dict[type[nn.Module], Twin] = {
    ResNet: Twin(_resnet_pairs, _plain_resnet),
    EfficientNet: Twin(lambda net: MOBILENET, _plain_mobilenet),
    ConvNeXt: Twin(lambda net: CONVNEXT, _plain_convnext, linear_pointwise),
    MlpMixer: Twin(lambda net: MIXER, _plain_mixer),
    VisionTransformer: Twin(lambda net: VIT, _plain_vit),
    SwinTransformer: Twin(
        lambda net: SWIN,
        _plain_swin,
        timm_to_unfold,
        swin_indices("backbone.stages.{stage}.blocks.{block}.attn.w_msa.relative_position_index", flat=False),
    ),
}
CODEBASES = ("torchvision", "mmpretrain")


def transfer_state(model: nn.Module, codebase: str, image_size: int) -> dict[str, Tensor]:
    """A timm model's state dict under a codebase's names.

    Raises:
        UserError: the codebase does not have this architecture or variant.
    """
    if codebase == "mmpretrain":
        twin = MMPRETRAIN.get(type(model))
        if twin is None:
            raise _unfit(type(model).__name__, codebase)
        _check_form(model, twin, image_size)
        naming = Codebase(export_rules(twin.pairs(model)), twin.relayout, twin.computed)
    elif type(model) in TORCHVISION:
        naming = TORCHVISION[type(model)]
    else:
        raise _unfit(type(model).__name__, codebase)
    state, unknown = dict[str, Tensor](), list[str]()
    for name, value in model.state_dict().items():
        theirs = rename(name, naming.rules)
        if theirs is None or theirs in state:
            unknown.append(name)
        else:
            state[theirs] = naming.relayout(name, value).contiguous()
    if codebase == "mmpretrain" and isinstance(model, VisionTransformer) and "backbone.cls_token" not in state:
        # Without a class token, the maps go through global average pooling and the plain head.
        state = {name.replace("head.layers.head.", "head.fc."): value for name, value in state.items()}
    if unknown or (codebase == "torchvision" and isinstance(model, VisionTransformer) and "class_token" not in state):
        raise _unfit(f"{type(model).__name__} with {', '.join(unknown[:4]) or 'no class token'}", codebase)
    return state | {name: value.contiguous() for name, value in naming.computed(model).items()}


@torch.no_grad()
def _check_form(model: nn.Module, twin: Twin, image_size: int) -> None:
    """Raise `UserError` unless the architecture's plain variant loads all tensors and gives the same logits.

    Comparing names is not enough: an anti-aliased ResNet has the same tensors as a plain one but different outputs.
    """
    kind = type(model).__name__
    try:
        plain = twin.plain(model).eval()
        plain.load_state_dict(model.state_dict())
    except (RuntimeError, AttributeError, TypeError, AssertionError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise _unfit(
            f"a different variant of {kind}: {lines[1] if len(lines) > 1 else lines[0]}", "mmpretrain"
        ) from error
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    for strength in (1, 50):  # ReLU6 differs from ReLU only for large activations
        expected, got = model(strength * images), plain(strength * images)
        if not float((got - expected).abs().max()) <= 1e-3 * float(expected.abs().max()):
            raise _unfit(f"{kind} with different operations (pooling, activation, norms)", "mmpretrain")


def torchvision_twin(model: nn.Module, image_size: int) -> nn.Module:
    """Build the corresponding torchvision module with random weights.

    Raises:
        UserError: torchvision has no such module.
    """
    import torchvision.models

    models: Any = torchvision.models
    net: Any = model
    classes = int(net.num_classes)
    if isinstance(model, ResNet):
        block = {"BasicBlock": models.resnet.BasicBlock, "Bottleneck": models.resnet.Bottleneck}
        layers = [len(getattr(net, f"layer{number}")) for number in range(1, 5)]
        kind = type(net.layer1[0]).__name__
        twin: nn.Module = models.resnet.ResNet(block[kind], layers, num_classes=classes)
    elif isinstance(model, SwinTransformer):
        twin = models.SwinTransformer(
            list(net.patch_embed.patch_size),
            net.embed_dim,
            [len(layer.blocks) for layer in net.layers],
            [layer.blocks[0].attn.num_heads for layer in net.layers],
            list(net.layers[0].blocks[0].window_size),
            num_classes=classes,
        )
    elif isinstance(model, VisionTransformer):
        side = net.patch_embed.patch_size[0]
        hidden = net.blocks[0].mlp.fc1.out_features
        twin = models.VisionTransformer(
            image_size,
            side,
            len(net.blocks),
            net.blocks[0].attn.num_heads,
            net.embed_dim,
            hidden,
            num_classes=classes,
        )
    else:
        raise _unfit(type(model).__name__, "torchvision")
    return twin


EXPECTED = {
    "torchvision": "ResNet, Swin with one window size, or plain ViT with a class token",
    "mmpretrain": "ResNet, ResNetV1c, ResNetV1d, SEResNet or ResNeXt; ConvNeXt; MLP-Mixer; Swin with one window size; "
    "plain ViT; MobileNet-V1 with ReLU (ScaleKD's own module)",
}


def _unfit(got: str, codebase: str) -> UserError:
    return UserError(
        f"this student has no counterpart in {codebase}",
        got=got,
        expected=EXPECTED[codebase],
        fix="use --format timm, safetensors, onnx or torch-export",
    )
