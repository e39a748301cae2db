"""Commits behind the caller's back: fsync, read-back and rename of one unit while the next one is being filled.

In: filled unit writers, one after another. Out: published units, in the same order. Invariant: one commit at most is
under way; its error reaches the caller at the next call or at the end; leaving the block waits for it.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from scalekd_cache.store.background import Behind
from scalekd_cache.store.unit import UnitWriter


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
