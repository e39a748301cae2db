"""A run's watchdog, which finds the first NaN or Inf and stalled ranks, and can log the samples used.

In: every micro-batch and its loss terms. Out: errors with the step, rank, shard and samples, and optionally a log.
Invariant: the computation is unchanged, and the device is not synchronized between logged steps.
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

from scalekd_cache.distributed import EXIT_RESUMABLE, Peers, Process
from scalekd_cache.errors import RunInterrupted, UserError
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.training.metrics import drop_lines_after
from scalekd_cache.training.run_files import SampleLine

MICROS = 1 << 20
"""Larger than the number of micro-batches in any step, so that (step, micro-batch) fits in one integer."""
NONE = torch.iinfo(torch.int64).max
BACKEND_TIMEOUTS = 1.5
"""Timeout for NCCL and Gloo, as a multiple of the watchdog's. It is longer so that the watchdog reports first, because
NCCL's timeout aborts the process."""

REPORT_S = 30.0
"""Maximum seconds for finding out where a stalled job is, before the process exits."""


class Watchdog:
    """Monitors training on one rank."""

    def __init__(self, process: Process, loader: CacheLoader) -> None:
        self.process = process
        self.loader = loader
        self._peers = Peers(process)
        self._first_nonfinite = torch.tensor(NONE, device=process.device)
        self._log: Path | None = None
        self._progress_at = time.monotonic()

    def log_samples(self, run: Path) -> None:
        """Log every micro-batch's step, number, view and sample positions to samples-r00000.jsonl in `run`.

        Lines for steps after the loader's position are dropped, because those steps were lost in an interruption.
        """
        self._log = run / f"samples-r{self.process.rank:05d}.jsonl"
        drop_lines_after(self._log, SampleLine, self.loader.step)

    def start_step(self, step: int) -> None:
        """Publish this rank's step to the other ranks."""
        self.progressed()
        self._peers.publish(f"step of {self.process.rank}", str(step))

    def progressed(self) -> None:
        """Restart the timeout of `guard`: a step has started, or an evaluation or a checkpoint has advanced, whose
        tensors are gathered and then written."""
        self._progress_at = time.monotonic()

    def micro_batch_done(self, step: int, micro: int, batch: Batch, terms: Tensor) -> None:
        """Record the first micro-batch whose loss `terms` (any shape, on the device) contain NaN or Inf."""
        here = torch.where(terms.isfinite().all(), NONE, step * MICROS + micro)
        self._first_nonfinite = torch.minimum(self._first_nonfinite, here)
        if self._log is not None:
            line = {"step": step + 1, "micro": micro, "view": batch.view, "ids": batch.ids.tolist()}
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def first_nonfinite(self) -> str | None:
        """Describe the first micro-batch with NaN or Inf on any rank. This is a collective: call it on all ranks."""
        dist.all_reduce(self._first_nonfinite, op=dist.ReduceOp.MIN)
        if int(self._first_nonfinite) == NONE:
            return None
        step, micro = divmod(int(self._first_nonfinite), MICROS)
        return f"step {step + 1}, rank {micro % self.process.world_size}, {self.loader.describe(step, micro)}"

    @contextmanager
    def guard(self, timeout_s: float) -> Iterator[None]:
        """Context manager for training that reports a lost or stalled rank instead of hanging.

        A failed collective becomes a `RunInterrupted` with exit code 75 (rerun to resume). Without progress
        (`progressed`) within `timeout_s`, the process exits, whatever call it is blocked in, because backend timeouts
        do not apply to DeepSpeed's own process groups.
        """
        over = threading.Event()
        self.progressed()
        threading.Thread(target=self._exit_when_stalled, args=(over, timeout_s), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not self._is_lost_peer(error):
                raise
            raise RunInterrupted(
                f"error: {self._hang_error(str(error).splitlines()[0][:300])}", EXIT_RESUMABLE
            ) from error
        finally:
            over.set()

    @contextmanager
    def pause_timeout(self) -> Iterator[None]:
        """Context manager for waiting on a growing cache, which has its own timeout."""
        self._progress_at = float("inf")
        try:
            yield
        finally:
            self.progressed()

    def _exit_when_stalled(self, over: threading.Event, timeout_s: float) -> None:
        while not over.wait(min(1.0, timeout_s / 4)):
            stalled_s = time.monotonic() - self._progress_at
            if stalled_s > timeout_s:
                report = threading.Thread(target=self._report_stall, args=(stalled_s,), daemon=True)
                report.start()
                report.join(REPORT_S)  # it may fail, or wait for a lost node
                os._exit(EXIT_RESUMABLE)

    def _report_stall(self, stalled_s: float) -> None:
        print(f"error: {self._hang_error(f'no step finished for {stalled_s:.0f} s')}", file=sys.stderr, flush=True)

    def _is_lost_peer(self, error: RuntimeError) -> bool:
        text = str(error).lower()
        patterns = (
            "timed out",
            "timeout",
            "connection closed",
            "connection reset",
            "broken pipe",
            "socket",
            "gloo",
            "nccl",
        )
        return self.process.world_size > 1 and any(pattern in text for pattern in patterns)

    def _hang_error(self, got: str) -> UserError:
        """The error for a distributed hang, which names the ranks that are furthest behind."""
        at = {rank: self._peers.get(f"step of {rank}") for rank in range(self.process.world_size)}
        known = {rank: int(step) for rank, step in at.items() if step is not None}
        step = min(known.values(), default=self.loader.step)
        late = [f"rank {rank}, {self.loader.describe(step, rank)}" for rank, its in known.items() if its == step]
        return UserError(
            "distributed hang: a rank is stalled or its node is down"
            if self.process.world_size > 1
            else "training is stalled",
            got=got,
            where=f"at step {step + 1}, furthest behind: {'; '.join(late[:4]) or 'unknown'}",
            fix=("look for the first error on any rank; " if self.process.world_size > 1 else "")
            + "rerun the same command to resume from the last checkpoint",
        )
