"""Publishes to a folder, such as a network mount.

In: files. Out: their copies. Invariant: a copy is flushed and read back before it is renamed to its final name. Each
unit is renamed as a whole, so a unit under its final name is complete.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from scalekd_cache.errors import UserError
from scalekd_cache.publishing.destination import Found, Parcel, Sending, check_file, send_unit
from scalekd_cache.publishing.transfers import Task, run_in_parallel
from scalekd_cache.store.checked_files import JSON_BYTES, is_there, read_file
from scalekd_cache.store.durable_files import (
    disk_errors,
    fsync_path,
    parent_folders,
    remove_stale,
    temp_path_for,
)
from scalekd_cache.store.locks import lock


class FolderPlace:
    """A folder, which need not exist yet."""

    def __init__(self, root: Path, connections: int) -> None:
        self.root, self.connections = root, connections

    @property
    def shown(self) -> str:
        """The folder."""
        return str(self.root)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the folder, because two simultaneous publications would mix their units."""
        new = not self.root.exists()
        with disk_errors(self.root, 0):
            self.root.mkdir(exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._lock(descriptor)
            yield
        finally:
            if new:
                with contextlib.suppress(OSError):
                    self.root.rmdir()  # if nothing was written
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            lock(descriptor, self.root, wait=False)
        except BlockingIOError:
            raise UserError(
                "another process is publishing to this folder",
                where=self.root,
                fix="wait until it finishes, or choose a different --to",
            ) from None

    def listing(self) -> dict[str, Found]:
        """The existing files, except temporary ones."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".tmp-")]
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".tmp-"):
                    found[path.relative_to(self.root).as_posix()] = Found(path.lstat().st_size)
        return found

    def read(self, name: str) -> bytes | None:
        """The contents of a small file; None if it does not exist."""
        path = self.root / name
        return read_file(path, name, JSON_BYTES) if is_there(path) else None

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Copy units in parallel."""
        tasks: list[Task] = [partial(send_unit, self, parcel) for parcel in parcels]
        run_in_parallel(tasks, self.connections, done)

    def send(self, files: Sequence[Sending]) -> None:
        """Copy files in this order; files within a unit are copied together."""
        with disk_errors(self.root, sum(file.fact.bytes for file in files)):
            for unit, members in groupby(files, key=lambda file: file.unit):
                if unit:
                    self._send_unit(unit, list(members))
                    continue
                for file in members:
                    self._send_file(file)

    def _send_file(self, file: Sending) -> None:
        target = self.root / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        temp = temp_path_for(target)
        try:
            _copy(file, temp)
            temp.replace(target)
        finally:
            temp.unlink(missing_ok=True)
        fsync_path(target.parent)

    def _send_unit(self, unit: str, files: list[Sending]) -> None:
        target = self.root / unit
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        temp, old = temp_path_for(target), temp_path_for(target)
        try:
            names = [file.name.removeprefix(f"{unit}/") for file in files]
            for file, name in zip(files, names, strict=True):
                (temp / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(file, temp / name)
            for folder in parent_folders(temp, names):
                fsync_path(folder)
            if target.exists():  # it is incomplete or damaged; otherwise, it would not be sent again
                target.rename(old)
            temp.rename(target)
        finally:
            for folder in (temp, old):
                shutil.rmtree(folder, ignore_errors=True)
        fsync_path(target.parent)


def _copy(file: Sending, target: Path) -> None:
    """Copy a file, flush it, and check the copy's length and SHA-256."""
    shutil.copyfile(file.path, target)
    fsync_path(target)
    try:
        check_file(file._replace(path=target))
    except Exception:
        check_file(file)  # if the source is damaged, the error names the source
        raise
