"""A trained student in other forms than timm's folder: one file each, loaded again and compared before it is kept.

In: a student in eval mode on the CPU. Out: a file. Invariant: the file appears whole or not at all, and what was loaded
from it has given the student's logits, to within the tolerance of its form, before this returns.
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
from scalekd_cache.errors import UserError, unknown_name
from scalekd_cache.models.student import Student
from scalekd_cache.store.durable_files import explained, fsync_path, remove_stale, temp_beside
from scalekd_cache.versions import import_optional

SUFFIXES = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "torchvision": "-torchvision.safetensors",
    "mmpretrain": "-mmpretrain.safetensors",
}
"""What the file's name ends in, by form."""
FORMATS = ("timm", *SUFFIXES)
RELATIVE_TOLERANCE = {"safetensors": 1e-6, "torch-export": 1e-5, "torchvision": 1e-4, "onnx": 1e-3}
"""Largest difference of a logit over the largest logit: the same module, the same operators, other implementations."""


def check_format(name: str) -> str:
    """The name itself; `UserError` with the nearest ones when there is no such form, or what it needs is missing."""
    if name not in FORMATS:
        raise unknown_name("form of export", name, FORMATS, "FORMAT=")
    if name == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            import_optional(module, f"an export to ONNX needs {module}", "export")
    return name


def export_file(student: Student, form: str, file: Path, *, image_size: int, facts: Mapping[str, str]) -> float | None:
    """Write a student in one of the forms of `SUFFIXES`, load it back and compare.

    Args:
        student: in eval mode, on the CPU.
        form: which.
        file: where.
        image_size: side of its images, pixels.
        facts: texts that go into the file where the form has a place for them.

    Returns:
        The largest difference of a logit; None where the codebase is not installed, so names alone were checked.

    Raises:
        UserError: what the form needs is missing, the architecture does not fit it, or the logits differ.
    """
    check_format(form)
    model = student.model.eval()
    file = file.resolve()
    folder = temp_beside(file)
    temporary = folder / file.name
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with explained(file.parent, sum(value.nbytes for value in model.state_dict().values())):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(file.parent)
            folder.mkdir()
            load = _write(student, form, temporary, images, facts)
            difference = None if load is None else _difference(model, load, images, form, file)
            temporary.chmod(0o644)  # safetensors writes files that only their owner reads
            fsync_path(temporary)
            os.replace(temporary, file)
            fsync_path(file.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return difference


@torch.no_grad()
def _difference(model: nn.Module, answer: Callable[[Tensor], Tensor], images: Tensor, form: str, file: Path) -> float:
    """The largest over batches of two sizes: the batch must not have become a constant."""
    largest = 0.0
    for batch in (images, torch.cat([images, images.flip(3), images[:1]])):
        expected, got = model(batch), answer(batch)
        difference = float((got - expected).abs().max()) if got.shape == expected.shape else float("inf")
        limit = RELATIVE_TOLERANCE[form] * max(1.0, float(expected.abs().max()))
        if not difference <= limit:
            raise UserError(
                "the exported model does not give the student's logits",
                got=f"difference {difference:.3g}",
                expected=f"at most {limit:.3g}",
                where=file,
                fix="report this with the student's name and the versions of torch and timm",
            )
        largest = max(largest, difference)
    return largest


def _write(
    student: Student, form: str, file: Path, images: Tensor, facts: Mapping[str, str]
) -> Callable[[Tensor], Tensor] | None:
    """Write the file; a function that answers as what was loaded from it, None where that cannot be had here."""
    model: nn.Module = student.model
    metadata = {**facts, "format": "pt"}
    if form == "onnx":
        return _write_onnx(model, file, images)
    if form == "torch-export":
        return _write_program(model, file, images)
    if form in CODEBASES:
        save_file(transfer_state(model, form, images.shape[-1]), str(file), metadata)
        return _torchvision(model, file, images.shape[-1]) if form == "torchvision" else None
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(file), metadata)
    plain: nn.Module = timm.create_model(student.model_name, **student.model_args).eval()
    plain.load_state_dict(load_file(file))
    return plain


def _torchvision(model: nn.Module, file: Path, image_size: int) -> nn.Module:
    twin = torchvision_twin(model, image_size)
    try:
        twin.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise UserError(
            "torchvision's module of this architecture has other tensors",
            got=str(error).splitlines()[1].strip() if "\n" in str(error) else error,
            where=type(model).__name__,
            fix="take FORMAT=timm; variants (deep stems, other windows at small images) are timm's own",
        ) from error
    plain: nn.Module = twin.eval()
    return plain


def _write_program(model: nn.Module, file: Path, images: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.export's program, free of Python code of ours."""
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
