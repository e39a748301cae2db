"""Train a custom student (any module that returns two feature maps and logits) in the loop of plain_pytorch.py."""

import sys

import torch
from torch import Tensor, nn

from scalekd_cache import CachedTargets, ScaleKDLoss


class MyStudent(nn.Module):
    """(B, 3, H, W) normalized images -> S3 (B, C3, H3, W3), S4 (B, C4, H4, W4), logits (B, K).

    Without classes (K = 0), the third output is a pooled embedding (B, C4)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32), nn.ReLU())
        self.stage3 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.stage4 = nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.head = nn.Linear(128, num_classes) if num_classes else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two maps that are compared with the teacher's map, and the logits or the embedding."""
        s3 = self.stage3(self.stem(images))
        s4 = self.stage4(s3)
        return s3, s4, self.head(s4.mean((2, 3)))


targets = CachedTargets(sys.argv[1], batch_size=32, epochs=1)
student = MyStudent(targets.num_classes)
loss = ScaleKDLoss(targets, student)
optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=1e-3)
for step, (images, labels, target) in enumerate(targets, start=1):
    terms = loss(*student(images), labels, target)
    optimizer.zero_grad()
    terms.total.backward()
    optimizer.step()
    print(f"step {step} of {len(targets)}: loss {terms.total.item():.4f}", flush=True)
