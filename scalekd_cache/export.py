"""A trained student as plain timm takes it.

In: a student and its consolidated state. Out: a folder with model.safetensors and config.json.
Invariant: the folder is complete or absent, and `timm.create_model("local-dir:DIR", pretrained=True)` has given the
same logits before this returns.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from scalekd_cache.config import StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.student import Student

LOGIT_TOLERANCE = 1e-5
"""Largest difference of a reloaded logit, relative to the largest logit."""


def export_student(
    student: Student, config: StudentConfig, folder: Path, *, image_size: int, class_names: Sequence[str]
) -> float:
    """Write the student for timm, load it back and compare.

    Returns:
        The largest difference between the logits of the student and of the reloaded model.

    Raises:
        UserError: when the reloaded model answers differently; nothing is left behind then.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_for_hf(
            student.model.eval(),
            str(temporary),
            model_config={"label_names": list(class_names)},
            model_args=student.model_args,
            safe_serialization=True,
            data_config={
                "input_size": (3, image_size, image_size),
                "mean": config.mean,
                "std": config.std,
                "interpolation": "bicubic",
                "crop_pct": 0.875,
            },
        )
        (temporary / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner reads
        difference = _compare(student, temporary, image_size)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


@torch.no_grad()
def _compare(student: Student, folder: Path, image_size: int) -> float:
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    model = student.model.eval()
    device = next(model.parameters()).device
    expected: Tensor = model(images.to(device)).cpu().float()
    difference = float((reloaded(images).float() - expected).abs().max())
    limit = LOGIT_TOLERANCE * max(1.0, float(expected.abs().max()))
    if device.type == "cpu" and difference > limit:
        raise UserError(
            "the exported model does not give the student's logits",
            got=f"difference {difference:.3g}",
            expected=f"at most {limit:.3g}",
            where=folder,
            fix="report this with the student's name and timm's version",
        )
    return difference
