"""Exports a trained student as a folder that plain timm can load.

In: a student and its consolidated state. Out: a folder with model.safetensors and config.json.
Invariant: the folder is complete or absent, and `timm.create_model("local-dir:DIR", pretrained=True)` reproduces the
student's logits.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import timm
import torch
from pydantic import Field
from timm.models import save_for_hf
from torch import Tensor, nn

from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.models.teacher_spec import Spread, Triple
from scalekd_cache.models.timm_models import check_name, create_timm_model
from scalekd_cache.models.weights import check_fit, load_weights, separate, stored_shapes
from scalekd_cache.store.checked_files import checked, read_json
from scalekd_cache.store.durable_files import disk_errors, fsync_path, remove_stale, temp_path_for
from scalekd_cache.store.plan import check_output_folder
from scalekd_cache.views.view import EVAL_CROP

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, DESCRIPTION, CARD)
"""All files in an export."""
ImageSide = Annotated[int, Field(ge=8, le=4096)]
LOGIT_TOLERANCE = 1e-5
"""Maximum logit difference after reloading, relative to the largest logit."""


class TimmModel(Protocol):
    """A timm model with the arguments that build it, such as a `Student`."""

    @property
    def model(self) -> nn.Module:
        """The module."""

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments to `timm.create_model`."""


class InputStatistics(Protocol):
    """A model's normalization, as in `StudentConfig`."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Channel means for pixel values in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Channel standard deviations for pixel values in [0, 1]."""


def eval_transform(config: InputStatistics, image_size: int) -> dict[str, Any]:
    """The validation transform (`views.view.eval_view`, then normalization) in timm's format."""
    return {
        "input_size": (3, image_size, image_size),
        "interpolation": "bicubic",
        "mean": config.mean,
        "std": config.std,
        "crop_pct": EVAL_CROP,
        "crop_mode": "center",  # some models have a different default
    }


def check_export_place(folder: Path) -> None:
    """Check that a folder to be replaced contains nothing but an earlier export.

    Raises:
        UserError: the path is a file or a folder with other files.
    """
    check_output_folder(folder, "--out")
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError("the export path is a file", where=folder, expected="a folder", fix="correct --out")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES)
    if others:
        raise UserError(
            "the export folder contains other files, which the export would delete",
            got=", ".join(others[:8]),
            expected=f"an empty folder, or one with only {', '.join(FILES)}",
            where=folder,
            fix="move them, or choose a different folder (--out)",
        )


def check_not_in_run(folder: Path, run: Path | None = None) -> None:
    """Raise `UserError` if an export to this folder would replace the export of any run other than `run`."""
    parent = folder.absolute().parent
    if (parent / "config.yaml").exists() and (run is None or os.path.realpath(parent) != os.path.realpath(run)):
        what = "--out is inside a run folder, where the export would replace that run's own export"
        raise UserError(what, where=folder, fix="choose a different folder (--out)")


def export_student(
    student: TimmModel,
    config: InputStatistics,
    folder: Path,
    *,
    image_size: int,
    class_names: Sequence[str],
    card: str | None = None,
) -> float:
    """Write the student for timm, reload it and compare its logits. The folder is created atomically.

    Args:
        student: the student.
        config: the student's normalization.
        folder: output folder. An existing export is replaced.
        image_size: the student's image size in pixels.
        class_names: class names, in the order of the logits.
        card: the model card's text (None: no model card).

    Returns:
        The largest difference between the student's and the reloaded model's logits.

    Raises:
        UserError: the reloaded model's logits differ, the folder contains other files, or the disk is full. An existing
            export is then left unchanged.
    """
    check_export_place(folder)
    folder = Path(os.path.realpath(folder))
    temporary, old = temp_path_for(folder), temp_path_for(folder)
    needed = sum(value.nbytes for value in student.model.state_dict().values())
    with disk_errors(folder.parent, needed):
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


SOURCE_FIELDS = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
"""Fields of timm's `pretrained_cfg` that describe timm's own weights for an architecture, not those of an export.
timm itself drops the places of the weights."""


def without_source(model: nn.Module) -> dict[str, Any]:
    """The model's `pretrained_cfg` without `SOURCE_FIELDS`."""
    known: Any = model.pretrained_cfg
    return {name: value for name, value in known.items() if name not in SOURCE_FIELDS}


class _Separate:
    """A model for `save_for_hf` whose tensors share no memory, as safetensors requires, and whose configuration does
    not describe timm's weights."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.pretrained_cfg = without_source(model)

    def state_dict(self) -> dict[str, Tensor]:
        return separate(self._model.state_dict())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _write(
    student: TimmModel,
    config: InputStatistics,
    folder: Path,
    image_size: int,
    class_names: Sequence[str],
    card: str | None,
) -> None:
    """Write and fsync all files in an export."""
    save_for_hf(
        _Separate(student.model.eval()),
        str(folder),
        model_config={"label_names": list(class_names)},
        model_args=student.model_args,
        safe_serialization=True,
        data_config=eval_transform(config, image_size),
    )
    (folder / WEIGHTS).chmod(0o644)  # safetensors creates files readable only by the owner
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    for file in folder.iterdir():
        fsync_path(file)
    fsync_path(folder)


@torch.no_grad()
def _compare(student: TimmModel, folder: Path, image_size: int) -> float:
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    model = student.model.eval()
    device = next(model.parameters()).device
    expected: Tensor = model(images.to(device)).cpu().float()
    difference = float((reloaded(images).float() - expected).abs().max())
    limit = LOGIT_TOLERANCE * max(1.0, float(expected.abs().max()))
    if device.type == "cpu" and difference > limit:
        raise UserError(
            "the exported model's logits differ from the student's",
            got=f"difference {difference:.3g}",
            expected=f"at most {limit:.3g}",
            where=folder,
            fix="report this issue with the student's name and your timm version",
        )
    return difference


@dataclass(frozen=True)
class ImageConfig:
    """The model input section of timm's `pretrained_cfg`."""

    input_size: tuple[Literal[3], ImageSide, ImageSide]
    mean: Triple
    std: tuple[Spread, Spread, Spread]


@dataclass(frozen=True)
class ExportDescription:
    """The fields that are read from an export's config.json."""

    architecture: str
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)]
    pretrained_cfg: ImageConfig
    model_args: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Reject contradictory values."""
        counts = {self.num_classes, self.model_args.get("num_classes", self.num_classes)}
        counts |= {len(self.label_names)} if self.label_names else set()
        if len(counts) > 1:
            raise UserError("num_classes, model_args and label_names specify different numbers of classes")
        if self.pretrained_cfg.input_size[1] != self.pretrained_cfg.input_size[2]:
            raise UserError("input_size is not square")


def read_description(folder: Path) -> ExportDescription:
    """Read and check an exported student's description. Raises `UserError` if it is missing or damaged."""
    file, what = folder / DESCRIPTION, "an exported student's description"
    fields, _ = read_json(file, what)
    images = fields.get("pretrained_cfg")
    if isinstance(images, dict):
        fields["pretrained_cfg"] = {key: images[key] for key in ImageConfig.__annotations__ if key in images}
    known = {key: fields[key] for key in ExportDescription.__annotations__ if key in fields}
    return checked(json.dumps(known), ExportDescription, what, file)


def load_export(folder: Path, image_size: int) -> nn.Module:
    """Load an exported student in eval mode, like `timm.create_model("local-dir:...", pretrained=True)`.

    Unlike timm, it never falls back to a pickle if model.safetensors is missing.

    Args:
        folder: the export.
        image_size: the model's image size in pixels, which is checked with a forward pass.

    Raises:
        UserError: a file is missing or damaged, or the files do not match (`scalekd export` rewrites them); or the
            model does not accept images of this size.
    """
    file = folder / WEIGHTS
    try:
        shapes = stored_shapes(str(file))
        description = read_description(folder)
        _check_depth(description.model_args, len(shapes), folder / DESCRIPTION)
        name = check_name(description.architecture, str(folder / DESCRIPTION))
        args = {"num_classes": description.num_classes, **description.model_args}
        with torch.device("meta"):  # allocate nothing until the sizes have been compared with the file
            check_fit(_build(name, args, folder / DESCRIPTION), str(file), shapes)
        model = _build(name, args, folder / DESCRIPTION)
        load_weights(model, str(file), shapes)
        own = description.pretrained_cfg.input_size[-1]
        if image_size == own:
            check_image_size(model.eval(), image_size, folder)
    except UserError as error:
        in_run = (folder.parent / "config.yaml").exists()
        rewrite = shell_command("export", run=folder.parent)
        fix = f"rewrite the export: {rewrite}" if in_run else "export or import it again"
        reason = str(error).partition("\n  what to do: ")[0]  # its own fix does not apply to an export
        raise UserError(f"cannot load the exported student: {reason}", fix=fix) from error
    if image_size != own:
        try:
            check_image_size(model.eval(), image_size, folder)
        except UserError as error:
            raise UserError(str(error), fix=f"use images of {own} x {own} pixels, the size of this export") from error
    return model


def _build(name: str, args: dict[str, Any], where: Path) -> nn.Module:
    """Build the model from a description with untrusted arguments."""
    try:
        return create_timm_model(name, args)[0]
    except UserError:
        raise
    except Exception as error:  # timm's constructors raise many kinds of errors
        raise UserError(f"timm cannot build {name} with these arguments", got=error, where=where) from error


@torch.no_grad()
def check_image_size(model: nn.Module, image_size: int, where: str | Path) -> None:
    """Run the model on an image of this size. Raises `UserError` if the model does not accept it."""
    try:
        model(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        got = f"{image_size} x {image_size} pixels: {error}"
        raise UserError("the model does not accept images of this size", got=got, where=where) from error


def _check_depth(args: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Before building the model, check that it has no more blocks than the weights file has tensors."""
    for name, value in args.items():
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, int)]
        if any(word in name for word in ("depth", "layer", "block")) and sum(numbers) > tensors:
            raise UserError(
                "the model has more blocks than the weights file has tensors",
                got=f"{name}={value}"[:80],
                expected=f"at most {tensors}",
                where=where,
            )
