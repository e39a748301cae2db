"""Upstream's students, transcribed as plain modules with upstream's names, as found in its checkpoints.

Transcribed from the modules that the public ScaleKD code (its mmpretrain and mmcv) builds for its student
configurations, independently of timm and of the importer: names, shapes and computation are those of upstream. Drop
path and initialization are omitted. Every student is `backbone`, global average pooling, `head.fc`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upstream_reference import FreqMaskingDistillLoss


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Module()
        self.head.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.backbone(x).mean((2, 3)))


def to_map(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)


class ConvModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        if downsample is not None:
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """`deep` is V1d: three 3x3 convolutions as the stem, and average pooling before a strided shortcut."""

    def __init__(self, depths: Sequence[int], deep: bool) -> None:
        super().__init__()
        self.deep = deep
        if deep:
            self.stem = nn.Sequential(ConvModule(3, 32, 2), ConvModule(32, 32, 1), ConvModule(32, 64, 1))
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for stage, depth in enumerate(depths):
            outputs, stride, blocks = 256 * 2**stage, 2 if stage else 1, []
            for block in range(depth):
                downsample = None
                if block == 0:
                    pooled = deep and stride > 1
                    pool = [nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)] if pooled else []
                    conv = nn.Conv2d(inputs, outputs, 1, 1 if pooled else stride, bias=False)
                    downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(outputs))
                blocks.append(Bottleneck(inputs, outputs, stride if block == 0 else 1, downsample))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.deep else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in range(4):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x


class MobileNetV1(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def plain(inputs: int, outputs: int, stride: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        def separable(inputs: int, outputs: int, stride: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )

        self.s1 = nn.Sequential(plain(3, 32, 2), separable(32, 64, 1), separable(64, 128, 2), separable(128, 128, 1))
        self.s2 = nn.Sequential(
            separable(128, 256, 2), separable(256, 256, 1), separable(256, 512, 2), separable(512, 512, 1)
        )
        self.s3 = nn.Sequential(*(separable(512, 512, 1) for _ in range(4)))
        self.s4 = nn.Sequential(separable(512, 1024, 2), separable(1024, 1024, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.s4(self.s3(self.s2(self.s1(x))))


class FFN(nn.Module):
    """mmcv's FFN with GELU; adds the given identity."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int, norm: bool = False) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, dim, patch, patch)
        if norm:
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection(x).flatten(2).transpose(1, 2)
        return self.norm(x) if hasattr(self, "norm") else x


class MultiheadAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, dim))


class EncoderLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MultiheadAttention(dim, heads)
        self.ln2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FFN(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class VisionTransformer(nn.Module):
    """Without a class token in its blocks: upstream adds one with its position and removes it again."""

    def __init__(self, dim: int, depth: int, heads: int, positions: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions + 1, dim))
        self.patch_embed = PatchEmbed(dim, 16)
        self.layers = nn.ModuleList(EncoderLayer(dim, heads) for _ in range(depth))
        self.ln1 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        x = x[:, 1:]
        for layer in self.layers:
            x = layer(x)
        return to_map(self.ln1(x))


class MixerBlock(nn.Module):
    def __init__(self, positions: int, dim: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.token_mix = FFN(positions, dim // 2)
        self.ln2 = nn.LayerNorm(dim)
        self.channel_mix = FFN(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.ln1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.ln2(x))


class MlpMixer(nn.Module):
    def __init__(self, dim: int, depth: int, positions: int, patch: int = 16) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, patch)
        self.layers = nn.ModuleList(MixerBlock(positions, dim) for _ in range(depth))
        self.ln1 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return to_map(self.ln1(x))


class LN2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, linear: bool) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LN2d(dim, eps=1e-6)
        self.linear = linear
        self.pointwise_conv1 = nn.Linear(dim, 4 * dim) if linear else nn.Conv2d(dim, 4 * dim, 1)
        self.pointwise_conv2 = nn.Linear(4 * dim, dim) if linear else nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise_conv(x))
        y = y.permute(0, 2, 3, 1) if self.linear else y
        y = self.pointwise_conv2(F.gelu(self.pointwise_conv1(y)))
        y = y.permute(0, 3, 1, 2) if self.linear else y
        return x + y * self.gamma.view(1, -1, 1, 1)


class ConvNeXt(nn.Module):
    """As in upstream's configuration, with the last norm before the pooling."""

    def __init__(self, depths: Sequence[int], dims: Sequence[int], linear: bool = True) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), LN2d(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        self.stages = nn.ModuleList()
        for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            if stage:
                before = dims[stage - 1]
                self.downsample_layers.append(nn.Sequential(LN2d(before, eps=1e-6), nn.Conv2d(before, dim, 2, 2)))
            self.stages.append(nn.Sequential(*(ConvNeXtBlock(dim, linear) for _ in range(depth))))
        self.norm3 = LN2d(dims[-1], eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.norm3(x)


class WindowMSA(nn.Module):
    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        steps = torch.arange(window)
        coordinates = ((2 * window - 1) * steps[:, None] + steps[None, :]).reshape(1, -1)
        self.register_buffer("relative_position_index", (coordinates + coordinates.T).flip(1).contiguous())
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = q * (dim // self.heads) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + bias.view(count, count, -1).permute(2, 0, 1)
        if mask is not None:
            windows = len(mask)
            scores = scores.view(-1, windows, self.heads, count, count) + mask[None, :, None]
            scores = scores.view(-1, self.heads, count, count)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, count, dim))


class SwinBlock(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: bool) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2 if shift else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.Module()
        self.attn.w_msa = WindowMSA(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = FFN(dim, 4 * dim)

    def windows(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, dim)
        return x.transpose(2, 3).reshape(-1, self.window**2, dim)

    def attend(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        shift = self.shift if height > self.window else 0  # a single window, so nothing to shift
        mask = None
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            region = torch.zeros(1, height, width, 1)
            cuts = (slice(0, -self.window), slice(-self.window, -shift), slice(-shift, None))
            for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
                region[:, rows, columns] = number
            ids = self.windows(region).squeeze(-1)
            mask = torch.where(ids[:, None] == ids[:, :, None], 0.0, -100.0)
        y = self.attn.w_msa(self.windows(x), mask)
        y = y.view(batch, height // self.window, width // self.window, self.window, self.window, dim)
        y = y.transpose(2, 3).reshape(batch, height, width, dim)
        return y.roll((shift, shift), (1, 2)) if shift else y

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, 2 C), patches gathered by `Unfold`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        patches = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
        return self.reduction(self.norm(patches)).view(batch, height // 2, width // 2, -1)


class SwinStage(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, window: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(dim, heads, window, i % 2 == 1) for i in range(depth))
        self.downsample = None if last else PatchMerging(dim)


class SwinTransformer(nn.Module):
    def __init__(self, dim: int, depths: Sequence[int], heads: Sequence[int], window: int = 7) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim, 4, norm=True)
        last = len(depths) - 1
        stages = enumerate(zip(depths, heads, strict=True))
        self.stages = nn.ModuleList(SwinStage(dim * 2**i, d, h, window, i == last) for i, (d, h) in stages)
        self.norm3 = nn.LayerNorm(dim * 2**last)

    def forward(self, x: Tensor) -> Tensor:
        x = to_map(self.patch_embed(x)).permute(0, 2, 3, 1)
        for stage in self.stages:
            for block in stage.blocks:
                x = block(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return self.norm3(x).permute(0, 3, 1, 2)


class Distiller(nn.Module):
    """All modules of a checkpoint of upstream's distiller, with small projectors and a minimal teacher."""

    def __init__(self, student: nn.Module, *, self_query_s4: bool = False, layer_norm: bool = False) -> None:
        super().__init__()
        self.teacher = nn.ModuleDict({"backbone": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
        self.student = student
        self.distill_losses = nn.ModuleDict(
            {
                "loss_fmd_s3": FreqMaskingDistillLoss(
                    (0.08, 0.06), 10, 12, (6, 6), (6, 6), True, 4, layer_norm=layer_norm
                ),
                "loss_fmd_s4": FreqMaskingDistillLoss(
                    (0.08, 0.06), 20, 24, (3, 3), (3, 3), self_query_s4, 6, layer_norm=layer_norm
                ),
            }
        )
        self.linear = nn.Linear(384, 384)


def paper_student(name: str, classes: int = 1000) -> Classifier:
    """Upstream's model of one of the paper's students, at its real size."""
    backbone, channels = {
        "resnet50": lambda: (ResNet((3, 4, 6, 3), deep=False), 2048),
        "resnet50d": lambda: (ResNet((3, 4, 6, 3), deep=True), 2048),
        "mobilenetv1": lambda: (MobileNetV1(), 1024),
        "convnext_tiny": lambda: (ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768)), 768),
        "mixer_s16": lambda: (MlpMixer(512, 8, 196), 512),
        "mixer_b16": lambda: (MlpMixer(768, 12, 196), 768),
        "mixer_b14": lambda: (MlpMixer(768, 12, 256, 14), 768),
        "vit_small": lambda: (VisionTransformer(384, 12, 6, 196), 384),
        "vit_base": lambda: (VisionTransformer(768, 12, 12, 196), 768),
        "swin_tiny": lambda: (SwinTransformer(96, (2, 2, 6, 2), (3, 6, 12, 24)), 768),
    }[name]()
    return Classifier(backbone, channels, classes)
