"""Checkpoints of a run: whole tensors in safetensors, committed as shards are.

In: tensors by file and a few facts. Out: `checkpoints/step-00000123/`, and the newest one that is whole.
Invariant: a checkpoint's folder appears under its name in one rename, after everything in it was fsynced, and is used
only when its files are, by sha256, what was written. A kill while saving leaves the one before. No pickles.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from scalekd_cache.errors import UserError
from scalekd_cache.store import remove_stale
from scalekd_cache.store.checked_files import read_json
from scalekd_cache.store.files import (
    canonical_json,
    fact_of,
    fsync_path,
    raise_explained,
    temp_beside,
    write_new,
)

FACTS_FILE = "checkpoint.json"
STUDENT, MODEL, OPTIMIZER, AVERAGE = (f"{name}.safetensors" for name in ("student", "model", "optimizer", "average"))
"""Files of a checkpoint: the student as it is exported, all weights and statistics, the optimizer's state, and the
moving average where there is one."""


class Checkpoint(NamedTuple):
    """A checkpoint that was found whole."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.folder / name)
        return tensors


def commit_checkpoint(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint and drop the oldest beyond `keep`.

    Args:
        folder: the run's folder of checkpoints.
        step: optimizer steps done.
        files: tensors of each file.
        facts: anything JSON holds; read again as `Checkpoint.facts`.
        keep: checkpoints that stay, this one among them.

    Raises:
        UserError: the disk is full; the older checkpoints are still there then.
    """
    final = folder / f"step-{step:08d}"
    temporary = temp_beside(final)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    try:
        temporary.mkdir()
        written = {}
        for name, tensors in files.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, str(temporary / name))
            fsync_path(temporary / name)
            written[name] = fact_of(temporary / name)._asdict()
        whole = {**facts, "step": step, "files": written}
        write_new(temporary / FACTS_FILE, canonical_json({**whole, "sha256": _digest(whole)}).encode())
        fsync_path(temporary)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(temporary, final)
        fsync_path(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(value.nbytes for tensors in files.values() for value in tensors.values())
        raise_explained(error, folder, needed)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are what was written, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _checked(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _checked(path: Path) -> Checkpoint:
    facts, _ = read_json(path / FACTS_FILE, "a checkpoint's description")
    files = facts.get("files")
    whole = facts.pop("sha256", None) == _digest(facts)
    if not whole or not isinstance(files, dict) or not {STUDENT, MODEL, OPTIMIZER} <= files.keys():
        raise UserError("a checkpoint's description is damaged", where=path / FACTS_FILE)
    for name, written in files.items():
        if Path(name).name != name or not (path / name).is_file() or fact_of(path / name)._asdict() != written:
            raise UserError(
                "a checkpoint is damaged", where=path / name, fix="remove its folder; the one before is used"
            )
    return Checkpoint(path, facts)
