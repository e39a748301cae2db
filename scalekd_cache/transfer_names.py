"""A student's state dict under the names of other codebases, for those who take it on to detection or segmentation.

In: the state dict of a timm ResNet, Swin or plain ViT. Out: the same tensors as torchvision's or mmpretrain's module of
that architecture names them. Invariant: pure renaming and reordering; a tensor that no rule knows is an error, so that
what comes out loads strictly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from scalekd_cache.errors import UserError
from scalekd_cache.upstream_names import Rule, rename


class Codebase(NamedTuple):
    """How one codebase names one architecture."""

    rules: tuple[Rule, ...]
    relayout: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """From timm's layout, by timm's name."""
    computed: Callable[[nn.Module], dict[str, Tensor]] = lambda model: {}
    """Buffers that the codebase keeps and timm computes."""


def timm_to_unfold(name: str, value: Tensor) -> Tensor:
    """Reorder the inputs of Swin's patch merging, (.., 4 C), from timm's (column, row, channel) to the order of
    mmpretrain's `Unfold` (channel, row, column): the inverse of `upstream_names.unfold_to_timm`."""
    if ".downsample." not in name:
        return value
    split = value.reshape(*value.shape[:-1], 2, 2, -1)
    return split.transpose(-1, -3).reshape(value.shape)


def swin_indices(name: str, flat: bool) -> Callable[[nn.Module], dict[str, Tensor]]:
    """The positions of each block's relative biases; `name` is formatted with stage and block."""

    def compute(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        swin: Any = model
        for stage, layer in enumerate(swin.layers):
            for block, module in enumerate(layer.blocks):
                index = module.attn.relative_position_index
                found[name.format(stage=stage, block=block, twice=2 * stage + 1)] = index.flatten() if flat else index
        return found

    return compute


RESNET_BODY = r"(conv1|bn1|layer\d+)\."
TORCHVISION: dict[type[nn.Module], Codebase] = {
    ResNet: Codebase(((RESNET_BODY, r"\1."), (r"fc\.", "fc."))),
    SwinTransformer: Codebase(
        (
            (r"patch_embed\.proj\.", "features.0.0."),
            (r"patch_embed\.norm\.", "features.0.2."),
            *(
                (rf"layers\.{stage}\.blocks\.(\d+)\.{ours}\.", rf"features.{2 * stage + 1}.\1.{theirs}.")
                for stage in range(4)
                for ours, theirs in (("(norm1|norm2|attn)", r"\2"), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"))
            ),
            # torchvision merges patches between stages, timm at the beginning of the next one.
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
MMPRETRAIN: dict[type[nn.Module], Codebase] = {
    ResNet: Codebase(((RESNET_BODY, r"backbone.\1."), (r"fc\.", "head.fc."))),
    SwinTransformer: Codebase(
        (
            (r"patch_embed\.proj\.", "backbone.patch_embed.projection."),
            (r"patch_embed\.norm\.", "backbone.patch_embed.norm."),
            (r"layers\.(\d+)\.blocks\.(\d+)\.(norm[12])\.", r"backbone.stages.\1.blocks.\2.\3."),
            (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"backbone.stages.\1.blocks.\2.attn.w_msa."),
            (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0."),
            (r"layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"backbone.stages.\1.blocks.\2.ffn.layers.1."),
            *((rf"layers\.{i + 1}\.downsample\.", f"backbone.stages.{i}.downsample.") for i in range(3)),
            (r"norm\.", "backbone.norm3."),
            (r"head\.fc\.", "head.fc."),
        ),
        timm_to_unfold,
        swin_indices("backbone.stages.{stage}.blocks.{block}.attn.w_msa.relative_position_index", flat=False),
    ),
    VisionTransformer: Codebase(
        (
            (r"(cls_token|pos_embed)", r"backbone.\1"),
            (r"patch_embed\.proj\.", "backbone.patch_embed.projection."),
            (r"blocks\.(\d+)\.norm([12])\.", r"backbone.layers.\1.ln\2."),
            (r"blocks\.(\d+)\.attn\.(qkv|proj)\.", r"backbone.layers.\1.attn.\2."),
            (r"blocks\.(\d+)\.mlp\.fc1\.", r"backbone.layers.\1.ffn.layers.0.0."),
            (r"blocks\.(\d+)\.mlp\.fc2\.", r"backbone.layers.\1.ffn.layers.1."),
            (r"norm\.", "backbone.ln1."),
            (r"head\.", "head.layers.head."),
        )
    ),
}
CODEBASES = {"torchvision": TORCHVISION, "mmpretrain": MMPRETRAIN}


def transfer_state(model: nn.Module, codebase: str) -> dict[str, Tensor]:
    """The state dict of a timm model under the names of a codebase.

    Raises:
        UserError: an architecture, or a form of it, that the codebase has no module for.
    """
    table = CODEBASES[codebase]
    naming = table.get(type(model))
    if naming is None:
        raise _unfit(type(model).__name__, codebase)
    state, unknown = dict[str, Tensor](), list[str]()
    for name, value in model.state_dict().items():
        theirs = rename(name, naming.rules)
        if theirs is None or theirs in state:
            unknown.append(name)
        else:
            state[theirs] = naming.relayout(name, value).contiguous()
    if codebase == "mmpretrain" and isinstance(model, VisionTransformer) and "backbone.cls_token" not in state:
        # Without a class token its maps go through global average pooling and the plain head.
        state = {name.replace("head.layers.head.", "head.fc."): value for name, value in state.items()}
    if unknown or (codebase == "torchvision" and isinstance(model, VisionTransformer) and "class_token" not in state):
        raise _unfit(f"{type(model).__name__} with {', '.join(unknown[:4]) or 'no class token'}", codebase)
    return state | {name: value.contiguous() for name, value in naming.computed(model).items()}


def torchvision_twin(model: nn.Module, image_size: int) -> nn.Module:
    """torchvision's module of the same shape, with random weights.

    Raises:
        UserError: there is none.
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


def _unfit(got: str, codebase: str) -> UserError:
    return UserError(
        f"this student has no counterpart in {codebase}",
        got=got,
        expected="a ResNet, a Swin Transformer or a plain ViT (for torchvision with a class token)",
        fix="take FORMAT=timm, safetensors, onnx or torch-export",
    )
