"""One training run of lightly-train: `python -m benchmarks.peers.lightly '<JSON of the options>'`, in build/peers.

In: a folder of images and the teacher's weights. Out: the student's weights as a safetensors file.
Invariant: everything that is not in the options has lightly-train's default (method, heads, optimizer, schedule,
loader). Nothing is sent over the network.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

OWN_CROPS: dict[str, Any] = {"color_jitter": None, "random_gray_scale": None, "gaussian_blur": None}
"""Augmentations that our views do not have, switched off."""


class Options(NamedTuple):
    """One run."""

    images: str
    """Folder."""
    teacher: str
    """timm model."""
    teacher_weights: str
    """A torch file of its state dict."""
    student: str
    """timm model."""
    out: str
    """Folder to write."""
    epochs: int
    batch: int
    size: int
    """Pixels."""
    seed: int
    crop_scale: tuple[float, float] | None
    """Crops of this share of the area and flips only (None: its own augmentation)."""
    lr: float | None
    """Learning rate of AdamW at this batch size (None: its own)."""
    weight_decay: float | None
    """Of AdamW, with `lr`."""


def train(options: Options) -> None:
    """Distill the student and write `out`/student.safetensors."""
    out = Path(options.out)
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(out / "lightly-train")
    import lightly_train
    import torch
    from lightly_train._methods.distillationv3.distillationv3 import DistillationV3Args
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    transform: dict[str, Any] = {"image_size": (options.size, options.size)}
    if options.crop_scale is not None:
        low, high = options.crop_scale
        transform |= {**OWN_CROPS, "random_resize": {"min_scale": low, "max_scale": high}}
    # lightly-train multiplies its learning rate by this factor
    scale = (options.batch / DistillationV3Args().reference_batch_size) ** 0.5
    lightly_train.pretrain(
        out=str(out / "run"),
        data=options.images,
        model=f"timm/{options.student}",
        method="distillation",
        method_args={
            "teacher": f"timm/{options.teacher}",
            "teacher_weights": options.teacher_weights,
            "teacher_args": {"num_classes": 0},
        },
        epochs=options.epochs,
        batch_size=options.batch,
        num_workers=0,
        seed=options.seed,
        accelerator="cpu",
        devices=1,
        overwrite=True,
        transform_args=transform,
        optim_args=None if options.lr is None else {"lr": options.lr / scale, "weight_decay": options.weight_decay},
    )
    file = out / "run" / "exported_models" / "exported_last.pt"
    state = torch.load(file, map_location="cpu", weights_only=True)
    save_file({name: value.contiguous() for name, value in state.items()}, out / "student.safetensors")


if __name__ == "__main__":
    train(Options(**json.loads(sys.argv[1])))
