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
from scalekd_cache.store import remove_stale
from scalekd_cache.store.files import explained, fsync_path, temp_beside
from scalekd_cache.student import Student

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, DESCRIPTION, CARD)
"""All files of an export."""
LOGIT_TOLERANCE = 1e-5
"""Largest difference of a reloaded logit, relative to the largest logit."""


def check_export_place(folder: Path) -> None:
    """An export replaces its folder, so that may hold nothing but an export.

    Raises:
        UserError: a file, or a folder with other files in it.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError("the place of the export is a file", where=folder, expected="a folder", fix="correct OUT=")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
    if others:
        raise UserError(
            "the folder of the export holds other files, which an export would remove",
            got=", ".join(others[:8]),
            expected=f"nothing, or only {', '.join(FILES)}",
            where=folder,
            fix="move them away, or choose another folder (OUT=)",
        )


def export_student(
    student: Student,
    config: StudentConfig,
    folder: Path,
    *,
    image_size: int,
    class_names: Sequence[str],
    card: str | None = None,
) -> float:
    """Write the student for timm, load it back and compare; the folder appears with all its files in one rename.

    Args:
        student: the student.
        config: its options.
        folder: where; an export that is there is replaced.
        image_size: side of its images, pixels.
        class_names: names of its classes, in the order of the logits.
        card: text of the model card (None: without one).

    Returns:
        The largest difference between the logits of the student and of the reloaded model.

    Raises:
        UserError: the reloaded model answers differently, the folder holds other files, or the disk is full; what
            was there is still there then.
    """
    check_export_place(folder)
    folder = folder.resolve()
    temporary, old = temp_beside(folder), temp_beside(folder)
    needed = sum(value.nbytes for value in student.model.state_dict().values())
    with explained(folder.parent, needed):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(folder.parent)
            _write(student, config, temporary, image_size, class_names, card)
            difference = _compare(student, temporary, image_size)
            if folder.is_dir():
                os.rename(folder, old)
            os.rename(temporary, folder)
            fsync_path(folder.parent)
        finally:
            for path in (temporary, old):
                shutil.rmtree(path, ignore_errors=True)
    return difference


def _write(
    student: Student,
    config: StudentConfig,
    folder: Path,
    image_size: int,
    class_names: Sequence[str],
    card: str | None,
) -> None:
    """All files of an export, fsynced."""
    save_for_hf(
        student.model.eval(),
        str(folder),
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
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner reads
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        fsync_path(file)
    fsync_path(folder)


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
