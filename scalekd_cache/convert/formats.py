"""Export formats other than timm's folder, each of which produces a single file.

In: a student in eval mode on the CPU. Out: a file. Invariant: the file is written atomically, and only after the model
loaded from it has reproduced the student's logits within the format's tolerance.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scalekd_cache.convert.names_torchvision_mmpretrain import CODEBASES, torchvision_twin, transfer_state
from scalekd_cache.errors import UserError, import_optional, unknown_name
from scalekd_cache.models.student import Student
from scalekd_cache.models.weights import separate
from scalekd_cache.store.durable_files import disk_errors, fsync_path, remove_stale, temp_path_for

SUFFIXES = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "torchvision": "-torchvision.safetensors",
    "mmpretrain": "-mmpretrain.safetensors",
}
"""Each format's file name suffix."""
FORMATS = ("timm", *SUFFIXES)
RELATIVE_TOLERANCE = {"safetensors": 1e-6, "torch-export": 1e-5, "torchvision": 1e-4, "onnx": 1e-3}
"""Maximum logit difference for each format, relative to the largest logit."""


def check_format(name: str) -> str:
    """Return the name. Raises `UserError` if the format is unknown (with suggestions) or packages are missing."""
    if name not in FORMATS:
        raise unknown_name("export format", name, FORMATS, "--format")
    if name == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            import_optional(module, f"exporting to ONNX needs {module}", "export")
    return name


def export_file(student: Student, form: str, file: Path, *, image_size: int, facts: Mapping[str, str]) -> float | None:
    """Write a student in one of the formats in `SUFFIXES`, reload it and compare the logits.

    Args:
        student: the student, in eval mode on the CPU.
        form: the format name.
        file: output file.
        image_size: the student's image size in pixels.
        facts: metadata to write if the format supports it.

    Returns:
        The largest logit difference, or None for mmpretrain, which is not used to reload the file.

    Raises:
        UserError: a required package is missing, the architecture is not supported, or the logits differ.
    """
    check_format(form)
    model = student.model.eval()
    file = Path(os.path.realpath(file))
    folder = temp_path_for(file)
    temporary = folder / file.name
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with disk_errors(file.parent, sum(value.nbytes for value in model.state_dict().values())):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(file.parent)
            folder.mkdir()
            load = _write(student, form, temporary, images, facts)
            difference = None if load is None else _difference(model, load, images, form, file)
            temporary.chmod(0o644)  # safetensors creates files readable only by the owner
            fsync_path(temporary)
            os.replace(temporary, file)
            fsync_path(file.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return difference


@torch.no_grad()
def _difference(model: nn.Module, predict: Callable[[Tensor], Tensor], images: Tensor, form: str, file: Path) -> float:
    """The largest logit difference for two batch sizes, because the exported batch dimension must be dynamic."""
    largest = 0.0
    for batch in (images, torch.cat([images, images.flip(3), images[:1]])):
        expected, got = model(batch), predict(batch)
        difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        limit = RELATIVE_TOLERANCE[form] * max(1.0, float(expected.abs().max()))
        if not difference <= limit:
            raise UserError(
                "the exported model's logits differ from the student's",
                got=f"difference {difference:.3g}",
                expected=f"at most {limit:.3g}",
                where=file,
                fix="report this issue with the student's name and your torch and timm versions",
            )
        largest = max(largest, difference)
    return largest


def _write(
    student: Student, form: str, file: Path, images: Tensor, facts: Mapping[str, str]
) -> Callable[[Tensor], Tensor] | None:
    """Write the file and return the reloaded model's predict function, or None for mmpretrain."""
    model: nn.Module = student.model
    metadata = {**facts, "format": "pt"}
    if form == "onnx":
        return _write_onnx(model, file, images)
    if form == "torch-export":
        return _write_program(model, file, images)
    if form in CODEBASES:
        save_file(transfer_state(model, form, images.shape[-1]), str(file), metadata)
        return _torchvision(model, file, images.shape[-1]) if form == "torchvision" else None
    save_file(separate(model.state_dict()), str(file), metadata)
    plain: nn.Module = timm.create_model(student.model_name, **student.model_args).eval()
    plain.load_state_dict(load_file(file))
    return plain


def _torchvision(model: nn.Module, file: Path, image_size: int) -> nn.Module:
    twin = torchvision_twin(model, image_size)
    try:
        twin.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise UserError(
            "the student's tensors differ from those of torchvision's model",
            got=str(error).splitlines()[1].strip() if "\n" in str(error) else error,
            where=type(model).__name__,
            fix="use --format timm; some variants (deep stems, window sizes for small images) exist only in timm",
        ) from error
    plain: nn.Module = twin.eval()
    return plain


def _write_program(model: nn.Module, file: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Write a torch.export program, which needs no Python code from this package."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
    loaded: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return loaded


def _write_onnx(model: nn.Module, file: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
    )
    assert program is not None
    program.save(str(file), external_data=False)
    onnx.checker.check_model(str(file))
    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])
