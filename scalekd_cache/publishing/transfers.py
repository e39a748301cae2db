"""Fetches many files in parallel and verifies each one before it gets its final name.

In: files in a cache (local or remote) with expected lengths and SHA-256 hashes, and their target paths.
Out: the files. Invariant: a file under its final name is complete, verified and flushed to disk. A killed process
leaves only `.part` files, which are replaced the next time the same file is transferred.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from scalekd_cache.store.durable_files import fsync_path
from scalekd_cache.store.remote.remote_path import Pin, RemotePath, fetch

PART = ".part"
"""Suffix of files being written."""
Task = Callable[[Callable[[], None]], int]
"""A task for a thread. Its argument is a function that raises `Stopped` once another task has failed. Returns the
number of bytes transferred."""
THREAD = "transfer"
"""Prefix for thread names. Threads from a failed transfer may still be finishing a request."""
WAITING = 4
"""Number of tasks per thread to submit ahead."""


class Stopped(Exception):  # noqa: N818 - not an error
    """The transfer was stopped because another transfer failed."""


class Transfer(NamedTuple):
    """A file to fetch."""

    source: Path | RemotePath
    target: Path
    pin: Pin
    limit_bytes: int
    """Maximum size in bytes if the length is unknown."""


def fetch_file(transfer: Transfer, check_stop: Callable[[], None]) -> int:
    """Fetch one file (a `Task`); return its size in bytes."""
    transfer.target.parent.mkdir(parents=True, exist_ok=True)
    part = transfer.target.with_name(transfer.target.name + PART)
    fetch(transfer.source, part, transfer.pin, transfer.limit_bytes, lambda _: check_stop())
    fsync_path(part)
    check_stop()
    part.replace(transfer.target)
    return transfer.target.stat().st_size


def run_in_parallel(tasks: Iterable[Task], threads: int, done: Callable[[int], None]) -> None:
    """Run tasks in threads; the first error stops them all.

    Args:
        tasks: the tasks.
        threads: number of tasks to run at the same time.
        done: called in the calling thread with the number of bytes transferred by each finished task.
    """
    stop = threading.Event()

    def check_stop() -> None:
        if stop.is_set():
            raise Stopped

    pool, running = ThreadPoolExecutor(threads, thread_name_prefix=THREAD), set[Future[int]]()
    try:
        for task in (*tasks, None):
            if task is not None:
                running.add(pool.submit(task, check_stop))
            while running and (task is None or len(running) >= WAITING * threads):
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(future.result())
    except BaseException:
        stop.set()
        # Do not wait: a server that has stopped sending would delay the error until a timeout.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
