"""The demo teacher: a small Swin that is trained on the digits if its weights are missing.

In: the demo's training images. Out: a safetensors file with the timm model's state dict.
Invariant: the file is written atomically, and the same machine and thread count give the same weights.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import decode_image
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import counted
from scalekd_cache.models.evaluate import evaluate
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.supervised import train_epoch
from scalekd_cache.models.teacher import demo_teacher_args
from scalekd_cache.models.timm_models import DEMO_CLASSES, DEMO_TIMM_NAME
from scalekd_cache.models.weights import save_weights
from scalekd_cache.progress import progress

EPOCHS = 30
BATCH_SIZE = 32
PEAK_LR = 2e-3


def _images(source: Source) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 64, 64) uint8 and labels (N,) int64."""
    arrays = [decode_image(source.read(i), sample.key) for i, sample in enumerate(source.samples)]
    labels = torch.tensor([sample.label for sample in source.samples])
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), labels


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly zoom (0.8 to 1.05), stretch, shift and rotate (up to 9 degrees) float images (B, 3, H, W)."""
    count = len(images)
    draw = torch.rand(count, 5, generator=generator)
    zoom, stretch, angle = 0.8 + 0.25 * draw[:, 0], 0.9 + 0.2 * draw[:, 1], 0.3 * (draw[:, 2] - 0.5)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = zoom * stretch * angle.cos(), -zoom * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = zoom * angle.sin(), zoom / stretch * angle.cos()
    theta[:, :, 2] = 0.15 * (draw[:, 3:] - 0.5)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_demo_teacher(
    path: Path, data: DataConfig, *, epochs: int = EPOCHS, seed: int = 0, model_args: Mapping[str, Any] | None = None
) -> float:
    """Train and save the demo teacher. `model_args` override `demo_teacher_args`.

    Returns:
        The top-1 accuracy in percent on the demo's held-out images.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = _images(open_source(DataConfig(source="demo", download_dir=data.download_dir), "train"))
    args = {**demo_teacher_args(), **(model_args or {})}
    model = timm.create_model(DEMO_TIMM_NAME, num_classes=DEMO_CLASSES, drop_path_rate=0.1, **args)
    normalize = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.2)
    loss_of = partial(F.cross_entropy, label_smoothing=0.1)
    bar = progress("training the demo teacher", steps, "step")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=generator)
        for at in range(0, len(labels) // BATCH_SIZE * BATCH_SIZE, BATCH_SIZE):
            ids = order[at : at + BATCH_SIZE]
            yield normalize.standardize(_augment(pixels[ids].float() / 255, generator)), labels[ids]

    def after_step(_: float) -> None:
        schedule.step()
        bar.update()

    for _ in range(epochs):
        train_epoch(model, model.parameters, batches(), loss_of, optimizer, after_step)
    bar.close()
    model.eval()
    held_out = open_source(DataConfig(source="demo", download_dir=data.download_dir), "val")
    tally = evaluate(lambda x: model(normalize(x)), held_out, 64, torch.device("cpu"))
    save_weights(model, path)
    print(
        f"demo teacher: top-1 {tally.top1_percent:.2f}% on {counted(tally.images, 'held-out image')} -> {path}",
        flush=True,
    )
    return tally.top1_percent
