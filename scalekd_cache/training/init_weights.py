"""Initializes a student from another run or an imported checkpoint.

In: a folder written by `export` or `import-upstream`. Out: the student and, if the folder has them, the ScaleKD heads,
with their weights loaded. Invariant: weights are loaded strictly; a partial match is an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.convert.timm_export import DESCRIPTION, read_description
from scalekd_cache.errors import UserError
from scalekd_cache.models.weights import load_weights, stored_shapes

STUDENT_FILES = ("student/model.safetensors", "model.safetensors", "export/model.safetensors")
"""Possible paths to the student's weights, relative to an `import-upstream` output folder, an export folder or a run
folder."""
HEADS_FILE = "heads.safetensors"


def load_init_weights(folder: Path | str, student: nn.Module, heads: nn.Module | None) -> list[str]:
    """Load weights into a student and its heads.

    Args:
        folder: an exported student, a run with an export, or a folder written by `import-upstream`.
        student: the plain timm model.
        heads: this run's heads (None: there is no teacher, and a heads file is ignored).

    Returns:
        The loaded files.

    Raises:
        UserError: there are no weights, or they are for a different model, size, number of classes or teacher.
    """
    folder = Path(folder)
    file = next((folder / name for name in STUDENT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(
            f"no initial weights in {folder}",
            expected="a folder with " + ", or ".join(STUDENT_FILES),
            fix="set --init to a finished run, or to a folder written by scalekd export or scalekd import-upstream",
        )
    load_weights(student, str(file), stored_shapes(str(file)))
    loaded = [str(file)]
    if heads is not None and (folder / HEADS_FILE).is_file():
        path = str(folder / HEADS_FILE)
        load_weights(heads, path, _of_heads(heads, stored_shapes(path)))
        loaded.append(path)
    return loaded


def normalization_note(folder: Path | str, student: StudentConfig) -> str | None:
    """A note if the initial weights come from an export whose images were normalized differently."""
    folder = Path(folder)
    file = next((folder / name for name in STUDENT_FILES if (folder / name).is_file()), folder)
    if not (file.parent / DESCRIPTION).is_file():
        return None
    images = read_description(file.parent).pretrained_cfg
    theirs, ours = (tuple(images.mean), tuple(images.std)), (tuple(student.mean), tuple(student.std))
    if all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(sum(theirs, ()), sum(ours, ()), strict=True)):
        return None
    mean, std = (",".join(f"{value:g}" for value in values) for values in theirs)
    return f"the initial weights expect other pixel values; to keep theirs: --student.mean {mean} --student.std {std}"


def _of_heads(heads: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of the projectors that this run trains. An imported checkpoint has all of them; a run whose options
    give a loss the weight 0 does not build its projector."""
    built = {_projector(name) for name in heads.state_dict()}
    return {name: shape for name, shape in shapes.items() if _projector(name) in built}


def _projector(tensor: str) -> str:
    """The projector that a tensor of the heads belongs to, such as s4.frequency."""
    return ".".join(tensor.split(".")[:2])
