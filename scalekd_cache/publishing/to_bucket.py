"""Publishes to a bucket (s3, gs) through fsspec.

In: files. Out: objects in a bucket. Invariant: an object becomes visible only when it is complete. Each unit's last
file is sent after the others.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.publishing.destination import Found, Parcel, Sending, check_file, send_unit
from scalekd_cache.publishing.transfers import Task, run_in_parallel
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.remote.url_transfer import RemoteNotFoundError, sizes_below, upload, without_password


class BucketPlace:
    """A folder in a bucket."""

    def __init__(self, url: str, connections: int) -> None:
        self.url, self.connections = url, connections
        self._remote = RemoteConfig()

    @property
    def shown(self) -> str:
        """The URL."""
        return without_password(self.url)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing, because buckets have no locks."""
        return contextlib.nullcontext()

    def listing(self) -> dict[str, Found]:
        """The existing objects."""
        return {name: Found(size) for name, size in sizes_below(self.url, self._remote).items()}

    def read(self, name: str) -> bytes | None:
        """The contents of a small object; None if it does not exist."""
        try:
            return (open_place(self.url, self._remote) / name).read_bytes()
        except RemoteNotFoundError:
            return None

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Send units in parallel; files within a unit are sent one after another."""
        tasks: list[Task] = [partial(send_unit, self, parcel) for parcel in parcels]
        run_in_parallel(tasks, self.connections, done)

    def send(self, files: Sequence[Sending]) -> None:
        """Send files in this order."""
        for file in files:
            check_file(file)
            upload(file.path, f"{self.url}/{file.name}", self._remote)
