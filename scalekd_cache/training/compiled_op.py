"""Compiles and loads the operator that DeepSpeed needs on a machine without a GPU.

Invariant: a missing compiler or an unwritable folder raises `UserError`. The stale lock left by a killed build is
removed, so no process waits forever. Only this file handles torch's build lock.
"""

import errno
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import cpp_extension

from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.store.locks import lock, open_lock

OPERATOR, NAME = "ShareMemCommBuilder", "deepspeed_shm_comm"
VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Environment variable that sets torch's build folder for operators."""
STALE_S = 300.0
"""A build is considered dead if no file changes for this many seconds. It normally takes about a minute."""
POLL_S = 0.5
LOCK_IS_A_FILE = hasattr(cpp_extension, "FileBaton")
"""Whether torch's lock is the existence of a file (up to torch 2.13). Newer versions use filelock and leave the file in
place."""


def prepare_build(process: Process, load: Callable[[], object]) -> None:
    """Compile or load the operator in one process at a time on this machine.

    Torch locks the folder with a file. A killed build leaves it behind, and torch would wait for it forever. We
    therefore hold an flock on a marker file during the build. If the marker shows that one of our processes was killed,
    torch's lock is removed immediately. Another program's lock is removed once its build has stalled.

    Args:
        process: this process.
        load: compiles and loads the operator. Loading it again in this process needs no lock.

    Raises:
        UserError: there is no C++ compiler or no writable folder, or compilation fails.
    """
    if shutil.which("g++") is None:
        raise UserError(
            "DeepSpeed needs a C++ compiler on a machine without a GPU",
            got="no g++",
            fix="install g++ (on Debian and Ubuntu: apt install build-essential)",
        )
    folder = _build_folder()
    if not any(folder.glob("*.so")):
        process.print_rank0("compiling a small DeepSpeed operator (only once on this machine; takes about a minute)")
    with open_lock(folder / ".scalekd.lock") as marker:
        lock(marker, folder / ".scalekd.lock")
        if LOCK_IS_A_FILE and marker.read(1):
            (folder / "lock").unlink(missing_ok=True)
        elif LOCK_IS_A_FILE:
            _wait_for_others(folder, process)
        marker.write(b"building")
        given = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = str(folder.parent)
        try:
            load()
        except RuntimeError as error:
            got = str(error).strip().splitlines()[-1][:300]
            fix = "check that g++ works and the disk is not full, delete this folder, and rerun"
            raise UserError("DeepSpeed's operator failed to compile", got=got, where=folder, fix=fix) from error
        finally:
            if given is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = given
            marker.truncate(0)


def _build_folder() -> Path:
    """Torch's build folder for the operator, created if missing.

    Unless the user sets one, it is a subfolder of torch's cache that is specific to this environment and processor
    (`_build_key`).
    """
    try:
        folder = Path(os.environ.get(VARIABLE) or Path(cpp_extension.get_default_build_root()) / _build_key()) / NAME
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise UserError(
            "cannot write to the build folder for DeepSpeed's operator",
            got=error.strerror,
            where=error.filename,
            fix=f"set {VARIABLE} or HOME to a folder that only you can write to",
        ) from error
    return folder


def _build_key() -> str:
    """A folder name that hashes what the operator depends on: environment, torch, DeepSpeed, ninja and processor.

    With a shared folder, alternating between two environments would recompile the operator on every start, and a
    machine with an older processor and the same home folder would load code that it cannot run (-march=native).
    """
    deepspeed = importlib.util.find_spec("deepspeed")
    parts = (sys.version, torch.__version__, torch.__file__, deepspeed and deepspeed.origin, shutil.which("ninja"))
    digest = hashlib.sha256(repr((*parts, platform.machine(), _processor())).encode())
    return f"scalekd-{digest.hexdigest()[:16]}"


def _processor() -> str:
    """The processor's instruction sets, if the kernel lists them; otherwise empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _wait_for_others(folder: Path, process: Process) -> None:
    """Wait for another program's build; remove its lock if no file has changed for `STALE_S` seconds."""
    theirs, reported = folder / "lock", False
    while theirs.exists():
        changed = [path.stat().st_mtime for path in folder.iterdir() if path.name != ".scalekd.lock"]
        if time.time() - max(changed, default=0.0) > STALE_S:
            process.print_rank0(f"removed {theirs}, a stale lock left by a killed build")
            theirs.unlink(missing_ok=True)
        elif not reported:
            reported = True
            process.print_rank0(
                f"waiting for another program's build ({theirs}); its lock is removed if no file changes for "
                f"{STALE_S:.0f} s"
            )
        time.sleep(POLL_S)
