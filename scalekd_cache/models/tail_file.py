"""The tail's file: all tensors of a `Tail` and the `TeacherSpec` they belong to, as safetensors.

In: a tail, or a path and a specification. Out: a file, or the tail rebuilt without its teacher.
Invariant: what `load_tail` gives equals what `write_tail` got, bit for bit; equal tails give equal files; a file of
another teacher is never used.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from scalekd_cache.errors import UserError
from scalekd_cache.models.tail import Tail, build_tail, timm_name
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.models.timm_models import check_name, create_timm_model
from scalekd_cache.models.weights import check_tensors
from scalekd_cache.store.checked_files import check_regular
from scalekd_cache.store.durable_files import write_atomically


def tail_tensors(tail: Tail) -> dict[str, Tensor]:
    """Parameters and all buffers by name, those included that a state dict leaves out (position indices, masks)."""
    return dict(tail.named_parameters()) | dict(tail.named_buffers())


def write_tail(tail: Tail, spec: TeacherSpec, path: Path) -> str:
    """Write a tail (safetensors, via a temporary file in the same folder); returns the file's sha256 (hex)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_atomically(path, tail_bytes(tail, spec)).sha256


def tail_bytes(tail: Tail, spec: TeacherSpec) -> bytes:
    """The file of a tail; equal tails give equal bytes."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tail_tensors(tail).items()}
    # one metadata key only: safetensors does not fix the order of several, and equal tails give equal files
    data: bytes = save(tensors, metadata={"spec": json.dumps(spec.to_json(), sort_keys=True)})
    return data


def load_tail(path: str | Path, spec: TeacherSpec) -> Tail:
    """Read a tail without the rest of its teacher in memory.

    The architecture is built by timm on the meta device, which allocates nothing; the tail's tensors, all buffers
    included, come from the file.

    Args:
        path: File of `teacher.save_tail`.
        spec: The teacher it must belong to.

    Returns:
        The tail, on the CPU.

    Raises:
        UserError: no such file, damaged, of another teacher, or with missing, surplus or misshapen tensors.
    """
    name = check_name(timm_name(spec.name), "teacher.name")
    check_regular(path, "the tail's file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_spec((file.metadata() or {}).get("spec"), spec, path)  # before anything is built by it
            with torch.device("meta"):
                model, _ = create_timm_model(name, spec.model_args)
            tail = build_tail(model, spec.name, spec.tail_shape, spec.feature_shape)
            wanted = tail_tensors(tail)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_tensors(shapes, {name: tuple(value.shape) for name, value in wanted.items()}, path)
            found = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the tail: {error}", where=path, fix="restore the file from the cache") from error
    for name, value in found.items():
        owner = tail.get_submodule(name.rpartition(".")[0])
        key = name.rpartition(".")[2]
        if value.dtype != wanted[name].dtype:
            raise UserError(f"tensor {name} has another type", got=value.dtype, expected=wanted[name].dtype, where=path)
        if key in owner._parameters:
            owner._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            owner._buffers[key] = value
    return tail


def _check_spec(text: str | None, spec: TeacherSpec, path: str | Path) -> None:
    try:
        found = json.loads(text or "null")
    except ValueError:
        found = None
    expected = spec.to_json()
    if found != expected:
        names = [key for key in expected if not isinstance(found, dict) or found.get(key) != expected[key]]
        raise UserError(
            "this tail is not the tail of the cache's teacher",
            got=f"other values for {', '.join(names) or 'unknown fields'}",
            expected=f"teacher {spec.name}, weights {spec.weights_sha256[:16]}",
            where=path,
            fix="use the tail.safetensors that was written with this cache",
        )
