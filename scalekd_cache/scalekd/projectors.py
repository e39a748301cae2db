"""Projectors from a student's map to the teacher's grid: the published cross attention projector (CAP), and cheaper
variants.

In: a student's map, and a query that is learned or passed in. Out: a map (B, C, H, W) on the teacher's grid.
Invariant: `CAP` computes the same function as upstream's `AttentionProjector` (tests/scalekd/test_parity.py) and has
the same parameters. Every parameter is used only in its own module's forward pass, and a learned query is projected
once per batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_cache.codec import Shape

TINY_MAP = 16
"""Maximum number of positions at which CPU convolutions are computed as matrix products."""
LITE_NARROWING = 4
"""Ratio of the teacher map's width to the lite projector's attention width."""


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalization over a map's channels: (B, C, H, W) -> same. Epsilon is 1e-5, as in upstream's projectors."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each position separately."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that preserves the map size, with `nn.Conv2d`'s parameters.

    On a CPU, small maps are computed as a matrix product, because the library's kernels take twice as long for 2048
    channels at 2x2 (docs/LOG.md). Results are equal up to rounding.
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
        """proj(softmax(scale * q k^T) v). A query shared by all samples is projected once and copied to each sample.

        It is copied rather than expanded, because cuDNN attention has returned wrong results for inputs with stride 0.
        """

        def split(x: Tensor) -> Tensor:  # (b, n, dim) -> (b, heads, n, dim // heads)
            return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

        q = split(self.q(query))
        if len(query) != len(tokens):
            q = q.expand(len(tokens), -1, -1, -1).contiguous()
        assert len(tokens) == 1 or 0 not in q.stride(), q.stride()
        out = F.scaled_dot_product_attention(q, split(self.k(tokens)), split(self.v(tokens)), scale=self.scale)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def query_tokens(learned: Tensor | None, given: Tensor | None, shape: Shape) -> Tensor:
    """The query as tokens: learned (H W, C) -> (1, H W, C), or given (B, C, H, W) -> (B, H W, C)."""
    assert (given is None) == (learned is not None), "exactly one query: learned or passed in"
    if learned is not None:
        return learned.unsqueeze(0)
    assert given is not None
    assert given.shape[1:] == shape, (tuple(given.shape), shape)
    return given.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, shape: Shape) -> Tensor:
    """(B, H W, C) -> (B, C, H, W) as a channels-last view."""
    return tokens.transpose(1, 2).view(len(tokens), -1, *shape[1:])


class CAP(nn.Module):
    """Cross attention projector: a student map (B, in_channels, h, w) -> (B, dim, H, W) on the teacher's grid.

    kv = ReLU(norm(conv3x3(x))) + pos, q = ReLU(linear(query)), y = LN(attention(q, kv)), out = y + FFN(y). There is no
    residual connection from the query. Source: ScaleKD, `AttentionProjector`; docs/METHOD.md maps the parameter names.

    Args:
        in_channels: channels of the student's map.
        in_grid: (h, w) of the student's map and the position embedding.
        query_grid: (H, W) of the query and the output.
        dim: output channels.
        query_dim: query channels (None: dim).
        num_heads: number of attention heads; must divide dim.
        attention_scale: factor applied to head_dim^-0.5.
        learned_query: whether to learn a query with one vector per position. If not, the caller passes a query.
        layer_norm: use channel layer norm instead of batch norm, for students without batch norm.
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
        # Equivalent to a 1x1 convolution, but applied to tokens, so that the layout does not change.
        self.proj_pos = nn.Sequential(nn.Linear(query_dim, query_dim), nn.ReLU())
        self.pos_attention = CrossAttention(in_channels, query_dim, dim, num_heads, attention_scale)
        self.norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.query: nn.Parameter | None = None
        if learned_query:
            self.query = nn.Parameter(torch.randn(query_grid[0] * query_grid[1], query_dim))

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Project x (B, in_channels, h, w) with the learned query, or with `query` (B, query_dim, H, W)."""
        assert x.shape[1:] == self.in_shape, (tuple(x.shape), self.in_shape)  # pos_embed would broadcast silently
        asked = query_tokens(self.query, query, self.query_shape)
        tokens = (self.proj_student(x) + self.pos_embed).flatten(2).transpose(1, 2)  # (B, h w, in_channels)
        y = self.norm(self.pos_attention(tokens, self.proj_pos(asked)))
        return as_map(y + self.ffn(y), self.query_shape)


class LiteCAP(nn.Module):
    """A cheaper cross attention projector: a student map (B, in_channels, h, w) -> (B, dim, H, W).

    This is CAP at a quarter of the width: the student's map is reduced to dim / 4 channels for convolution and
    attention, and the FFN is dim / 2 wide. The order of operations and the attention scale are the same as in CAP. A
    single projector serves both views. This variant is not in the paper.

    Args: the same as for `CAP`, but num_heads must divide dim // 4 (`lite_width`).
    """

    def __init__(
        self,
        in_channels: int,
        in_grid: tuple[int, int],
        query_grid: tuple[int, int],
        dim: int,
        *,
        num_heads: int,
        attention_scale: float = 5.0,
        learned_query: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        width = lite_width(dim)
        self.in_shape: Shape = (in_channels, *in_grid)
        self.query_shape: Shape = (dim, *query_grid)
        self.proj_student = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            Conv3x3(width),
            ChannelLayerNorm(width) if layer_norm else nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, width, *in_grid), std=0.02))
        self.pos_attention = CrossAttention(width, dim, width, num_heads, attention_scale)
        self.widen = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
        self.query: nn.Parameter | None = None
        if learned_query:
            self.query = nn.Parameter(torch.randn(query_grid[0] * query_grid[1], dim))

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Project x (B, in_channels, h, w) with the learned query, or with `query` (B, dim, H, W)."""
        assert x.shape[1:] == self.in_shape, (tuple(x.shape), self.in_shape)
        asked = query_tokens(self.query, query, self.query_shape)
        tokens = (self.proj_student(x) + self.pos_embed).flatten(2).transpose(1, 2)  # (B, h w, width)
        y = self.norm(self.widen(self.pos_attention(tokens, asked)))
        return as_map(y + self.ffn(y), self.query_shape)


def lite_width(dim: int) -> int:
    """The lite projector's attention width (channels) for a teacher map with `dim` channels."""
    return max(1, dim // LITE_NARROWING)


class LinearHead(nn.Module):
    """The cheapest head: linear maps from S4 to the teacher's map, and from S4's mean to the teacher's mean.

    The map is resized to the teacher's grid after the projection. Resizing it first would give the same values but cost
    more. This head is not in the paper.

    Args:
        in_channels: number of channels in S4.
        out: (C, H, W), the shape of the teacher's map.
        pooled: width of the pooled target (0: C).
        embedding: width of the student's pooled embedding (0: `in_channels`).
    """

    def __init__(self, in_channels: int, out: Shape, pooled: int = 0, embedding: int = 0) -> None:
        super().__init__()
        self.grid = out[1:]
        self.map = nn.Conv2d(in_channels, out[0], 1)
        self.pooled = nn.Linear(embedding or in_channels, pooled or out[0])

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (F, C', h, w) -> (F, C, H, W), and `embedding` (B, E) -> (B, P). None means the mean of x."""
        y: Tensor = self.map(x)
        if y.shape[2:] != self.grid:
            y = F.interpolate(y.float(), self.grid, mode="bilinear", antialias=True)  # the CPU has no bfloat16 version
        return y, self.pooled(x.mean((2, 3)) if embedding is None else embedding)


class LinearProjector(nn.Module):
    """Projector for `linear-tpp`: pools a student map (B, C', h, w) to the grid of `out` and applies a 1x1 convolution.

    Args:
        in_channels: number of channels in the student's map.
        out: (C, H, W), the output shape.
    """

    def __init__(self, in_channels: int, out: Shape) -> None:
        super().__init__()
        self.out = out
        self.proj = nn.Conv2d(in_channels, out[0], 1)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """(B, C', h, w) -> (B, C, H, W); the query is ignored."""
        if x.shape[2:] != self.out[1:]:
            x = F.adaptive_avg_pool2d(x, self.out[1:])
        y: Tensor = self.proj(x)
        return y
