"""Looks after a run while it trains: where it stopped being finite, which process is behind, which samples it used.

In: every micro-batch and its loss terms. Out: errors that name step, process, shard and samples; optionally a log.
Invariant: watching never changes what is computed, and costs no wait for the device between two logged steps.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from scalekd_cache.distributed import EXIT_RESUMABLE, Peers, Process, RunInterrupted
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.training.run_files import SampleLine, keep_lines

MICROS = 1 << 20
"""More micro-batches than a step has: (step, micro-batch) fits one number."""
NONE = torch.iinfo(torch.int64).max


class Watch:
    """One process's watch over its run."""

    def __init__(self, process: Process, loader: CacheLoader) -> None:
        self.process = process
        self.loader = loader
        self._peers = Peers(process)
        self._first_bad = torch.tensor(NONE, device=process.device)
        self._log: Path | None = None
        self._alive_at = time.monotonic()

    def log_samples(self, run: Path) -> None:
        """Write every micro-batch's step, number, view and sample positions to samples-r00000.jsonl in `run`.

        Lines of steps after the loader's position, lost with the last interruption, are dropped.
        """
        self._log = run / f"samples-r{self.process.rank:05d}.jsonl"
        keep_lines(self._log, SampleLine, self.loader.step)

    def step_begins(self, step: int) -> None:
        """Tell the other processes how far this one is."""
        self._alive_at = time.monotonic()
        self._peers.publish(f"step of {self.process.rank}", str(step))

    def micro_batch_done(self, step: int, micro: int, batch: Batch, terms: Tensor) -> None:
        """Note the first micro-batch whose loss `terms` (any shape, on the device) are not finite."""
        here = torch.where(terms.isfinite().all(), NONE, step * MICROS + micro)
        self._first_bad = torch.minimum(self._first_bad, here)
        if self._log is not None:
            line = {"step": step + 1, "micro": micro, "view": batch.view, "ids": batch.ids.tolist()}
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def first_bad(self) -> str | None:
        """The first micro-batch of any process that was not finite, in words; every process must ask at one step."""
        dist.all_reduce(self._first_bad, op=dist.ReduceOp.MIN)
        if int(self._first_bad) == NONE:
            return None
        step, micro = divmod(int(self._first_bad), MICROS)
        return f"step {step + 1}, process {micro % self.process.world_size}, {self.loader.describe(step, micro)}"

    @contextmanager
    def guard(self, timeout_s: float) -> Iterator[None]:
        """Around training: what other processes do to this one ends in words, and never in a wait without end.

        A failed exchange becomes a `RunInterrupted` that asks for a restart. When no step has been finished for
        `timeout_s`, the process ends at once, whatever call it is blocked in: the time-outs of backends do not reach
        DeepSpeed's own groups.
        """
        over = threading.Event()
        self._alive_at = time.monotonic()
        threading.Thread(target=self._end_when_stuck, args=(over, timeout_s), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not self._is_lost_peer(error):
                raise
            raise RunInterrupted(f"error: {self._behind(str(error).splitlines()[0][:300])}", EXIT_RESUMABLE) from error
        finally:
            over.set()

    @contextmanager
    def data_may_wait(self) -> Iterator[None]:
        """Around a wait that has its own time-out: for a cache that grows."""
        self._alive_at = float("inf")
        try:
            yield
        finally:
            self._alive_at = time.monotonic()

    def _end_when_stuck(self, over: threading.Event, timeout_s: float) -> None:
        while not over.wait(min(1.0, timeout_s / 4)):
            silent_s = time.monotonic() - self._alive_at
            if silent_s > timeout_s:
                print(f"error: {self._behind(f'no step finished for {silent_s:.0f} s')}", file=sys.stderr, flush=True)
                os._exit(EXIT_RESUMABLE)

    def _is_lost_peer(self, error: RuntimeError) -> bool:
        text = str(error).lower()
        signs = (
            "timed out",
            "timeout",
            "connection closed",
            "connection reset",
            "broken pipe",
            "socket",
            "gloo",
            "nccl",
        )
        return self.process.world_size > 1 and any(sign in text for sign in signs)

    def _behind(self, got: str) -> UserError:
        """Which processes are furthest behind, by their last word."""
        at = {rank: self._peers.get(f"step of {rank}") for rank in range(self.process.world_size)}
        known = {rank: int(step) for rank, step in at.items() if step is not None}
        step = min(known.values(), default=self.loader.step)
        late = [f"process {rank}, {self.loader.describe(step, rank)}" for rank, its in known.items() if its == step]
        return UserError(
            "the processes wait for each other: one stands still, or its machine is gone",
            got=got,
            where=f"at step {step + 1}, furthest behind: {'; '.join(late[:4]) or 'not known'}",
            fix="look at the first error among the processes; the same command goes on from the last checkpoint",
        )
