"""What a checkpoint of upstream's distiller holds, by upstream's own names.

In: a .pth file as mmengine writes it. Out: its tensors, and which of them are student, projectors, or not wanted.
Invariant: the file is opened with weights only: no object in it runs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalekd_cache.errors import UserError

HEADS = "distill_losses."
STUDENT = "student."
LEFT_OUT = ("teacher.", "linear.", "data_preprocessor.")
"""Parts of a checkpoint that are not wanted; `linear` is a layer that upstream's forward pass never calls."""
NAMES_SHOWN = 8


def shown_names(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by upstream's names.

    Takes {"state_dict": ...} or the state dict itself, with or without the `module.` of a parallel wrapper. mmengine
    puts a moving average, where the run had one, into "state_dict" itself and the plain weights into
    "ema_state_dict": the average is what is taken.

    Raises:
        UserError: a file that is not there or damaged, or that holds more than tensors and plain containers.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError("cannot read the checkpoint", got=error, where=path, fix="give CKPT a readable file") from error
    except Exception as error:  # a damaged or hostile pickle fails in many ways
        refused = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        if refused is None:
            raise UserError(
                "this file is damaged, or torch.save did not write it",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                where=path,
                fix="fetch it again, and compare its size and checksum",
            ) from error
        copy = "c = torch.load('old.pth', map_location='cpu', weights_only=False); "
        copy += "torch.save({'state_dict': c['state_dict']}, 'new.pth')"
        raise UserError(
            "this checkpoint cannot be opened with weights only, and objects in a checkpoint can run code",
            got=f"the object {refused[1]}",
            expected="tensors and plain containers, such as {'state_dict': ...}",
            where=path,
            fix=f"where you trust it and mmengine is installed (its logs are such objects), copy the weights: {copy}",
        ) from error
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise UserError(
            "this checkpoint holds no state dict",
            got=", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__,
            expected="{'state_dict': {name: tensor, ...}}, or {name: tensor, ...}",
            where=path,
        )
    wrapped = len(state) > 0 and all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: value for name, value in state.items()}


class Parts(NamedTuple):
    """The parts of a checkpoint."""

    student: dict[str, Tensor]
    """`backbone.*` and `head.*`, without the prefix."""
    prefix: str
    """What stood before them: "student.", or nothing."""
    heads: dict[str, Tensor]
    """`loss_fmd_s3.*` and `loss_fmd_s4.*`, without `distill_losses.`."""
    left_out: list[str]
    unknown: list[str]


def split_parts(state: Mapping[str, Tensor], path: Path) -> Parts:
    """Sort the tensors of a checkpoint.

    A file without `student.` that has `backbone.*` is a student on its own, as upstream's transfer script writes it.
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
            "this checkpoint holds no student",
            got=shown_names(sorted({name.partition(".")[0] for name in state})) or "nothing",
            expected="names that begin with student.backbone., or backbone.",
            where=path,
            fix="give a checkpoint of upstream's distiller",
        )
    return Parts(student, prefix, heads, left_out, unknown)
