"""Work behind the caller's back: calls in a thread of their own, in order, a few at a time.

In: calls. Out: their effects. Invariant: at most `depth` calls wait or run; after one that fails none is run, and its
error reaches the caller at a later call or at the end; leaving the block waits for what is under way.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self

from scalekd_cache.store.unit import UnitWriter

P = ParamSpec("P")


class Behind:
    """A context manager around many calls.

    Args:
        name: of the thread.
        depth: calls that may be under way when another one is put.
    """

    def __init__(self, name: str, depth: int) -> None:
        self._thread, self._depth = ThreadPoolExecutor(1, thread_name_prefix=name), depth
        self._pending: deque[Future[object]] = deque()
        self._failed = False

    def put(self, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have it called, once there is room. Raises what an earlier call raised."""
        self.settle(self._depth - 1)
        self._pending.append(self._thread.submit(self._run, partial(call, *args, **kwargs)))

    def settle(self, left: int = 0) -> None:
        """Wait until at most `left` calls are under way. Raises what one of them raised."""
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
                self.settle()
        finally:
            self._thread.shutdown(cancel_futures=error is not None)


class CommitQueue:
    """A context manager around the making of many units."""

    def __init__(self) -> None:
        self._behind = Behind("commit", depth=1)
        self._done: Callable[[], None] = _nothing

    def put(self, writer: UnitWriter, fidelity: Mapping[str, Any], done: Callable[[], None]) -> None:
        """Commit a filled unit, once the one before it is published. The writer is the queue's from now on.

        Args:
            writer: every view of it has every image that was not skipped.
            fidelity: `UnitWriter.commit`'s.
            done: called from this thread, at the next call or at the end, when the unit is there.

        Raises:
            UserError: the commit before failed; nothing of either unit is left.
        """
        try:
            self._settle()
        except BaseException:
            writer.abort()
            raise
        self._behind.put(writer.commit, fidelity)
        self._done = done

    def _settle(self) -> None:
        done, self._done = self._done, _nothing
        self._behind.settle()
        done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._behind:
            if error is None:
                self._settle()


def _nothing() -> None:
    """Before the first unit."""
