"""Rank and world size, coordination between stage-1 ranks, and signal handling.

In: the environment variables set by the launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
Out: `Process`, `Peers`, `SignalHandler`.
Invariant: no process group is initialized here. Stage 2 gets its process group from DeepSpeed.
"""

import contextlib
import logging
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
from tqdm import tqdm

from scalekd_cache.devices import choose_device
from scalekd_cache.errors import CLEAR_LINE, RunInterrupted

# Hide two irrelevant warnings: CUDA_HOME is set without a GPU; a cosine schedule over one epoch is constant.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
logging.getLogger("timm.scheduler.cosine_lr").setLevel(logging.ERROR)

EXIT_RESUMABLE = 75
"""Exit code after saving a checkpoint: rerun to resume (EX_TEMPFAIL in sysexits)."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C."""
DUPLICATE_SIGINT_S = 3.0
"""Seconds during which a second SIGINT is ignored, because the terminal and the launcher both deliver a Ctrl-C."""
HEARTBEAT_S = 2.0
"""Seconds between a rank's heartbeats."""
POLL_S = 0.8
"""Maximum seconds between polls while waiting for another rank."""


class SignalHandler:
    """Context manager that records SIGTERM, SIGUSR1 and SIGINT instead of exiting; it does nothing outside the main
    thread."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal received; 0 if none."""
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received == signal.SIGINT and now - self._received_at > DUPLICATE_SIGINT_S:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._received_at = number, now
            if os.environ.get("RANK", "0") == "0":
                again = " (press Ctrl-C again after 3 s to stop at once)" if number == signal.SIGINT else ""
                text = f"{signal.Signals(number).name}: saving a checkpoint after this step{again}\n"
                # `print` is not safe here, because the signal may have interrupted a `print`.
                os.write(2, f"{CLEAR_LINE if os.isatty(2) else ''}{text}".encode())


def interrupted_by(number: int, step: int, total: int) -> RunInterrupted:
    """The exception that stops a run after signal `number`, once the checkpoint at `step` has been saved."""
    name = signal.Signals(number).name
    exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RESUMABLE
    return RunInterrupted(f"{name}: checkpoint saved at step {step} of {total}; rerun to resume", exit_code)


class Process(NamedTuple):
    """A process's rank, world size and device."""

    rank: int
    """Rank of this process, from 0 to world_size - 1."""
    world_size: int
    """Number of processes in the job."""
    device: torch.device
    """This process's device."""

    def print_rank0(self, text: str) -> None:
        """Print on rank 0 only, above open progress bars."""
        if self.rank == 0:
            with tqdm.external_write_mode():
                print(text, flush=True)


def this_process(device: str = "auto") -> Process:
    """This process, as described by the launcher's environment variables. Without a launcher, it is rank 0 of 1.

    Raises:
        UserError: the device does not exist on this node or cannot be used.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Process(rank, world_size, choose_device(device))


def rank_in_loop() -> tuple[int, int]:
    """Rank and world size in a custom training loop, from the process group if initialized, else from the launcher."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Peers:
    """Coordinates a job's ranks through shared counters, published values and heartbeats.

    Uses torchrun's key-value store or one hosted by rank 0; a single process needs none. There are no barriers, because
    a rank may start late, be slow or be lost. The context manager sends heartbeats from a background thread.

    Args:
        process: this process.
        heartbeat_timeout_s: a rank is considered lost after this many seconds without a heartbeat.
    """

    def __init__(self, process: Process, heartbeat_timeout_s: float = 60.0) -> None:
        self.process = process
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self._counts: dict[str, int] = {}
        self._heartbeats: dict[int, tuple[int, float]] = {}  # by rank: its last heartbeat, and when it was received
        self._last_sent_at = 0.0
        self._closed = threading.Event()
        self._hosts_store = False
        self._scope = ""
        self._store: Any = None
        if process.world_size > 1:
            distributed: Any = torch.distributed
            self._hosts_store = process.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            store = distributed.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=self._hosts_store,
                timeout=timedelta(minutes=5),
                wait_for_workers=False,
                multi_tenant=True,
            )
            # Counters restart from 0 after torchrun restarts the job.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = distributed.PrefixStore(f"scalekd_cache/{attempt}", store)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._last_sent_at = time.monotonic()
            for task in (self._send_heartbeats, self._exit_when_disconnected):
                threading.Thread(target=task, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect. The rank that hosts the store first waits until all others have disconnected or are lost."""
        self._closed.set()
        if self._store is None or error is not None:
            return
        with contextlib.suppress(RuntimeError):  # the store's host is lost, but this process has finished anyway
            self._store.set(f"rank {self.process.rank} left", "1")
        for rank in range(1, self.process.world_size) if self._hosts_store else ():
            self.wait(f"rank {rank} left", rank)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Within this block, counters and published names get their own namespace."""
        before, self._scope = self._scope, f"{name}/"
        try:
            yield
        finally:
            self._scope = before

    def add(self, name: str, amount: int) -> int:
        """Add to a shared counter and return its new value.

        Raises:
            RunInterrupted: the store cannot be reached.
        """
        name = self._scope + name
        if self._store is None:
            self._counts[name] = self._counts.get(name, 0) + amount
            return self._counts[name]
        with self._connected():
            return int(self._store.add(name, amount))

    def publish(self, name: str, value: str = "1") -> None:
        """Store a value that other ranks can read with `get` or wait for with `wait`.

        Raises:
            RunInterrupted: the store cannot be reached.
        """
        if self._store is not None:
            with self._connected():
                self._store.set(self._scope + name, value)

    def get(self, name: str) -> str | None:
        """The value published under `name`, or None if there is none or the store cannot be reached."""
        try:
            there = self._store is not None and self._store.check([self._scope + name])
            return self._store.get(self._scope + name).decode() if there else None
        except RuntimeError:  # torch's DistStoreError and DistNetworkError
            return None

    def wait(self, name: str, rank: int = 0, on_poll: Callable[[], None] = lambda: None) -> bool:
        """Wait until `rank` publishes a value under `name`.

        Args:
            name: the name to wait for.
            rank: the rank that publishes the value.
            on_poll: called after every poll.

        Returns:
            False if that rank is lost (heartbeat timeout).

        Raises:
            RunInterrupted: rank 0 is lost or the store cannot be reached.
        """
        if self._store is None or rank == self.process.rank:
            return True
        pause, started = POLL_S / 16, time.monotonic()
        while True:
            with self._connected():
                if self._store.check([self._scope + name]):
                    return True
                heartbeat = int(self._store.add(f"heartbeat of rank {rank}", 0))
            now = time.monotonic()
            if self._heartbeats.get(rank, (-1, started))[0] != heartbeat:
                self._heartbeats[rank] = (heartbeat, now)
            if now - max(self._heartbeats[rank][1], started) > self.heartbeat_timeout_s:
                if rank == 0:
                    raise connection_lost(f"no heartbeat from rank 0 for {self.heartbeat_timeout_s:.0f} s")
                return False
            on_poll()
            time.sleep(pause)
            pause = min(POLL_S, 2 * pause)

    def _send_heartbeats(self) -> None:
        """Send heartbeats until this process disconnects or the store is lost."""
        pause_s = min(HEARTBEAT_S, self.heartbeat_timeout_s / 8)
        with contextlib.suppress(RuntimeError):  # the main thread gets the same error and reports it
            while not self._closed.wait(pause_s):
                self._store.add(f"heartbeat of rank {self.process.rank}", 1)
                self._last_sent_at = time.monotonic()

    def _exit_when_disconnected(self) -> None:
        """Exit if no heartbeat could be sent within the timeout.

        The main thread cannot do this: a call to a node that has lost power or network blocks for about 15 minutes.
        """
        while not self._closed.wait(min(1.0, self.heartbeat_timeout_s / 8)):
            if time.monotonic() - self._last_sent_at > self.heartbeat_timeout_s:
                lost = connection_lost(f"no reply from the store for {self.heartbeat_timeout_s:.0f} s")
                print(lost, file=sys.stderr, flush=True)
                os._exit(EXIT_RESUMABLE)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
            raise connection_lost(f"cannot reach the store ({str(error).splitlines()[0][:200]})") from error


def connection_lost(reason: str) -> RunInterrupted:
    """The exception that stops a stage-1 process after it loses its connection to rank 0 or the store."""
    text = f"lost a process or a node: {reason}; finished work is kept; rerun the same command to resume"
    return RunInterrupted(text, EXIT_RESUMABLE)
