"""File locks between processes (flock), with a fallback for file systems without locks.

In: a lock file. Out: an open file that holds the lock until it is closed; if the process is killed, the kernel closes
it.
Invariant: on a file system without flock (some NFS and Lustre mounts), one warning is printed and work continues
without the lock. Only regular files are opened. This code is custom because lock libraries poll or leave stale lock
files.
"""

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path
from typing import IO

from scalekd_cache.errors import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""Errors that flock raises on a file system without locks."""
_warned: set[str] = set()


def open_lock(path: Path, *, make: bool = True) -> IO[bytes]:
    """Open a lock file; `make` opens it for writing and creates a missing file.

    Raises:
        UserError: the path is not a regular file.
        OSError: it cannot be created or opened; FileNotFoundError if it is missing and `make` is false.
    """
    # O_NONBLOCK, so that opening a FIFO returns at once and the FIFO is rejected.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_RDWR | os.O_CREAT if make else os.O_RDONLY)
    try:
        file = os.fdopen(os.open(path, flags, 0o644), "r+b" if make else "rb", buffering=0)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise _no_file(path, error.strerror) from error
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _no_file(path, "a FIFO, socket or device")
    return file


def _no_file(path: Path, got: str | None) -> UserError:
    return UserError("a lock file is not a regular file", got=got, where=path, fix="remove it and rerun")


def lock(file: IO[bytes] | int, path: Path, *, wait: bool = True, shared: bool = False) -> bool:
    """Lock an open file.

    Args:
        file: the open file, or its descriptor.
        path: its path, for the warning.
        wait: block until other processes have released it.
        shared: multiple processes may hold it at the same time.

    Returns:
        False if the file system does not support locks; a warning is then printed once per process and folder.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn(path.parent, error)
        return False
    return True


def _warn(folder: Path, error: OSError) -> None:
    """Print the warning once per process and folder; processes forked later do not repeat it."""
    if str(folder) not in _warned:
        _warned.add(str(folder))
        print(
            f"warning: the file system that holds {folder} does not support file locks ({error.strerror}): "
            "do not run two commands that write to it at the same time",
            file=sys.stderr,
            flush=True,
        )
