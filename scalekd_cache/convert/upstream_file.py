"""Reads a checkpoint from upstream's distiller, keeping upstream's names.

In: a .pth file written by mmengine. Out: its tensors, split into student, projectors and unused parts.
Invariant: the file is opened with `weights_only`. Objects of unknown classes become inert placeholders. A file that
would call a function raises an error.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import check_regular

HEADS = "distill_losses."
STUDENT = "student."
LEFT_OUT = ("teacher.", "linear.", "data_preprocessor.")
"""Unused parts of a checkpoint. `linear` is a layer that upstream's forward pass never calls."""
NAMES_SHOWN = 8
MOST_CLASSES = 64
"""Maximum number of unknown classes in a file. mmengine's checkpoints have about ten."""
INERT_CALLS = frozenset(
    ["builtins.getattr", "numpy.dtype", "copyreg._reconstructor"]
    + [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")]
)
"""Functions that pickles call to build data, such as arrays and scalars. None of them is run here."""


def shown_names(names: list[str]) -> str:
    """The first names in a list, and the number of others."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors under upstream's names.

    Accepts {"state_dict": ...} or a plain state dict, with or without a parallel wrapper's `module.` prefix. If the run
    had a moving average, it is used, because mmengine stores it in "state_dict" and the plain weights in
    "ema_state_dict".

    Raises:
        UserError: the file is missing or damaged, or would call functions.
    """
    check_regular(path, "the checkpoint")  # torch.load would wait for a FIFO
    found = _load_inert(path)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(
            "this checkpoint has no state dict",
            got=", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__,
            expected="{'state_dict': {name: tensor, ...}}, or {name: tensor, ...}",
            where=path,
        )
    wrapped = len(state) > 0 and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


class _Refusing(type):
    """Metaclass for classes that cannot be called. pickle's `NEWOBJ` can still create objects without a call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise pickle.UnpicklingError(f"Trying to call {cls.__name__}")


class _Inert(metaclass=_Refusing):
    """Placeholder for an object of an unknown class, which accepts any state and stores nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _inert(path: str) -> Callable[..., Any]:
    """A replacement for a class or function: an inert class, or a function that returns an inert object."""
    return (lambda *args: _Inert.__new__(_Inert)) if path in INERT_CALLS else _Refusing(path, (_Inert,), {})


def _load_inert(path: Path) -> Any:
    """Open a file with `weights_only`. Objects of other classes, such as mmengine's logs, become `_Inert`."""
    own = f"{__name__}._Inert"
    stand_ins: dict[str, tuple[Callable[..., Any], str]] = {own: (_Inert, own)}
    while True:
        try:
            with torch.serialization.safe_globals(list(stand_ins.values())):
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(
                "cannot read the checkpoint", got=error, where=path, fix="set --ckpt to a readable file"
            ) from error
        except Exception as error:  # damaged and malicious pickles fail in many ways
            unknown = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
            name = unknown[1] if unknown else ""
            name = f"builtins.{name}" if unknown and "." not in name else name
            if unknown and name not in stand_ins and len(stand_ins) < MOST_CLASSES:
                stand_ins[name] = (_inert(name), name)
                continue
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    called = re.search(r"(?:GLOBAL:?|Trying to call(?: reduce for unrecognized function)?) ([^\s]+)", str(error))
    if called is None:
        return UserError(
            "this file is damaged or was not written by torch.save",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            where=path,
            fix="download it again and check its size and checksum",
        )
    return UserError(
        "cannot load this checkpoint with weights_only=True, because it calls functions that can run arbitrary code",
        got=called[1],
        expected="tensors, plain containers and data objects such as mmengine's logs (which are skipped)",
        where=path,
        fix="if you trust the file, save its state dict separately: torch.save({'state_dict': ...}, 'new.pth')",
    )


class Parts(NamedTuple):
    """The parts of a checkpoint."""

    student: dict[str, Tensor]
    """`backbone.*` and `head.*`, without the prefix."""
    prefix: str
    """The removed prefix, "student." or an empty string."""
    heads: dict[str, Tensor]
    """`loss_fmd_s3.*` and `loss_fmd_s4.*`, without `distill_losses.`."""
    left_out: list[str]
    unknown: list[str]


def split_parts(state: Mapping[str, Tensor], path: Path) -> Parts:
    """Split a checkpoint's tensors into parts.

    A file with `backbone.*` but without `student.` is a plain student written by upstream's transfer script.
    """
    prefix = STUDENT if any(name.startswith(STUDENT) for name in state) else ""
    student: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    left_out: list[str] = []
    unknown: list[str] = []
    for name, value in state.items():
        if name.startswith((prefix + "backbone.", prefix + "head.")):
            student[name.removeprefix(prefix)] = value
        elif name.startswith(HEADS):
            heads[name.removeprefix(HEADS)] = value
        else:
            (left_out if name.startswith(LEFT_OUT) else unknown).append(name)
    if not student:
        raise UserError(
            "this checkpoint has no student weights",
            got=shown_names(sorted({name.partition(".")[0] for name in state})) or "nothing",
            expected="tensor names that begin with student.backbone. or backbone.",
            where=path,
            fix="use a checkpoint from upstream's distiller",
        )
    return Parts(student, prefix, heads, left_out, unknown)
