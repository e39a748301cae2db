"""The trainable heads of ScaleKD: cross attention projectors (CAP), from student maps to the teacher's last grid.

In: the student's two last maps S3 and S4 and the teacher's frozen tail, handed in as a callable.
Out: up to four maps (B, C, H, W), one per tap and view, for the losses of `losses.py` (re-exported here).
Invariant: the tail is never registered here, so it is in no state dict, no optimizer and no ZeRO partition; every
parameter is used only inside the forward pass of the module that owns it; a learned query is projected once a batch.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_cache.ablation import LinearProjector, term_weights
from scalekd_cache.config import ScaleKDConfig
from scalekd_cache.errors import UserError
from scalekd_cache.losses import (
    HeadOutputs,
    LossTerms,
    Targets,
    check_grid,
    distillation_losses,
    frequency_loss,
    label_loss,
    logit_loss,
    spatial_loss,
)
from scalekd_cache.recompute import FirstPass, recomputed

__all__ = [
    "CAP",
    "HeadOutputs",
    "LossTerms",
    "ScaleKDHeads",
    "Targets",
    "distillation_losses",
    "frequency_loss",
    "label_loss",
    "logit_loss",
    "spatial_loss",
]

TINY_MAP = 16
"""Positions up to which a convolution on a CPU is a matrix product."""
WIDTH_PER_HEAD_S3 = 48
"""Channels a head of the S3 projector by default: 16 heads for Swin-L's 768."""
WIDTH_PER_HEAD_S4 = 64
"""Channels a head of the S4 projector by default: 24 heads for Swin-L's 1536."""

Shape = tuple[int, int, int]
"""(channels, height, width) of a map."""


def choose_heads(option: str, given: int | None, dim: int, width_per_head: int) -> int:
    """The number of attention heads: `given`, or the largest divisor of `dim` that is at most dim // width_per_head.

    Raises UserError for a given number that does not divide dim.
    """
    if given is None:
        most = max(1, dim // width_per_head)
        return max(heads for heads in range(1, most + 1) if dim % heads == 0)
    if given < 1 or dim % given:
        raise UserError(
            f"option scalekd.{option} does not divide the teacher's width",
            got=given,
            expected=f"a divisor of {dim}",
            fix=f"change scalekd.{option}, or leave it out",
        )
    return given


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a map, (B, C, H, W) -> same; epsilon 1e-5, as upstream's projectors."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every position on its own."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the map's size, with `nn.Conv2d`'s parameters.

    On a CPU and tiny maps it is computed as one matrix product: the library's kernels are made for large maps, and
    take twice as long on 2048 channels at 2x2 (docs/LOG.md). Equal to within rounding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        batch, channels, height, width = x.shape
        if x.device.type != "cpu" or height * width > TINY_MAP:
            return super().forward(x)
        patches = F.unfold(x, 3, padding=1).transpose(1, 2)  # (B, H W, 9 C)
        return (
            F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).reshape(batch, channels, height, width)
        )


class CrossAttention(nn.Module):
    """Multi-head attention with biases: tokens (B, N, in_channels), query (B or 1, M, query_dim) -> (B, M, dim)."""

    def __init__(self, in_channels: int, query_dim: int, dim: int, num_heads: int, attention_scale: float) -> None:
        super().__init__()
        assert dim % num_heads == 0, (dim, num_heads)
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 * attention_scale
        self.q = nn.Linear(query_dim, dim)
        self.k = nn.Linear(in_channels, dim)
        self.v = nn.Linear(in_channels, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, query: Tensor) -> Tensor:
        """proj(softmax(scale * q k^T) v); one query for all samples is projected once and read through a view."""

        def split(x: Tensor) -> Tensor:  # (b, n, dim) -> (b, heads, n, dim // heads)
            return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

        q = split(self.q(query)).expand(len(tokens), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, split(self.k(tokens)), split(self.v(tokens)), scale=self.scale)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class CAP(nn.Module):
    """Cross attention projector: a student map (B, in_channels, h, w) -> (B, dim, H, W) on the teacher's grid.

    kv = ReLU(norm(conv3x3(x))) + pos, q = ReLU(linear(query)), y = LN(attention(q, kv)), out = y + FFN(y); no residual
    from the query. Source: ScaleKD, `AttentionProjector`; docs/METHOD.md maps the parameter names.

    Args:
        in_channels: channels of the student's map.
        in_grid: (h, w) of the student's map, on which the position embedding lives.
        query_grid: (H, W) of the query and of the output.
        dim: channels of the output.
        query_dim: channels of the query (None: dim).
        num_heads: attention heads, a divisor of dim.
        attention_scale: factor on head_dim^-0.5.
        learned_query: own a query, one vector a position; otherwise forward takes one.
        layer_norm: channel layer norm in place of batch norm (students that have no batch norm).
    """

    def __init__(
        self,
        in_channels: int,
        in_grid: tuple[int, int],
        query_grid: tuple[int, int],
        dim: int,
        query_dim: int | None = None,
        *,
        num_heads: int,
        attention_scale: float = 5.0,
        learned_query: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        query_dim = dim if query_dim is None else query_dim
        self.in_shape: Shape = (in_channels, *in_grid)
        self.query_shape: Shape = (query_dim, *query_grid)
        self.proj_student = nn.Sequential(
            Conv3x3(in_channels),
            ChannelLayerNorm(in_channels) if layer_norm else nn.BatchNorm2d(in_channels),
            nn.ReLU(),
        )
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *self.in_shape), std=0.02))
        # A 1x1 convolution, written on tokens: same numbers, no change of layout.
        self.proj_pos = nn.Sequential(nn.Linear(query_dim, query_dim), nn.ReLU())
        self.pos_attention = CrossAttention(in_channels, query_dim, dim, num_heads, attention_scale)
        self.norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.query: nn.Parameter | None = None
        if learned_query:
            self.query = nn.Parameter(torch.randn(query_grid[0] * query_grid[1], query_dim))

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Project x (B, in_channels, h, w) with the own query, or with the one handed in, (B, query_dim, H, W)."""
        assert x.shape[1:] == self.in_shape, (tuple(x.shape), self.in_shape)  # pos_embed would broadcast silently
        assert (query is None) == (self.query is not None), "exactly one query: learned or handed in"
        if self.query is not None:
            asked = self.query.unsqueeze(0)  # (1, H W, query_dim)
        else:
            assert query is not None
            assert query.shape[1:] == self.query_shape, (tuple(query.shape), self.query_shape)
            asked = query.flatten(2).transpose(1, 2)  # (B, H W, query_dim)
        tokens = (self.proj_student(x) + self.pos_embed).flatten(2).transpose(1, 2)  # (B, h w, in_channels)
        y = self.norm(self.pos_attention(tokens, self.proj_pos(asked)))
        out: Tensor = (y + self.ffn(y)).transpose(1, 2)  # (B, dim, H W), a view: channels-last for what follows
        return out.view(*out.shape[:2], *self.query_shape[1:])


class ScaleKDHeads(nn.Module):
    """The projectors of both taps and both views (dual-view feature mimicking, DFM).

    Projectors that no loss of `config` asks for are not built, so no parameter stays without a gradient.

    Args:
        config: weights, head counts, attention scale, where S4's query comes from.
        tap_shapes: (C, h, w) of S3 and of S4.
        tail_in_shape: (C3, H3, W3), what the teacher's tail takes.
        tail_out_shape: (C, H, W) of the teacher's last map.
        layer_norm: the student is of a layer-norm family; what `config.cap_norm` = auto follows.

    Raises:
        UserError: head counts that do not divide the teacher's widths, or a teacher map of one position.
    """

    def __init__(
        self,
        config: ScaleKDConfig,
        tap_shapes: tuple[Shape, Shape],
        tail_in_shape: Shape,
        tail_out_shape: Shape,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        check_grid(*tail_out_shape[1:])
        self.tail_in_shape, self.tail_out_shape = tail_in_shape, tail_out_shape
        self.tpp = config.tpp
        self.hand_over = config.s4_query == "s3" and config.s3 and config.projector == "cap"
        layer_norm = layer_norm if config.cap_norm == "auto" else config.cap_norm == "layer"
        shape_s3 = tail_in_shape if config.tpp else tail_out_shape
        heads_s3 = choose_heads("heads_s3", config.heads_s3, shape_s3[0], WIDTH_PER_HEAD_S3)
        heads_s4 = choose_heads("heads_s4", config.heads_s4, tail_out_shape[0], WIDTH_PER_HEAD_S4)

        def projector(tap: Shape, out: Shape, num_heads: int, learned_query: bool) -> nn.Module:
            if config.projector == "linear":
                return LinearProjector(tap[0], out)
            return CAP(
                tap[0], tap[1:], out[1:], out[0], num_heads=num_heads, attention_scale=config.attention_scale,
                learned_query=learned_query, layer_norm=layer_norm,
            )  # fmt: skip

        self.s3, self.s4 = nn.ModuleDict(), nn.ModuleDict()
        on = term_weights(config)
        weights = {"spatial": (on.s3_spatial, on.s4_spatial), "frequency": (on.s3_frequency, on.s4_frequency)}
        for view, (weight_s3, weight_s4) in weights.items():
            if weight_s3 > 0 or (weight_s4 > 0 and self.hand_over):
                self.s3[view] = projector(tap_shapes[0], shape_s3, heads_s3, True)
            if weight_s4 > 0:
                self.s4[view] = projector(tap_shapes[1], tail_out_shape, heads_s4, not self.hand_over)
        self._first_pass: FirstPass | None = None

    def checkpoint_gradients(self) -> None:
        """From now on projectors and tail are computed again in the backward pass (`recompute.py`)."""
        self._first_pass = FirstPass(self, "the ScaleKD heads")

    def forward(self, s3: Tensor, s4: Tensor, tail: Callable[[Tensor], Tensor]) -> HeadOutputs:
        """S3 (B, C3', h3, w3) and S4 (B, C4', h4, w4) of the student -> maps (B, C, H, W) on the teacher's last grid.

        Teacher parameter perception (TPP): S3's projection passes through the frozen `tail`, (B, C3, H3, W3) ->
        (B, C, H, W), and the gradient comes back through it. With s4_query = s3 that map is also S4's query; it is not
        detached, so S4's losses train S3's projector too.
        """
        with self._first_pass() if self._first_pass is not None else nullcontext():
            s3_spatial, s4_spatial = self._project("spatial", s3, s4, tail)
            s3_frequency, s4_frequency = self._project("frequency", s3, s4, tail)
        return HeadOutputs(s3_spatial, s3_frequency, s4_spatial, s4_frequency)

    def _project(
        self, view: str, s3: Tensor, s4: Tensor, tail: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        map_s3: Tensor | None = None
        if view in self.s3:
            map_s3 = self._run(self.s3[view], s3)
            map_s3 = self._run(tail, map_s3) if self.tpp else map_s3
            assert map_s3.shape[1:] == self.tail_out_shape, (tuple(map_s3.shape), self.tail_out_shape)
        if view not in self.s4:
            return map_s3, None
        return map_s3, self._run(self.s4[view], s4, map_s3 if self.hand_over else None)

    def _run(self, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        return function(*args) if self._first_pass is None else recomputed(function, *args)
