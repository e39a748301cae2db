"""Work behind the caller's back: calls in a thread of their own, in order, a few at a time.

In: calls. Out: their effects. Invariant: at most `depth` calls wait or run; after one that fails none is run, and its
error reaches the caller at a later call or at the end; leaving the block waits for what is under way.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import ParamSpec, Self

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
