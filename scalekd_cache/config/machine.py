"""Counts the cores and GPUs available to this process, for the default numbers of processes and workers.

In: CPU affinity, cgroups, environment, device files. Out: counts.
Invariant: torch is not imported, so that commands that only launch other processes start quickly.
"""

import os
import re
from pathlib import Path


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


def default_workers(processes: int | None = None) -> int:
    """Loader processes per rank. With few cores, loading runs in the main process between steps, because a worker
    would only take a core away from training. Otherwise, this is the rank's share of the cores minus one for the
    rank itself, at most 16.

    Args:
        processes: number of ranks on this machine (None: as set by the launcher, otherwise 1).
    """
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = available_cores()
    return 0 if cores <= 4 else min(16, max(0, cores // processes - 1))
