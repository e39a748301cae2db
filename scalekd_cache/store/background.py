"""A background thread for writes: calls run in order from a bounded queue.

In: calls. Out: their effects. Invariant: at most `depth` calls are pending. After a failure, no more calls are run, and
the caller gets the error at a later call or at the end. Leaving the `with` block waits for pending calls.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Self

from scalekd_cache.store.unit import UnitWriter

P = ParamSpec("P")


class BackgroundWriter:
    """A context manager that runs calls in one background thread.

    Args:
        name: the thread's name.
        depth: maximum number of pending calls; `submit` waits for room.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._thread, self._depth = ThreadPoolExecutor(1, thread_name_prefix=name), depth
        self._pending: deque[Future[object]] = deque()
        self._failed = False

    def submit(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue a call; waits while the queue is full. Raises the error from an earlier call."""
        self.wait(self._depth - 1)
        self._pending.append(self._thread.submit(self._run, partial(call, *args, **kwargs)))

    def wait(self, left: int = 0) -> None:
        """Wait until at most `left` calls are pending. Raises the error if a call failed."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _run(self, call: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown(cancel_futures=error is not None)


class FilledUnit(NamedTuple):
    """An uncommitted unit with all its records: every view holds every image that was not skipped."""

    writer: UnitWriter
    fidelity: dict[str, Any]
    """As in `UnitWriter.commit`."""


class CommitQueue:
    """A context manager that commits units in the background, one at a time."""

    def __init__(self) -> None:
        self._writer = BackgroundWriter("commit", depth=1)
        self._done: Callable[[], None] = _nothing

    def put(self, filled: Sequence[FilledUnit], done: Callable[[], None]) -> None:
        """Commit a unit to one or more caches, once the previous unit is published. The queue takes over the writers.

        Args:
            filled: the unit in each cache. The first one is committed first. If another writer has already committed
                that unit, the others are dropped, because they may not hold the same images as the unit that is kept.
            done: called in this thread once the unit is committed: at the next `put` or at the end.

        Raises:
            UserError: the previous commit failed; both units' files are removed.
        """
        try:
            self._wait_for_last()
        except BaseException:
            abort_all(filled)
            raise
        self._writer.submit(_commit, filled)
        self._done = done

    def _wait_for_last(self) -> None:
        done, self._done = self._done, _nothing
        self._writer.wait()
        done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._writer:
            if error is None:
                self._wait_for_last()


def _commit(filled: Sequence[FilledUnit]) -> None:
    (writer, fidelity), *others = filled
    try:
        if writer.commit(fidelity):
            for other in others:
                other.writer.commit(other.fidelity)
    finally:
        abort_all(filled)


def abort_all(filled: Sequence[FilledUnit]) -> None:
    """Remove the units' temporary files; committed units stay."""
    for one in filled:
        one.writer.abort()


def _nothing() -> None:
    """Placeholder for `done` before the first unit."""
