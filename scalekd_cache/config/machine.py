"""Counts the cores, memory and GPUs available to this process, for the default numbers of processes and workers.

In: CPU affinity, cgroups, /proc, environment, device files. Out: counts.
Invariant: torch is not imported, so that commands that only launch other processes start quickly.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import psutil

from scalekd_cache.errors import counted
from scalekd_cache.progress import size_text

SHARED_MEMORY = Path("/dev/shm")


def available_cores() -> int:
    """Number of cores available to this process, given its affinity and its cgroup's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or no quota ("max")
        pass
    return max(1, cores)


def visible_gpus() -> int:
    """Number of NVIDIA GPUs visible to this process, from CUDA_VISIBLE_DEVICES if set, otherwise from device files."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len([file for file in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name)])
    if chosen is None:
        return there
    return min(there, len([word for word in chosen.split(",") if word.strip() not in ("", "-1")]))


WORKER_BYTES = 512 << 20
"""Memory that one loader worker may need."""
WORKER_SHARED_BYTES = 128 << 20
"""Shared memory that one loader worker may need; half of it stays free for a second loader (`data/workers.py`)."""


class WorkerLimit(NamedTuple):
    """The default number of loader processes per rank."""

    workers: int
    reason: str
    """What limits the number of workers; empty if the number of cores is the limit."""


def worker_limit(processes: int) -> WorkerLimit:
    """With few cores, loading runs in the main process between steps, because a worker would only take a core away from
    training. Otherwise, each rank gets its share of the cores minus one for the rank itself, at most 16, and no more
    than fit in memory.
    """
    cores, memory, shared = available_cores(), available_memory(), shared_memory()
    limits = [WorkerLimit(0 if cores <= 4 else min(16, max(0, cores // processes - 1)), "")]
    for free, each, where in (
        (memory, WORKER_BYTES, "of free memory"),
        (shared, WORKER_SHARED_BYTES, "of shared memory; in Docker, set --shm-size=8g or --ipc=host"),
    ):
        if free is not None:
            limits.append(WorkerLimit(free // processes // each, f"limited by {size_text(free)} {where}"))
    return min(limits, key=lambda limit: limit.workers)


def available_memory() -> int:
    """Free bytes of memory within the cgroup's limit. Page cache that can be reclaimed counts as free."""
    free: int = psutil.virtual_memory().available
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(facts["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no cgroup, or no limit ("max")
        pass
    return free


def shared_memory() -> int | None:
    """Free bytes of shared memory; None on systems without /dev/shm (macOS)."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def default_workers() -> int:
    """`worker_limit` for this rank, which shares the machine with the other local ranks."""
    return worker_limit(_local_processes()).workers


def describe_workers(workers: int) -> str:
    """The number of loader workers as text. If it is the default, and memory limits it, the text says so."""
    limit = worker_limit(_local_processes())
    text = counted(workers, "loader worker")
    return f"{text} ({limit.reason})" if limit.reason and workers == limit.workers else text


def _local_processes() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
