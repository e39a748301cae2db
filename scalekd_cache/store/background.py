"""A background thread for writes: calls run in order, with a bounded queue.

In: calls. Out: their effects. Invariant: at most `depth` calls are pending. After a failure no other call is run, and
the error is raised in the caller at a later call or at the end; leaving the `with` block waits for pending calls.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self

from scalekd_cache.store.unit import UnitWriter

P = ParamSpec("P")


class BackgroundWriter:
    """Runs calls in one background thread. A context manager.

    Args:
        name: name of the thread.
        depth: maximum number of pending calls; `submit` waits for room.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._thread, self._depth = ThreadPoolExecutor(1, thread_name_prefix=name), depth
        self._pending: deque[Future[object]] = deque()
        self._failed = False

    def submit(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue a call; waits while the queue is full. Raises the error of an earlier call."""
        self.wait(self._depth - 1)
        self._pending.append(self._thread.submit(self._run, partial(call, *args, **kwargs)))

    def wait(self, left: int = 0) -> None:
        """Wait until at most `left` calls are pending. Raises the error of one of them."""
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


class CommitQueue:
    """Commits units in the background, one at a time. A context manager."""

    def __init__(self) -> None:
        self._writer = BackgroundWriter("commit", depth=1)
        self._done: Callable[[], None] = _nothing

    def put(self, writer: UnitWriter, fidelity: Mapping[str, Any], done: Callable[[], None]) -> None:
        """Commit a unit with all its records, once the previous one is published. The queue takes over the writer.

        Args:
            writer: a writer whose views all hold every image that was not skipped.
            fidelity: as in `UnitWriter.commit`.
            done: called in this thread once the unit is committed: at the next `put` or at the end.

        Raises:
            UserError: the previous commit failed; both units' files are removed.
        """
        try:
            self._wait_for_last()
        except BaseException:
            writer.abort()
            raise
        self._writer.submit(writer.commit, fidelity)
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


def _nothing() -> None:
    """Placeholder for `done` before the first unit."""
