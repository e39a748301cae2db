"""Finds weights files, compares them with a model and loads them strictly.

In: teacher options, or a .safetensors path and a timm model. Out: the file's path, or the loaded model.
Invariant: pickles are never opened, loading is all or nothing, and NaN or Inf is an error. Only a teacher's weights may
be converted (`load_converted`).
"""

import contextlib
import dataclasses
import inspect
import os
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.checked_files import check_safetensors
from scalekd_cache.store.durable_files import disk_errors, temp_path_for

Shape = tuple[int, ...]

# timm's resampling of Swin's position biases causes two warnings that users cannot act on.
for _text in (r"torch\.searchsorted\(\): input value tensor is non-contiguous", "Using a non-tuple sequence for multi"):
    warnings.filterwarnings("ignore", _text, UserWarning, r"timm\.layers\.interpolate")


def save_weights(model: nn.Module, file: Path) -> None:
    """Write a model's weights as safetensors, atomically.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """
    temporary, weights = temp_path_for(file), separate(model.state_dict())
    with disk_errors(file, sum(value.nbytes for value in weights.values())):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, str(temporary))
            os.replace(temporary, file)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def weights_file(folder: str | Path, name: str) -> Path:
    """Path to a teacher's weights file in a weights folder (`teacher.weights_dir`, `scalekd fetch`)."""
    return Path(folder) / f"{name}.safetensors"


def find_weights(config: TeacherConfig) -> TeacherConfig:
    """Set `weights` to the file in `weights_dir` if that file exists and `pretrained` is true."""
    file = weights_file(config.weights_dir, config.name)
    if config.weights or not config.pretrained or not file.exists():
        return config
    return dataclasses.replace(config, weights=str(file))


def weights_available(config: TeacherConfig) -> bool:
    """Whether the teacher can be loaded without network access: its file exists, or its weights are random."""
    return Path(config.weights).is_file() if config.weights else not config.pretrained


def stored_shapes(path: str) -> dict[str, Shape]:
    """Tensor names and shapes from the header of a .safetensors file."""
    if Path(path).suffix != ".safetensors":
        raise UserError(
            "weights must be in a .safetensors file, because other checkpoints are pickles, which can run code",
            got=path,
            expected="a .safetensors file with the timm model's state dict",
            fix="convert a file you trust: safetensors.torch.save_file(state_dict, 'weights.safetensors')",
        )
    try:
        check_safetensors(path, "the weights file")
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights: {error}",
            where=path,
            expected="a .safetensors file (renaming a pickle is not enough)",
            fix="use a readable .safetensors file",
        ) from error


def check_tensors(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str | Path) -> None:
    """Raise `UserError` unless a file matches a model exactly. The message lists missing, extra and misshapen
    tensors."""
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    if not (missing or surplus or wrong):
        return
    lines = [
        f"{len(names)} {what}: {', '.join(names[:8])}"
        for what, names in (("missing", missing), ("unexpected", surplus))
        if names
    ]
    lines += [f"{name} is {found[name]}, but the model has {wanted[name]}" for name in wrong[:8]]
    raise UserError(
        "the weights in this file do not match the model",
        got="; ".join(lines),
        expected=f"exactly the model's {counted(len(wanted), 'tensor')}",
        where=where,
        fix=f"remove the prefix {prefix} from the tensor names in the file"
        if (prefix := _common_prefix(set(surplus), missing))
        else "use the model name, image size and number of classes that the weights were trained with",
    )


def _common_prefix(surplus: Collection[str], missing: Sequence[str]) -> str:
    """The prefix that a wrapped or larger model (`module.`) added to most of the missing names; '' if there is none."""
    starts = {name.removesuffix(last) for last in missing[:8] for name in surplus if name.endswith(f".{last}")}
    number, prefix = max(
        ((sum(start + name in surplus for name in missing), start) for start in sorted(starts, key=len)[:8]),
        default=(0, ""),
    )
    return prefix if 2 * number > len(missing) else ""


def load_weights(model: nn.Module, path: str, shapes: Mapping[str, Shape]) -> None:
    """Load a .safetensors state dict strictly. `shapes` is its header (`stored_shapes`)."""
    check_fit(model, path, shapes)
    _load(model, read_tensors(path, shapes), path)


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors rejects. Some models (`coat`) share layers."""
    seen, found = set[int](), {}
    for name, value in state.items():
        place = value.untyped_storage().data_ptr()
        found[name] = value.clone() if place in seen else value.contiguous()
        seen.add(place)
    return found


def check_fit(model: nn.Module, path: str, shapes: Mapping[str, Shape]) -> None:
    """Raise `UserError` unless the file has exactly the model's tensors. The model can be on the meta device."""
    check_tensors(shapes, _shapes(model.state_dict()), path)


def load_converted(model: nn.Module, path: str, shapes: Mapping[str, Shape], without: tuple[str, ...] = ()) -> None:
    """Load a .safetensors state dict, converting it with timm if it does not match the model.

    timm converts pretrained weights to other image sizes by resampling position embeddings. It also converts tensor
    names in original checkpoints (DINOv2, DINOv3, CLIP, SAM).

    Args:
        model: A timm model.
        path: The file.
        shapes: Its header (`stored_shapes`), without the tensors to omit.
        without: Prefixes of converted tensors to omit.

    Raises:
        UserError: the tensors do not match the model even after conversion, or contain NaN or Inf.
    """
    wanted = _shapes(model.state_dict())
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)
    if convert is not None and shapes != wanted:
        try:
            with contextlib.redirect_stdout(None):  # some of timm's conversion functions print
                state = convert(read_tensors(path, shapes), model)
            state = {name: value for name, value in state.items() if not name.startswith(without)}
            converted = _shapes(state)
        except Exception:  # conversion assumes certain names and shapes; other files are reported below
            converted = {}
        if converted == wanted:
            return _load(model, state, path)
    return load_weights(model, path, shapes)


def read_tensors(path: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors from a .safetensors file."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in names}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _load(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError("the weights contain NaN or Inf", got=", ".join(broken[:8]), where=path)
    model.load_state_dict(state)
