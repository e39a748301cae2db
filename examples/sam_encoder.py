"""Distill SAM's image encoder into TinyViT, using only its feature map, as in MobileSAM's first stage.

python examples/sam_encoder.py pictures sam_vit_b.safetensors

The file holds the weights of timm's samvit_base_patch16 (`scalekd fetch --teacher samvit_base_patch16`). The encoder
takes images of 1,024 pixels and returns a map of 64 x 64 positions with 256 channels. It has no classifier, and the
images need no labels: the student learns the map and its mean. The result is a backbone for timm.
"""

import sys
from pathlib import Path
from typing import Any

import timm

import scalekd_cache


def main(
    pictures: str,
    weights: str | None,
    *,
    student: str = "tiny_vit_5m_224",
    size: int = 1024,
    epochs: int = 8,
    folder: str = ".",
    teacher_options: dict[str, Any] | None = None,
    training_options: dict[str, Any] | None = None,
) -> list[int]:
    """Returns the channels of the exported backbone's feature maps."""
    cache, run = Path(folder) / "caches" / "sam", Path(folder) / "runs" / student
    options = {"teacher.batch_size": 2, **(teacher_options or {})}  # global attention over 4,096 positions
    scalekd_cache.cache_teacher(
        data=pictures, teacher="samvit_base_patch16", teacher_weights=weights, size=size, cache=cache, options=options
    )
    scalekd_cache.distill(
        cache=cache, student=student, run=run, heads="linear", epochs=epochs, options=training_options
    )
    backbone = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, features_only=True)
    channels: list[int] = backbone.feature_info.channels()
    print(f"{run / 'export'}: feature maps with {channels} channels")
    return channels


if __name__ == "__main__":
    main(*sys.argv[1:3])
