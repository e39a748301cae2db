"""A run that is asked to stop: by a person (Ctrl-C), by a scheduler that takes the machine back (SIGTERM, SIGUSR1).

In: signals. Out: `Stop.wanted`, read between two steps, and `RunStopped`, raised once the checkpoint is on disk.
Invariant: a signal never interrupts a step or a checkpoint; a second Ctrl-C does.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_AGAIN = 75
"""Exit status that asks for a restart (sysexits' EX_TEMPFAIL)."""
EXIT_STOPPED = 130
"""Exit status after Ctrl-C."""
SAME_PRESS_S = 3.0
"""A launcher passes on the Ctrl-C that the terminal has sent already: what comes within this time is the same one."""


class RunStopped(Exception):  # noqa: N818 - nothing went wrong
    """The run has been saved and ends here."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Stop:
    """Notes signals while it is entered. A context manager, for the main thread."""

    def __init__(self) -> None:
        self.wanted = 0
        """Number of the signal that came, 0 for none."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.wanted == signal.SIGINT and now - self._since > SAME_PRESS_S:
            raise KeyboardInterrupt
        if not self.wanted:
            self.wanted, self._since = number, now


def stopped(number: int, step: int, total: int) -> RunStopped:
    """What ends a run after a signal, once it is saved."""
    name = signal.Signals(number).name
    status = EXIT_STOPPED if number == signal.SIGINT else EXIT_AGAIN
    return RunStopped(f"{name}: saved at step {step} of {total}; run the same command again to go on", status)
