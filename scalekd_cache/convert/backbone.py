"""A backbone for use on other data: an exported or imported student, a run's student, or a timm model.

In: a folder or a timm name, and a weights file. Out: a `Backbone`: the timm model with its image size and
normalization. Invariant: weights come from safetensors files or timm's own downloads; pickles are never opened.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.convert.timm_export import DESCRIPTION, check_image_size, load_export, read_description
from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.models.teacher import load_from_file, own_image_size, size_args, teacher_classes
from scalekd_cache.models.timm_models import DEMO_TEACHER, check_name, create_timm_model, no_weights, timm_name
from scalekd_cache.models.weights import find_weights, stored_shapes

RUN_OPTIONS = "config.yaml"
"""A file found in every run folder."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A timm model with its image size and normalization."""

    model: nn.Module
    """The model in eval mode on the CPU."""
    name: str
    """timm model name, or demo_swin."""
    model_args: dict[str, Any]
    """Arguments to `timm.create_model`."""
    image_size: int
    """Image size in pixels."""
    mean: tuple[float, float, float]
    """Channel means for pixel values in [0, 1]."""
    std: tuple[float, float, float]
    """Channel standard deviations for pixel values in [0, 1]."""

    def with_random_weights(self, seed: int) -> nn.Module:
        """The same architecture with random weights, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, _ = create_timm_model(timm_name(self.name), self.model_args)
        return model.eval()


def open_backbone(place: str, weights: str | None, *, size: int | None, pretrained: bool, option: str) -> Backbone:
    """Open a backbone.

    Args:
        place: a finished run folder, the folder of an exported or imported student, or a timm model name.
        weights: for a model name, a .safetensors file (None: the file in teachers/, or timm's pretrained weights).
        size: image size in pixels (None: the backbone's default).
        pretrained: for a model name without a weights file, whether to download timm's weights instead of using random
            ones.
        option: the option that set `place`, for error messages.

    Raises:
        UserError: the folder or name does not exist, files are damaged, the weights do not match, or the image size is
            not supported.
    """
    folder = find_export(Path(place))
    if folder is None:
        return _named(place, weights, size, pretrained, option)
    if weights is not None:
        raise UserError(
            "--weights needs a model name: an export folder already contains weights", got=f"{option} {place}"
        )
    description = read_description(folder)
    images = description.pretrained_cfg
    side = size or images.input_size[-1]
    return Backbone(
        model=load_export(folder, side),
        name=description.architecture,
        model_args={"num_classes": description.num_classes, **description.model_args},
        image_size=side,
        mean=images.mean,
        std=images.std,
    )


def find_exported_folder(place: Path) -> Path | None:
    """The folder of an exported or imported student without a run: `place` or its student/. Otherwise, None."""
    if (place / RUN_OPTIONS).exists():
        return None
    found = (folder for folder in (place, place / "student") if (folder / DESCRIPTION).exists())
    return next(found, None)


def find_export(place: Path) -> Path | None:
    """Find an exported student: the folder itself, its student/ if it was imported, or a run's export/.

    Returns:
        The folder, or None if `place` is not a folder.

    Raises:
        UserError: the folder does not contain an exported student.
    """
    if not place.is_dir():
        return None
    is_run = (place / RUN_OPTIONS).exists()
    found = find_exported_folder(place / "export" if is_run else place)
    if found is None:
        raise UserError(
            "this folder does not contain an exported student",
            where=place,
            expected=f"a finished run, or a folder with {DESCRIPTION}",
            fix=f"finish the run, or export its last checkpoint: {shell_command('export', run=place)}"
            if is_run
            else None,
        )
    return found


def _named(name: str, weights: str | None, size: int | None, pretrained: bool, option: str) -> Backbone:
    """Open a timm model by name."""
    if os.sep in name.rstrip("/") and not name.startswith(("hf", "http")):
        what = f"{name} is not a folder" if os.path.lexists(name) else f"the folder {name} does not exist"
        raise UserError(what, where=option, expected="a folder or a timm model name")
    found = find_weights(TeacherConfig(name=name, weights=weights, pretrained=pretrained))
    current = check_name(timm_name(name), option)
    side = size or own_image_size(name)
    if name == DEMO_TEACHER and found.weights is None and pretrained:
        raise UserError("demo_swin has no published weights", where=option, fix="set --weights")
    shapes = stored_shapes(found.weights) if found.weights is not None else None
    required, optional = size_args(name, side)
    classes = teacher_classes(found, current, shapes, 0)
    args = {**required, "num_classes": classes}
    fetch = found.weights is None and pretrained
    try:
        model, used = create_timm_model(current, args, optional, pretrained=fetch)
    except UserError:
        raise
    except Exception as error:  # hub clients raise many kinds of errors; all mean that the weights are not available
        if not fetch:
            raise
        raise no_weights(name, name, error, "or set --weights") from error
    if found.weights is not None and shapes is not None:
        load_from_file(model, found.weights, shapes, classes)
    check_image_size(model.eval(), side, name)
    config: Any = model.pretrained_cfg
    return Backbone(
        model=model,
        name=name,
        model_args=used,
        image_size=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
