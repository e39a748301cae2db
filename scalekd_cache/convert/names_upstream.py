"""Maps parameter names in upstream's distiller checkpoints (mmpretrain) to timm and `ScaleKDHeads`.

In: a state dict with upstream's names (`student.*` and `distill_losses.*`, without those prefixes). Out: `Mapped`: the
tensors with our names and layout, the unused tensors, and the unknown names.
Invariant: tensors are only renamed and reordered; values do not change. Unknown names are reported, never silently
dropped.

The students are the mmpretrain modules in upstream's repository. docs/METHOD.md shows the tables, and
`names_torchvision_mmpretrain.py` uses them in the opposite direction.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from scalekd_cache.models.student import CONVNEXT_FORM, MOBILENET_FORM, POOLED_VIT

Rule = tuple[str, str]
"""A regular expression for a name prefix, and its replacement."""
Pair = tuple[str, str]
"""mmpretrain's and timm's name prefixes, for both directions. `{}` stands for one part of a dotted name. It appears
equally often and in the same order on both sides."""


def import_rules(pairs: Iterable[Pair]) -> tuple[Rule, ...]:
    """Rules for converting mmpretrain's names to timm's."""
    return tuple(_rule(theirs, ours) for theirs, ours in pairs)


def export_rules(pairs: Iterable[Pair]) -> tuple[Rule, ...]:
    """Rules for converting timm's names to mmpretrain's."""
    return tuple(_rule(ours, theirs) for theirs, ours in pairs)


def _rule(given: str, wanted: str) -> Rule:
    parts = itertools.count(1)
    replacement = re.sub(r"\{\}", lambda _: rf"\g<{next(parts)}>", wanted)
    return re.escape(given).replace(r"\{\}", "([^.]+)"), replacement


class Mapped(NamedTuple):
    """A state dict under our names."""

    tensors: dict[str, Tensor]
    sources: dict[str, str]
    """Maps our names to upstream's, for messages."""
    dead: list[str]
    """Upstream's names for tensors that can be computed or that its forward pass does not use."""
    unknown: list[str]


class Family(NamedTuple):
    """How an upstream backbone maps to a timm model."""

    title: str
    mark: str
    """A tensor name found only in this family."""
    rules: tuple[Rule, ...]
    args: dict[str, Any] = {}
    """timm arguments with which the model computes the same function as upstream's."""
    dead: str = r"(?!)"
    relayout: Callable[[str, Tensor], Tensor] = lambda name, value: value
    """Converts a tensor from upstream's layout to timm's, given timm's name."""


def unfold_to_timm(name: str, value: Tensor) -> Tensor:
    """Reorder the inputs to Swin's patch merging, (.., 4 C) -> same.

    Upstream merges patches with `Unfold`, which orders inputs as (channel, row, column). timm's order is (column, row,
    channel).
    """
    if ".downsample." not in name:
        return value
    split = value.reshape(*value.shape[:-1], -1, 2, 2)
    return split.transpose(-1, -3).reshape(value.shape)


def drop_class_position(name: str, value: Tensor) -> Tensor:
    """Drop the class token's position embedding, because upstream removes that token before the first block."""
    return value[:, 1:].contiguous() if name == "pos_embed" else value


def _mobilenet_pairs() -> Iterator[Pair]:
    """Upstream splits its 13 separable blocks into four sequences; timm splits them into five."""
    yield "backbone.s1.0.0.", "conv_stem."
    yield "backbone.s1.0.1.", "bn1."
    theirs = [(1, 1), (1, 2), (1, 3)] + [(s, i) for s in (2, 3) for i in range(4)] + [(4, 0), (4, 1)]
    ours = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)] + [(3, i) for i in range(6)] + [(4, 0), (4, 1)]
    parts = ((0, "conv_dw"), (1, "bn1"), (3, "conv_pw"), (4, "bn2"))
    for (sequence, block), (stage, position) in zip(theirs, ours, strict=True):
        for index, part in parts:
            yield f"backbone.s{sequence}.{block}.{index}.", f"blocks.{stage}.{position}.{part}."
    yield "head.fc.", "classifier."


RESNET_STEM: tuple[Pair, ...] = (("backbone.conv1.", "conv1."), ("backbone.bn1.", "bn1."))
RESNET_DEEP_STEM: tuple[Pair, ...] = (
    *((f"backbone.stem.{i}.conv.", f"conv1.{3 * i}.") for i in range(3)),
    *((f"backbone.stem.{i}.bn.", f"conv1.{3 * i + 1}.") for i in range(2)),
    ("backbone.stem.2.bn.", "bn1."),
)
RESNET_POOLED: tuple[Pair, ...] = (
    # The first stage does not downsample: before its 1x1 convolution, upstream has no pooling and timm has an identity.
    ("backbone.layer1.0.downsample.0.", "layer1.0.downsample.1."),
    ("backbone.layer1.0.downsample.1.", "layer1.0.downsample.2."),
)
RESNET_BODY: tuple[Pair, ...] = (
    ("backbone.layer{}.{}.conv{}.", "layer{}.{}.conv{}."),
    ("backbone.layer{}.{}.bn{}.", "layer{}.{}.bn{}."),
    ("backbone.layer{}.{}.downsample.{}.", "layer{}.{}.downsample.{}."),
    ("backbone.layer{}.{}.se_layer.conv1.conv.", "layer{}.{}.se.fc1."),
    ("backbone.layer{}.{}.se_layer.conv2.conv.", "layer{}.{}.se.fc2."),
    ("head.fc.", "fc."),
)
MOBILENET: tuple[Pair, ...] = tuple(_mobilenet_pairs())
CONVNEXT: tuple[Pair, ...] = (
    ("backbone.downsample_layers.0.", "stem."),
    ("backbone.downsample_layers.{}.", "stages.{}.downsample."),
    ("backbone.stages.{}.{}.gamma", "stages.{}.blocks.{}.gamma"),
    ("backbone.stages.{}.{}.depthwise_conv.", "stages.{}.blocks.{}.conv_dw."),
    ("backbone.stages.{}.{}.norm.", "stages.{}.blocks.{}.norm."),
    ("backbone.stages.{}.{}.pointwise_conv{}.", "stages.{}.blocks.{}.mlp.fc{}."),
    ("backbone.norm3.", "norm_pre."),
    ("backbone.norm3.", "head.norm."),  # normalized after pooling
    ("head.fc.", "head.fc."),
)
MIXER: tuple[Pair, ...] = (
    ("backbone.patch_embed.projection.", "stem.proj."),
    ("backbone.layers.{}.ln{}.", "blocks.{}.norm{}."),
    ("backbone.layers.{}.{}_mix.layers.0.0.", "blocks.{}.mlp_{}s.fc1."),
    ("backbone.layers.{}.{}_mix.layers.1.", "blocks.{}.mlp_{}s.fc2."),
    ("backbone.ln1.", "norm."),
    ("head.fc.", "head."),
)
VIT: tuple[Pair, ...] = (
    ("backbone.cls_token", "cls_token"),
    ("backbone.pos_embed", "pos_embed"),
    ("backbone.patch_embed.projection.", "patch_embed.proj."),
    ("backbone.layers.{}.ln{}.", "blocks.{}.norm{}."),
    ("backbone.layers.{}.attn.{}.", "blocks.{}.attn.{}."),
    ("backbone.layers.{}.ffn.layers.0.0.", "blocks.{}.mlp.fc1."),
    ("backbone.layers.{}.ffn.layers.1.", "blocks.{}.mlp.fc2."),
    ("backbone.ln1.", "norm."),
    ("head.layers.head.", "head."),
    ("head.fc.", "head."),  # the head for pooled maps, without a class token
)
SWIN: tuple[Pair, ...] = (
    ("backbone.patch_embed.projection.", "patch_embed.proj."),
    ("backbone.patch_embed.norm.", "patch_embed.norm."),
    ("backbone.stages.{}.blocks.{}.norm{}.", "layers.{}.blocks.{}.norm{}."),
    ("backbone.stages.{}.blocks.{}.attn.w_msa.", "layers.{}.blocks.{}.attn."),
    ("backbone.stages.{}.blocks.{}.ffn.layers.0.0.", "layers.{}.blocks.{}.mlp.fc1."),
    ("backbone.stages.{}.blocks.{}.ffn.layers.1.", "layers.{}.blocks.{}.mlp.fc2."),
    # Upstream merges patches at the end of a stage; timm does so at the beginning of the next stage.
    *((f"backbone.stages.{i}.downsample.", f"layers.{i + 1}.downsample.") for i in range(3)),
    ("backbone.norm3.", "norm."),
    ("head.fc.", "head.fc."),
)

FAMILIES: tuple[Family, ...] = (
    Family("ResNet-V1", "backbone.conv1.weight", import_rules(RESNET_STEM + RESNET_BODY)),
    Family("ResNet-V1d", "backbone.stem.0.conv.weight", import_rules(RESNET_DEEP_STEM + RESNET_POOLED + RESNET_BODY)),
    Family("MobileNet-V1", "backbone.s1.0.0.weight", import_rules(MOBILENET), MOBILENET_FORM),
    Family("ConvNeXt", "backbone.downsample_layers.0.0.weight", import_rules(CONVNEXT), CONVNEXT_FORM),
    Family("MLP-Mixer", "backbone.layers.0.token_mix.layers.0.0.weight", import_rules(MIXER)),
    Family(
        "ViT",
        "backbone.layers.0.attn.qkv.weight",
        import_rules(VIT),
        POOLED_VIT,
        r"backbone\.cls_token",
        drop_class_position,
    ),
    Family(
        "Swin",
        "backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
        import_rules(SWIN),
        {},
        r".*\.relative_position_index|.*\.attn_mask",
        unfold_to_timm,
    ),
)

HEAD_RULES: tuple[Rule, ...] = tuple(
    (rf"loss_fmd_{tap}\.projector_{number}\.{theirs}", f"{tap}.{view}.{ours}")
    for tap in ("s3", "s4")
    for number, view in enumerate(("spatial", "frequency"))
    for theirs, ours in (
        (r"query\.weight", "query"),
        (r"pos_embed", "pos_embed"),
        (r"proj_pos\.0\.", "proj_pos.0."),
        (r"proj_student\.([01])\.", r"proj_student.\1."),
        (r"pos_attention\.(q|k|v|proj)\.", r"pos_attention.\1."),
        (r"ffn\.layers\.0\.0\.", "ffn.0."),
        (r"ffn\.layers\.1\.", "ffn.2."),
        (r"norm\.", "norm."),
    )
)
DEAD_S4_QUERY = r"loss_fmd_s4\.projector_[01]\.query\.weight"
"""Tensors that upstream's projector does not use if a query is passed in."""


def family_of(state: Mapping[str, Tensor]) -> Family | None:
    """The family of a student's state dict; None if it is not supported."""
    return next((family for family in FAMILIES if family.mark in state), None)


def rename(name: str, rules: tuple[Rule, ...]) -> str | None:
    """Apply the first matching rule to a name; None if no rule matches."""
    for pattern, replacement in rules:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return None


def map_names(
    state: Mapping[str, Tensor],
    rules: tuple[Rule, ...],
    dead: str = r"(?!)",
    relayout: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Mapped:
    """Rename the tensors in a state dict. If two tensors map to the same name, the second is reported as unknown."""
    mapped = Mapped({}, {}, [], [])
    for name, value in state.items():
        if re.fullmatch(dead, name):
            mapped.dead.append(name)
            continue
        ours = rename(name, rules)
        if ours is None or ours in mapped.tensors:
            mapped.unknown.append(name)
            continue
        mapped.tensors[ours], mapped.sources[ours] = relayout(ours, value), name
    return mapped


def student_tensors(family: Family, state: Mapping[str, Tensor]) -> Mapped:
    """The student's tensors (`backbone.*`, `head.*`) under timm's names."""
    return map_names(state, family.rules, family.dead, family.relayout)


def head_tensors(state: Mapping[str, Tensor], *, s4_query: str) -> Mapped:
    """The projectors' tensors (`loss_fmd_s3.*`, `loss_fmd_s4.*`) under the names used by `ScaleKDHeads`."""
    return map_names(state, HEAD_RULES, DEAD_S4_QUERY if s4_query == "s3" else r"(?!)")
