"""The tail: the frozen end of a teacher, which maps the stage-3 feature map to the features after the final norm.

In: a timm model from a known family. Out: a `Tail`, (B, C3, H3, W3) -> (B, C, H, W).
Invariant: given the teacher's own stage-3 map (and prefix tokens), a tail computes the teacher's features. Its
parameters never change, and it stays in eval mode.

The final norm: some token models (BEiT, EVA, ViT with average pooling) normalize after pooling, so `norm` is the
identity and `fc_norm` is a LayerNorm. In these models, `fc_norm` is applied to every token. In TinyViT, Hiera and SAM
2's Hiera, `head.norm` is applied at every position. In ConvNeXt, the final norm is either `head.norm` or `norm_pre`. In
SAM's ViT, it is the neck, which ends with a norm. The logits are always the model's own.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.tiny_vit import TinyVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torchvision.ops import Permute

from scalekd_cache.codec import Shape
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.models.timm_models import check_name, create_timm_model, timm_name
from scalekd_cache.models.weights import check_tensors
from scalekd_cache.store.checked_files import check_safetensors


class TailParts(NamedTuple):
    """The modules in a model's tail. `body` runs in order."""

    body: list[nn.Module]
    norm: nn.Module
    layout: str
    """Layout of `body`'s input and output, and of `norm`'s input: nhwc, nchw, tokens or unrolled (as in Hiera)."""
    prefix: int = 0
    """Number of tokens before the patch tokens (class, distillation, registers)."""
    position: nn.Module | None = None
    """Positional module shared by all blocks: relative position bias (BEiT) or rotary embedding (EVA)."""
    unrolled: tuple[int, int] = (0, 0)
    """Number of times that `body`'s input and output tokens are unrolled (Hiera)."""


class Family(NamedTuple):
    """An entry in `FAMILIES`."""

    name: str
    classes: tuple[type[nn.Module], ...]
    parts: Callable[[Any], TailParts]
    """Finds the tail's modules in a model of these classes."""


def _final_norm(model: Any) -> nn.Module:
    norm: nn.Module = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return norm


def _last_quarter(model: Any) -> list[nn.Module]:
    blocks = list(model.blocks)
    return blocks[-max(1, len(blocks) // 4) :]


def _hieradet(model: Any) -> TailParts:
    """The last stage."""
    return TailParts(list(model.blocks[model.stage_ends[-2] + 1 :]), model.head.norm, "nhwc")


def _vitdet(model: Any) -> TailParts:
    """The last quarter of the blocks, with their windows and global attention unchanged, followed by the neck."""
    neck = nn.Sequential(Permute([0, 3, 1, 2]), model.neck, Permute([0, 2, 3, 1]))
    return TailParts(_last_quarter(model), neck, "nhwc")


def _hiera(model: Any) -> TailParts:
    """The last stage, whose tokens are unrolled once per remaining pooling."""
    last, ends = len(model.blocks) - 1, model.stage_ends
    first = ends[-2] + 1
    before, after = (len(model.reroll.schedule[number][0]) for number in (first - 1, last))
    return TailParts(list(model.blocks[first:]), model.head.norm, "unrolled", unrolled=(before, after))


FAMILIES = (
    Family(
        "swin",
        (SwinTransformer, SwinTransformerV2),
        lambda model: TailParts([model.layers[-1]], model.norm, "nhwc"),
    ),
    Family(
        "convnext",
        (ConvNeXt,),
        lambda model: TailParts(
            [model.stages[-1]],
            model.head.norm if isinstance(model.norm_pre, nn.Identity) else model.norm_pre,
            "nchw",
        ),
    ),
    Family("hiera", (Hiera,), _hiera),
    Family("hieradet", (HieraDet,), _hieradet),  # SAM 2
    Family("vitdet", (VisionTransformerSAM,), _vitdet),  # SAM
    Family("tiny_vit", (TinyVit,), lambda model: TailParts([model.stages[-1]], model.head.norm, "nchw")),
    Family(
        "vit",  # also DeiT, DINOv2, CLIP, SigLIP and NaFlex
        (VisionTransformer, NaFlexVit),
        lambda model: TailParts(_last_quarter(model), _final_norm(model), "tokens", model.num_prefix_tokens),
    ),
    Family(
        "beit",
        (Beit,),
        lambda model: TailParts(
            _last_quarter(model), _final_norm(model), "tokens", model.num_prefix_tokens, model.rel_pos_bias
        ),
    ),
    Family(
        "eva",  # also DINOv3
        (Eva,),
        lambda model: TailParts(
            _last_quarter(model), _final_norm(model), "tokens", model.num_prefix_tokens, model.rope
        ),
    ),
)
"""The supported teachers. To add a family, add an entry here and a case in tests/models/test_teacher.py."""

_ADDED: list[Family] = []


def register_family(name: str, kind: type[nn.Module], parts: Callable[[Any], TailParts]) -> None:
    """Register a model class as a teacher family, like an entry in `FAMILIES` (docs/guides/teacher.md).

    Args:
        name: the family name. It is recorded in caches; register the family again before reading such a cache.
        kind: the model class.
        parts: returns the tail's modules for a model of this class.

    Raises:
        UserError: the name is already registered for a different class.
    """
    for family in (*FAMILIES, *_ADDED):
        if family.name == name:
            if family.classes == (kind,):
                return
            raise UserError(
                "a teacher family with this name is already registered", got=name, fix="choose a different name"
            )
    _ADDED.append(Family(name, (kind,), parts))


def is_teacher(model: nn.Module) -> bool:
    """Whether a timm model belongs to a teacher family."""
    return _family(model) is not None


def _family(model: nn.Module) -> Family | None:
    return next((family for family in (*_ADDED, *FAMILIES) if isinstance(model, family.classes)), None)


def family_of(model: nn.Module, name: str) -> Family:
    """A timm model's family. Raises `UserError` with the supported families if the model belongs to none."""
    if family := _family(model):
        return family
    raise UserError(
        "this model cannot be used as a teacher: its architecture is not supported",
        got=f"{name} ({type(model).__name__})",
        expected=f"one of the families {', '.join(family.name for family in FAMILIES)} (deit, dinov2, clip and siglip "
        "count as vit, dinov3 as eva or convnext, sam as vitdet, sam2 as hieradet)",
        fix="choose a supported model, or register its family with register_family (docs/guides/teacher.md)",
    )


def unroll(x: Tensor, times: int) -> Tensor:
    """Convert (B, C, H, W) to Hiera's tokens (B, H W, C). Each unroll makes the position in a 2x2 patch the outermost
    index."""
    batch, channels, height, width = x.shape
    for _ in range(times):
        height, width = height // 2, width // 2
        x = x.reshape(-1, channels, height, 2, width, 2).permute(0, 3, 5, 1, 2, 4).flatten(0, 2)
    return x.reshape(batch, -1, channels, height * width).transpose(2, 3).reshape(batch, -1, channels)


def reroll(x: Tensor, times: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `unroll`: (B, H W, C) to (B, C, H, W)."""
    batch, _, channels = x.shape
    height, width = grid[0] >> times, grid[1] >> times
    x = x.reshape(-1, height * width, channels).transpose(1, 2).reshape(-1, channels, height, width)
    for _ in range(times):
        x = x.reshape(-1, 2, 2, channels, height, width).permute(0, 3, 4, 1, 5, 2)
        height, width = height * 2, width * 2
        x = x.reshape(-1, channels, height, width)
    return x.reshape(batch, channels, *grid)


def to_map(x: Tensor, layout: str, prefix: int, grid: tuple[int, int], unrolled: int = 0) -> Tensor:
    """Convert a model's layout to (B, C, H, W), dropping prefix tokens."""
    if layout == "unrolled":
        return reroll(x, unrolled, grid)
    if layout == "tokens":
        return x[:, prefix:].transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    return x.permute(0, 3, 1, 2) if layout == "nhwc" else x


def features_of(parts: TailParts, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Apply the final norm to the output of `parts.body`, and return it as (B, C, H, W)."""
    return to_map(parts.norm(x), parts.layout, parts.prefix, grid, parts.unrolled[1])


class Tail(nn.Module):
    """The frozen end of a teacher. ScaleKD's teacher parameter perception (TPP) runs student features through it.

    Gradients flow to the input, parameters are frozen, and `train()` has no effect. For token models, the tail runs on
    patch tokens only. If the model's positional encoding includes prefix tokens (BEiT, EVA), they are replaced by zeros
    and masked in attention.

    Args:
        parts: The modules, which are not copied. Copy them first if the model is still needed.
        family: The family name.
        in_shape: (C3, H3, W3).
        out_shape: (C, H, W).
    """

    def __init__(self, parts: TailParts, family: str, in_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        self.family, self.in_shape, self.out_shape = family, in_shape, out_shape
        self.layout, self.prefix, self.unrolled = parts.layout, parts.prefix, parts.unrolled
        self.body = nn.ModuleList(parts.body)
        self.norm = parts.norm
        self.position = parts.position
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "Tail":
        """Stay in eval mode, because drop path in the tail would add noise."""
        return self

    def enable_drop_path(self) -> None:
        """Enable the tail's drop path permanently (`scalekd.tail_drop_path`, an ablation)."""
        for module in self.modules():
            if isinstance(module, DropPath):
                module.training = True

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Run the tail.

        Args:
            x: (B, C3, H3, W3), floating point.
            prefix: (B, P, C3), the teacher's own prefix tokens, used to check a tail against its teacher.

        Returns:
            (B, C, H, W) after the final norm.
        """
        if x.shape[1:] != self.in_shape:
            raise UserError("the tail's input has the wrong shape", got=tuple(x.shape[1:]), expected=self.in_shape)
        grid = (self.out_shape[1], self.out_shape[2])
        parts = TailParts([], self.norm, self.layout, self.prefix, unrolled=self.unrolled)
        if self.layout == "tokens":
            hidden = 0
            tokens = x.flatten(2).transpose(1, 2)
            if prefix is None and self.family in ("beit", "eva"):
                hidden = self.prefix
                prefix = tokens.new_zeros(x.shape[0], hidden, x.shape[1])
            if prefix is None:
                parts = parts._replace(prefix=0)
            else:
                tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
            return features_of(parts, self._blocks(tokens, hidden), grid)
        if self.layout == "unrolled":
            x = unroll(x, self.unrolled[0])
        x = x.permute(0, 2, 3, 1) if self.layout == "nhwc" else x
        for stage in self.body:
            x = stage(x)
        return features_of(parts, x, grid)

    def _blocks(self, tokens: Tensor, hidden: int) -> Tensor:
        """Run tokens (B, N, C) through the blocks. No token attends to the first `hidden` tokens."""
        mask = None
        if hidden:
            mask = tokens.new_zeros(1, 1, 1, tokens.shape[1])
            mask[..., :hidden] = float("-inf")
        options: dict[str, Any] = {}
        ropes: Sequence[Any] = [None] * len(self.body)
        if self.family == "beit":
            bias = None if self.position is None else self.position()
            options["shared_rel_pos_bias"] = bias if mask is None else mask if bias is None else bias + mask
        elif self.family == "eva":
            position: Any = self.position
            if position is not None:
                fixed = getattr(position, "feat_shape", None) is not None
                rope = position.get_embed() if fixed else position.get_embed(shape=list(self.in_shape[1:]))
                # "mixed" embeddings are (depth, heads, N, D), with one row per teacher block; all others are (N, D)
                ropes = rope[-len(self.body) :] if rope.ndim == 4 else [rope] * len(self.body)
            options["attn_mask"] = mask
        for block, rope in zip(self.body, ropes, strict=True):
            tokens = block(tokens, **options, **({} if rope is None else {"rope": rope}))
        return tokens


def build_tail(model: nn.Module, name: str, in_shape: Shape, out_shape: Shape) -> Tail:
    """Build a tail from copies of the last modules in `model`."""
    family = family_of(model, name)
    tail = Tail(copy.deepcopy(family.parts(model)), family.name, in_shape, out_shape)
    for module in tail.modules():
        if "attention_bias_cache" in vars(module):
            vars(module)["attention_bias_cache"] = {}  # TinyViT refills it from the current weights in eval mode
    return tail


def tail_tensors(tail: Tail) -> dict[str, Tensor]:
    """Parameters and all buffers by name, including those omitted from a state dict (position indices, masks)."""
    return dict(tail.named_parameters()) | dict(tail.named_buffers())


def tail_bytes(tail: Tail, spec: TeacherSpec) -> bytes:
    """A tail file's contents (safetensors with the specification). Equal tails give equal bytes."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tail_tensors(tail).items()}
    # only one metadata key, because safetensors does not fix the order of multiple keys
    data: bytes = save(tensors, metadata={"spec": json.dumps(spec.to_json(), sort_keys=True)})
    return data


def load_tail(path: str | Path, spec: TeacherSpec) -> Tail:
    """Read a tail without loading the rest of its teacher.

    timm builds the architecture on the meta device, which allocates no memory. All tensors, including buffers, come
    from the file.

    Args:
        path: A file written with `tail_bytes`.
        spec: Description of the tail's teacher.

    Returns:
        The tail, on the CPU.

    Raises:
        UserError: the file is missing or damaged, belongs to a different teacher, or has missing, extra or misshapen
            tensors.
    """
    name = check_name(timm_name(spec.name), "teacher.name")
    check_safetensors(path, "the tail file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_spec((file.metadata() or {}).get("spec"), spec, path)  # check it before building a model from it
            with torch.device("meta"):
                model, _ = create_timm_model(name, spec.model_args)
            tail = build_tail(model, spec.name, spec.tail_shape, spec.feature_shape)
            wanted = tail_tensors(tail)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_tensors(shapes, {name: tuple(value.shape) for name, value in wanted.items()}, path)
            found = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the tail: {error}", where=path, fix="restore the file from a copy of the cache"
        ) from error
    for name, value in found.items():
        owner = tail.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        if value.dtype != wanted[name].dtype:
            raise UserError(
                f"tensor {name} has the wrong dtype", got=value.dtype, expected=wanted[name].dtype, where=path
            )
        if key in owner._parameters:
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[key] = value
    return tail


def _check_spec(text: str | None, spec: TeacherSpec, path: str | Path) -> None:
    try:
        found = json.loads(text or "null")
    except ValueError:
        found = None
    expected = spec.to_json()
    if found != expected:
        names = [key for key in expected if not isinstance(found, dict) or found.get(key) != expected[key]]
        raise UserError(
            "this tail does not belong to the cache's teacher",
            got=f"different values for {', '.join(names)}" if names else "additional fields",
            expected=f"teacher {spec.name}, weights {spec.weights_sha256[:16]}",
            where=path,
            fix="use this cache's tail.safetensors",
        )
