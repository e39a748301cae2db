"""Run checkpoints: unsharded tensors in safetensors files, committed by an atomic rename like shards.

In: tensors by file name, and metadata. Out: `checkpoints/step-00000123/`; the newest undamaged checkpoint.
Invariant: a checkpoint gets its final name in a single rename, after all its files have been fsynced. It is used only
if every file's sha256 matches. If the process is killed while saving, the previous checkpoint remains. A checkpoint is
removed only if enough undamaged ones remain, and removal also starts with a rename. No pickles are used.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from scalekd_cache.errors import UserError
from scalekd_cache.models.weights import separate
from scalekd_cache.store.checked_files import read_json
from scalekd_cache.store.durable_files import (
    canonical_json,
    disk_errors,
    fsync_path,
    hash_file,
    temp_path_for,
    write_new,
)

FACTS_FILE = "checkpoint.json"
NAME = re.compile(r"step-(\d{8,12})")
STUDENT, MODEL, OPTIMIZER, AVERAGE = (f"{name}.safetensors" for name in ("student", "model", "optimizer", "average"))
"""Checkpoint files: the exported student, all weights and BatchNorm statistics, the optimizer state, and the moving
average, if any."""

KEEP = 2
"""Number of checkpoints to keep during training: if the last one is damaged, the run resumes from the one before."""


class Checkpoint(NamedTuple):
    """A checkpoint with verified digests."""

    folder: Path
    facts: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors in one file, on the CPU."""
        tensors: dict[str, Tensor] = load_file(self.folder / name)
        return tensors


def commit_checkpoint(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any], keep: int | None
) -> Path:
    """Write a checkpoint, then remove old ones (`prune_checkpoints`).

    Args:
        folder: the run's checkpoint folder.
        step: number of completed optimizer steps.
        files: the tensors in each file.
        facts: JSON-serializable metadata, which can be read back as `Checkpoint.facts`.
        keep: number of undamaged checkpoints to keep, including this one (None: `KEEP`).

    Raises:
        UserError: the disk is full or fails, or the folder is not writable. Older checkpoints remain.
    """
    final = checkpoint_folder(folder, step)
    temporary = temp_path_for(final)
    needed = sum(value.nbytes for tensors in files.values() for value in tensors.values())
    with disk_errors(folder, needed):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            written = {}
            for name, tensors in files.items():
                save_file(separate(tensors), str(temporary / name))
                fsync_path(temporary / name)
                written[name] = hash_file(temporary / name)._asdict()
            whole = {**facts, "step": step, "files": written}
            write_new(temporary / FACTS_FILE, canonical_json({**whole, "sha256": _digest(whole)}).encode())
            fsync_path(temporary)
            if os.path.lexists(final):  # a damaged checkpoint for the same step
                _remove(final)
            os.rename(temporary, final)
            fsync_path(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        prune_checkpoints(folder, final, keep)
    return final


def checkpoint_folder(folder: Path, step: int) -> Path:
    """The checkpoint for a step."""
    return folder / f"step-{step:08d}"


def prune_checkpoints(folder: Path, newest: Path | None, keep: int | None) -> None:
    """Keep `newest` and the `keep - 1` newest undamaged others. Remove the rest and all temporary files.

    Damaged checkpoints do not count toward `keep`. The run folder is locked, so temporary files in it are stale,
    including those from other hosts. `newest` is None before the first checkpoint; `keep` None means `KEEP`.
    """
    kept = 1
    for path in reversed(_checkpoints(folder)):
        if newest is not None and path.name == newest.name:
            continue
        if kept < (keep or KEEP) and _is_whole(path):
            kept += 1
        else:
            _remove(path)
    for leftover in folder.glob(".tmp-*"):
        _remove_tree(leftover)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so a kill never leaves a partial checkpoint under its final name."""
    temporary = temp_path_for(path)
    os.rename(path, temporary)
    _remove_tree(temporary)


def _remove_tree(path: Path) -> None:
    """Remove a temporary folder or file. If removal fails, it is retried at the next checkpoint."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest undamaged checkpoint, and the problems with newer ones."""
    problems: list[str] = []
    for path in reversed(_checkpoints(folder)):
        try:
            return _checked(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def _checkpoints(folder: Path) -> list[Path]:
    """All paths with checkpoint names, sorted by step."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name is not None)]


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(UserError):
        _checked(path)
        return True
    return False


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _checked(path: Path) -> Checkpoint:
    facts, _ = read_json(path / FACTS_FILE, "a checkpoint's metadata")
    files = facts.get("files")
    whole = facts.pop("sha256", None) == _digest(facts)
    if not whole or not isinstance(files, dict) or not {STUDENT, MODEL, OPTIMIZER} <= files.keys():
        raise UserError("the checkpoint's metadata is damaged", where=path / FACTS_FILE)
    for name, written in files.items():
        if Path(name).name != name or _fact(path / name) != written:
            raise UserError("the checkpoint is damaged", where=path / name)
    return Checkpoint(path, facts)


def _fact(file: Path) -> dict[str, Any] | None:
    """A file's length and sha256; None if it cannot be read."""
    try:
        return hash_file(file)._asdict()
    except (FileNotFoundError, UserError):
        return None
