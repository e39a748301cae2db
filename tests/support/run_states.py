"""All states in which a kill can leave a run folder: copies taken before each file operation of one training run."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from stage1_process import FORKING, WRITES, run_command

CHANGES = (*WRITES, "os.truncate")
BIG_BYTES = 1 << 20
"""Weights files: written once under a temporary name, so a hard link preserves their state."""


def record_states(words, root: Path, states: Path, log: Path) -> int:
    """Run `distill` in `root`; copy the folder to `states/0000`, ... before each file operation that finds it changed.

    Returns:
        The exit code.
    """
    process = FORKING.Process(target=_recorded, args=(words, root, states, str(log)))
    process.start()
    process.join()
    return process.exitcode


def _recorded(words, root, states, log) -> None:
    """The body of a forked process."""
    seen, busy = set(), []

    def hook(event, arguments):
        if event not in CHANGES or busy or not _may_change(event, arguments, root):
            return
        busy.append(event)
        state = _digest(root)
        if state not in seen:
            seen.add(state)
            shutil.copytree(root, states / f"{len(seen) - 1:04d}", copy_function=_copy)
        busy.clear()

    states.mkdir()
    sys.addaudithook(hook)
    run_command(words, {"OMP_NUM_THREADS": "1"}, log, root, 0, command="distill")


def _may_change(event, arguments, root) -> bool:
    """Whether an operation is below `root`; paths that are relative to an open folder (`rmtree`) count too."""
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not root.exists():
        return False
    if event == "open" and isinstance(arguments[1], str) and not set("wxa+") & set(arguments[1]):
        return False
    path = os.fspath(path)
    return not os.path.isabs(path) or f"{path}{os.sep}".startswith(f"{root}{os.sep}")


def _digest(root) -> str:
    """Names and bytes of all files; for weights files the inode instead of the bytes."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        big = path.is_file() and path.stat().st_size >= BIG_BYTES
        content = str(path.stat().st_ino).encode() if big else path.read_bytes() if path.is_file() else b"folder"
        digest.update(f"{path.relative_to(root)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _copy(source, target):
    return (os.link if os.path.getsize(source) >= BIG_BYTES else shutil.copyfile)(source, target)
