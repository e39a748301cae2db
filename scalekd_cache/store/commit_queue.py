"""Commits behind the caller's back: fsync, read-back and rename of one unit while the next one is being filled.

In: filled unit writers, one after another. Out: published units, in the same order. Invariant: one commit at most is
under way; its error reaches the caller at the next call or at the end; leaving the block waits for it.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from scalekd_cache.store.unit import UnitWriter


class CommitQueue:
    """A context manager around the making of many units."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._pending: tuple[Future[bool], Callable[[], None]] | None = None

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
        self._pending = self._thread.submit(writer.commit, fidelity), done

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            future, done = pending
            future.result()
            done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._settle()
        finally:
            self._thread.shutdown()
