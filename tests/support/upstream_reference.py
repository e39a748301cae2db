"""Upstream's projectors and losses, transcribed as plain modules with upstream's parameter names.

An independent, literal transcription of what the public ScaleKD code computes (`FreqMaskingDistillLossv2`,
`FreqMaskingDistillLossConvNext`, `KDLoss`, the order of calls in `ClassificationDistiller.loss`, mmcv's `FFN`, mmcls's
classification losses): tokens (B, N, C), queries repeated for every sample, an explicit softmax, a DCT and its inverse,
targets normalized by their own norms. It shares no code with `scalekd_cache`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dct_matrix(size: int) -> Tensor:
    """DCT-II without normalization: y_k = 2 sum_n x_n cos(pi k (2n + 1) / (2 size)), (size, size) float64."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    return 2 * torch.cos(math.pi * k * (2 * n + 1) / (2 * size))


def inverse_dct_matrix(size: int) -> Tensor:
    """Its inverse, a scaled DCT-III: x_n = (y_0 / 2 + sum_{k>0} y_k cos(pi k (2n + 1) / (2 size))) / size."""
    k = torch.arange(size, dtype=torch.float64)[None, :]
    n = torch.arange(size, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi * k * (2 * n + 1) / (2 * size)) / size
    basis[:, 0] = 0.5 / size
    return basis


class FFN(nn.Module):
    """mmcv's two-layer network with a residual connection: Linear, ReLU, Dropout(0), Linear, Dropout(0), + x."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(0.0))
        self.layers = nn.Sequential(first, nn.Linear(hidden, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PosAttention(nn.Module):
    def __init__(self, dim: int, heads: int, input_dim: int, query_dim: int, softmax_scale: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.softmax_scale = heads, dim // heads, softmax_scale
        self.q, self.k, self.v = nn.Linear(query_dim, dim), nn.Linear(input_dim, dim), nn.Linear(input_dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        batch, count = query.shape[:2]

        def split(y: Tensor) -> Tensor:
            return y.reshape(batch, -1, self.heads, self.head_dim).permute(0, 2, 1, 3)

        q, k, v = split(self.q(query)), split(self.k(x)), split(self.v(x))
        attention = (q @ k.transpose(-2, -1)) * self.head_dim**-0.5 * self.softmax_scale
        y = attention.softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, count, self.heads * self.head_dim))


class AttentionProjector(nn.Module):
    def __init__(self, student_dim: int, teacher_dim: int, query_hw: tuple[int, int], pos_hw: tuple[int, int],
                 self_query: bool, softmax_scale: float, heads: int, layer_norm: bool) -> None:  # fmt: skip
        super().__init__()
        self.query_hw, self.teacher_dim = query_hw, teacher_dim
        self.proj_pos = nn.Sequential(nn.Conv2d(teacher_dim, teacher_dim, 1), nn.ReLU())
        norm = LayerNorm2d(student_dim) if layer_norm else nn.BatchNorm2d(student_dim)
        self.proj_student = nn.Sequential(nn.Conv2d(student_dim, student_dim, 3, 1, 1), norm, nn.ReLU())
        self.pos_embed = nn.Parameter(torch.randn(1, student_dim, *pos_hw) * 0.02)
        self.pos_attention = PosAttention(teacher_dim, heads, student_dim, teacher_dim, softmax_scale)
        self.ffn = FFN(teacher_dim, 4 * teacher_dim)
        self.norm = nn.LayerNorm([teacher_dim])
        self.query = nn.Embedding(query_hw[0] * query_hw[1], teacher_dim) if self_query else None

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """x (B, C, h, w) and optional query tokens (B, H W, D) -> tokens (B, H W, D)."""
        batch, (height, width) = len(x), self.query_hw
        if query is not None:
            q = query.permute(0, 2, 1).reshape(batch, -1, height, width)
        else:
            assert self.query is not None
            q = self.query.weight.view(1, height, width, self.teacher_dim).permute(0, 3, 1, 2).repeat(batch, 1, 1, 1)
        tokens = (self.proj_student(x) + self.pos_embed).permute(0, 2, 3, 1).flatten(1, 2)
        y = self.pos_attention(tokens, self.proj_pos(q).permute(0, 2, 3, 1).flatten(1, 2))
        return self.ffn(self.norm(y))


class FreqMaskingDistillLoss(nn.Module):
    def __init__(
        self,
        alpha: tuple[float, float],
        student_dim: int,
        teacher_dim: int,
        query_hw: tuple[int, int],
        pos_hw: tuple[int, int],
        self_query: bool,
        heads: int,
        softmax_scale: float = 5.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        options = (student_dim, teacher_dim, query_hw, pos_hw, self_query, softmax_scale, heads, layer_norm)
        self.projector_0 = AttentionProjector(*options)
        self.projector_1 = AttentionProjector(*options)

    def get_spat_loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        prediction = tokens.permute(0, 2, 1).contiguous().view(*target.shape)
        difference = F.normalize(prediction, dim=1) - F.normalize(target, dim=1)
        return (difference**2).sum() / len(target) * self.alpha[0]

    def get_freq_loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        prediction = tokens.permute(0, 2, 1).contiguous().view(*target.shape)
        high = [without_direct_coefficient(x) for x in (prediction, target)]
        difference = F.normalize(high[0], dim=1) - F.normalize(high[1], dim=1)
        return (difference**2).sum() / len(target) * self.alpha[1]


def without_direct_coefficient(x: Tensor) -> Tensor:
    """2-D DCT of a square map (B, C, N, N), coefficient (0, 0) set to zero, inverse DCT."""
    forward, backward = dct_matrix(x.shape[-1]).to(x), inverse_dct_matrix(x.shape[-1]).to(x)
    spectrum = (forward @ x @ forward.T).clone()
    spectrum[:, :, 0, 0] = 0
    return backward @ spectrum @ backward.T


def kd_loss(student: Tensor, teacher: Tensor, temperature: float, alpha: float) -> tuple[float, Tensor]:
    """The weight of the label loss, and the loss on logits."""
    s, t = F.softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return 1 - alpha, -alpha * temperature**2 * (t * torch.log(s)).sum(dim=1).mean()


def one_hot(labels: Tensor, like: Tensor) -> Tensor:
    hot = torch.zeros_like(like)
    hot[torch.arange(len(labels)), labels] = 1
    return hot


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels].sum() / len(labels)


def label_smooth_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """mmcls's `LabelSmoothLoss` in its mode `original`, the one in upstream's configs."""
    target = one_hot(labels, logits) * (1 - smoothing) + smoothing / logits.shape[1]
    return (-target * torch.log_softmax(logits, -1)).sum(-1).sum() / len(labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over samples and classes, divided by the batch (`avg_factor`)."""
    target = one_hot(labels, logits)
    return -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum() / len(labels)


def distiller_losses(
    losses: nn.ModuleDict,
    s3: Tensor,
    s4: Tensor,
    features: Tensor,
    stage_4: Callable[[Tensor], Tensor],
    label: Tensor,
    logits: tuple[Tensor, Tensor] | None,
    hand_over: bool,
) -> dict[str, Tensor]:
    """The loss terms of a step, by upstream's keys.

    `stage_4` takes tokens through the teacher's last stage; `logits` are the student's and the teacher's, or None
    without a logit loss. `hand_over` passes the S3 branch to S4 as its query.
    """
    first, last = losses["loss_fmd_s3"], losses["loss_fmd_s4"]
    spatial, frequency = stage_4(first.projector_0(s3)), stage_4(first.projector_1(s3))
    queries = (spatial, frequency) if hand_over else (None, None)
    terms = {
        "loss_s3": first.get_spat_loss(spatial, features),
        "loss_s3_alt": first.get_freq_loss(frequency, features),
        "loss_s4": last.get_spat_loss(last.projector_0(s4, query=queries[0]), features),
        "loss_s4_alt": last.get_freq_loss(last.projector_1(s4, query=queries[1]), features),
        "ori_loss": label,
    }
    if logits is not None:
        weight, terms["loss_kd"] = kd_loss(*logits, temperature=1.0, alpha=0.5)
        terms["ori_loss"] = weight * label
    return terms
