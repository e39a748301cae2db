"""Segment digits in noise with an exported student, compared with the same model from random weights.

python examples/segmentation.py runs/resnet18/export [steps]

The images are generated: enlarged handwritten digits on gray noise. Each pixel is classified as background or as one
of ten digits. The exported folder provides the backbone (`features_only`) and its architecture; the head has two
convolutions. Both models are trained on the same images in the same order. The script prints the mean intersection
over union (mIoU) of each model in percent.
"""

import sys

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIDE, CLASSES, BATCH = 64, 11, 16


class Segmenter(nn.Module):
    """A backbone whose last maps are resized and added, and a per-pixel classifier."""

    def __init__(self, folder: str, pretrained: bool) -> None:
        super().__init__()
        self.backbone = timm.create_model(f"local-dir:{folder}", pretrained=pretrained, features_only=True)
        widths = self.backbone.feature_info.channels()[-4:]
        self.reduce = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in widths)
        self.head = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, CLASSES, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, CLASSES, S, S) logits."""
        maps = [reduce(x) for reduce, x in zip(self.reduce, self.backbone(images)[-4:], strict=True)]
        size = maps[0].shape[2:]
        joined = torch.stack([F.interpolate(x, size, mode="bilinear") for x in maps]).sum(0)
        return F.interpolate(self.head(joined), images.shape[2:], mode="bilinear")


def scenes(count: int, seed: int, test: bool) -> tuple[Tensor, Tensor]:
    """(B, 3, SIDE, SIDE) images from 0 to 1, and (B, SIDE, SIDE) classes; test digits are held out."""
    digits, random = load_digits(), np.random.default_rng(seed)
    chosen = random.choice(np.flatnonzero((np.arange(len(digits.target)) % 5 == 4) == test), count)
    images = random.uniform(0.0, 0.35, (count, SIDE, SIDE)).astype(np.float32)
    masks = np.zeros((count, SIDE, SIDE), np.int64)
    for place, index in enumerate(chosen):
        side = int(random.integers(44, 60))
        left, top = random.integers(0, SIDE - side, 2)
        ink = torch.from_numpy(digits.images[index] / 16.0).float()[None, None]
        digit = F.interpolate(ink, (side, side), mode="bicubic")[0, 0].clamp(0, 1).numpy()
        image, mask = (array[place, top : top + side, left : left + side] for array in (images, masks))
        np.maximum(image, digit, out=image)
        mask[digit > 0.4] = digits.target[index] + 1
    return torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(masks)


def train(folder: str, pretrained: bool, steps: int) -> float:
    """Train a segmenter; returns its mIoU on scenes of held-out digits, in percent."""
    torch.manual_seed(0)
    model = Segmenter(folder, pretrained)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    weight = torch.tensor([0.2] + [1.0] * 10)  # most pixels are background
    for step in range(steps):
        images, masks = scenes(BATCH, step, test=False)
        loss = F.cross_entropy(model((images - mean) / std), masks, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    with torch.no_grad():
        for batch in range(8):
            images, masks = scenes(BATCH, 10_000 + batch, test=True)
            answers = model((images - mean) / std).argmax(1)
            counts += torch.bincount((masks * CLASSES + answers).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    hits = counts.diagonal()
    return 100 * float((hits / (counts.sum(0) + counts.sum(1) - hits).clamp_min(1)).mean())


if __name__ == "__main__":
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    for name, pretrained in (("random initialization", False), ("exported student", True)):
        print(f"{name}: mIoU {train(sys.argv[1], pretrained, steps):.1f}% after {steps} steps", flush=True)
