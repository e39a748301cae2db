"""The operator that DeepSpeed compiles at its first start on a machine without a GPU.

In: the environment. Out: a folder in which the operator can be compiled, or was. Invariant: no start waits without
end or fails in another program's traceback: a missing compiler, a folder that cannot be written and a lock that a
killed process left are met here.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils import cpp_extension

from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.store.locks import lock, open_lock

OPERATOR, NAME = "ShareMemCommBuilder", "deepspeed_shm_comm"
STALE_S = 300.0
"""A build in which nothing changes for so long is dead: a whole build takes about a minute."""
POLL_S = 0.5
LOCK_IS_A_FILE = hasattr(cpp_extension, "FileBaton")
"""Whether the lock file's existence is torch's lock. Newer versions lock the file itself (filelock), and leave it."""


def prepare_build(process: Process, load: Callable[[], object]) -> None:
    """Compile or load the operator, one process of this machine at a time.

    torch's lock on the folder is a file: a killed build leaves it, and torch would wait for it without end. A lock of
    the kernel's around it says whose it is: what a process of ours left is removed at once.

    Args:
        process: this process.
        load: compiles and loads the operator; a second load in this process takes no lock.

    Raises:
        UserError: no C++ compiler, no folder that can be written, or the compiler fails.
    """
    if shutil.which("g++") is None:
        raise UserError(
            "DeepSpeed needs a C++ compiler on a machine without a GPU",
            got="no g++",
            fix="install g++ (build-essential)",
        )
    process.print_rank0("starting DeepSpeed (the first start on a machine compiles a small operator, about a minute)")
    folder = _build_folder()
    with open_lock(folder / ".scalekd.lock") as ours:
        lock(ours, folder / ".scalekd.lock")
        if LOCK_IS_A_FILE and ours.read(1):
            (folder / "lock").unlink(missing_ok=True)
        elif LOCK_IS_A_FILE:
            _wait_for_others(folder, process)
        ours.write(b"building")
        try:
            load()
        except RuntimeError as error:
            got = str(error).strip().splitlines()[-1][:300]
            fix = "remove the folder and rerun; see that g++ works and the disk has space"
            raise UserError("DeepSpeed's operator cannot be compiled", got=got, where=folder, fix=fix) from error
        finally:
            ours.truncate(0)


def _build_folder() -> Path:
    """Where torch compiles the operator; made here, as torch would."""
    try:
        folder = Path(cpp_extension._get_build_directory(NAME, verbose=False))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise UserError(
            "DeepSpeed compiles a small operator, and its folder cannot be written",
            got=error.strerror,
            where=error.filename,
            fix="set TORCH_EXTENSIONS_DIR to a folder that you alone can write, or HOME to one",
        ) from error
    return folder


def _wait_for_others(folder: Path, process: Process) -> None:
    """Wait for a build of another program; one in which nothing changes any more was killed."""
    theirs, said = folder / "lock", False
    while theirs.exists():
        changed = [path.stat().st_mtime for path in folder.iterdir() if path.name != ".scalekd.lock"]
        if time.time() - max(changed, default=0.0) > STALE_S:
            process.print_rank0(f"{theirs} was left by a build that was killed: removed")
            theirs.unlink(missing_ok=True)
        elif not said:
            said = True
            process.print_rank0(
                f"waiting for another process to compile the operator ({theirs}), at most {STALE_S:.0f} s"
            )
        time.sleep(POLL_S)
