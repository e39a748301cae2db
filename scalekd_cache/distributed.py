"""Who this process is among its peers, as its launcher says (torchrun, deepspeed, or nobody).

In: the environment variables RANK, LOCAL_RANK, WORLD_SIZE. Out: `Process` and `Peers`.
Invariant: no process group is started here; stage 2's is DeepSpeed's (`engine.py`).
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed

from scalekd_cache.errors import UserError

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


BEAT_S = 2.0
"""Seconds between two signs of life of a process."""
POLL_S = 0.8
"""Seconds between two looks at what a process waits for, once it has waited a little."""


class Process(NamedTuple):
    """One process of a job."""

    rank: int
    """Number of this process in the job."""
    world_size: int
    """Processes in the job."""
    device: torch.device
    """Where this process computes."""

    def say(self, text: str) -> None:
        """Print for the whole job, once."""
        if self.rank == 0:
            print(text, flush=True)


def this_process(device: str = "auto") -> Process:
    """Read the launcher's variables; without a launcher the job is this process alone.

    Raises:
        UserError: when the device does not exist here.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Process(rank, world_size, _device(device, int(os.environ.get("LOCAL_RANK", "0"))))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError("unknown device", got=name, expected="auto, cpu, cuda or cuda:N", fix="change device")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(
            "the CUDA device is not there",
            got=f"cuda:{index}",
            expected=f"one of {torch.cuda.device_count()} devices",
            fix="lower NPROC, or set device=cpu",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic that "auto" means on a device: bfloat16 on a GPU, float32 on a CPU."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


class Peers:
    """What the processes of a job tell each other: claims, counts, milestones, and that they are alive.

    A key-value store carries it: torchrun's, or one that process 0 keeps; a process alone needs none. There is no
    barrier: a process may start late, be slow or be gone. A context manager: within it a thread gives a sign of life.

    Args:
        process: this process.
        silent_s: a process without a sign of life for this long counts as gone, seconds.
    """

    def __init__(self, process: Process, silent_s: float = 60.0) -> None:
        self.process = process
        self.silent_s = silent_s
        self._counts: dict[str, int] = {}
        self._heard: dict[int, tuple[int, float]] = {}  # by process: its sign of life, and when it changed
        self._lived_at = 0.0
        self._over = threading.Event()
        self._keeps_store = False
        self._store: Any = None
        if process.world_size > 1:
            distributed: Any = torch.distributed
            self._keeps_store = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = distributed.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=self._keeps_store,
                timeout=timedelta(minutes=5),
                wait_for_workers=False,
                multi_tenant=True,
            )
            # Counters of a job that torchrun restarted begin anew.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = distributed.PrefixStore(f"scalekd_cache/{attempt}", store)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._lived_at = time.monotonic()
            for task in (self._live, self._end_when_cut_off):
                threading.Thread(target=task, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; the process that keeps the store stays until the others have left it or are gone."""
        self._over.set()
        if self._store is None or error is not None:
            return
        with contextlib.suppress(RuntimeError):  # the store's keeper is gone; this process is done anyway
            self._store.set(f"process {self.process.rank} left", "1")
        for rank in range(1, self.process.world_size) if self._keeps_store else ():
            self.wait(f"process {rank} left", rank)

    def add(self, name: str, amount: int) -> int:
        """Add to a shared counter; returns the new value.

        Raises:
            RunStopped: the process that keeps the counters is gone.
        """
        if self._store is None:
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]
        with self._exchange():
            return int(self._store.add(name, amount))

    def publish(self, name: str, value: str = "1") -> None:
        """Set a value that the other processes can read with `get`, or wait for with `wait`.

        Raises:
            RunStopped: the process that keeps the store is gone.
        """
        if self._store is not None:
            with self._exchange():
                self._store.set(name, value)

    def get(self, name: str) -> str | None:
        """A value that some process has published; None when there is none, or the store does not answer."""
        try:
            there = self._store is not None and self._store.check([name])
            return self._store.get(name).decode() if there else None
        except RuntimeError:  # torch's DistStoreError and DistNetworkError
            return None

    def wait(self, name: str, by: int = 0, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Wait until process `by` has published a name.

        Args:
            name: what it publishes.
            by: rank of the process that publishes it.
            meanwhile: called now and then.

        Returns:
            False when that process gives no sign of life any more.

        Raises:
            RunStopped: process 0, without which the job does not go on, is gone.
        """
        if self._store is None or by == self.process.rank:
            return True
        pause, begun = POLL_S / 16, time.monotonic()
        while True:
            with self._exchange():
                if self._store.check([name]):
                    return True
                beat = int(self._store.add(f"sign of life of {by}", 0))
            now = time.monotonic()
            if self._heard.get(by, (-1, begun))[0] != beat:
                self._heard[by] = (beat, now)
            if now - max(self._heard[by][1], begun) > self.silent_s:
                if by == 0:
                    raise gone(f"process 0 has given no sign of life for {self.silent_s:.0f} s")
                return False
            meanwhile()
            time.sleep(pause)
            pause = min(POLL_S, 2 * pause)

    def _live(self) -> None:
        """Give signs of life until the end, or until there is nobody to give them to."""
        pause_s = min(BEAT_S, self.silent_s / 8)
        with contextlib.suppress(RuntimeError):  # the main thread finds out, and says it
            while not self._over.wait(pause_s):
                self._store.add(f"sign of life of {self.process.rank}", 1)
                self._lived_at = time.monotonic()

    def _end_when_cut_off(self) -> None:
        """End this process when the store has not taken a sign of life for too long: calls to a machine that has
        lost its power or its network block for a quarter of an hour."""
        while not self._over.wait(min(1.0, self.silent_s / 8)):
            if time.monotonic() - self._lived_at > self.silent_s:
                print(gone(f"no answer from its store for {self.silent_s:.0f} s"), file=sys.stderr, flush=True)
                os._exit(EXIT_AGAIN)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
            raise gone(f"the job's store does not answer ({str(error).splitlines()[0][:200]})") from error


def gone(got: str) -> RunStopped:
    """What ends a process of stage 1 when the job has lost the one that it cannot do without."""
    text = (
        f"the job has lost a process or a machine: {got}; what is finished is kept, run the same command again to go on"
    )
    return RunStopped(text, EXIT_AGAIN)
