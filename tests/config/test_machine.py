"""Defaults that depend on the machine: all visible GPUs, and workers for the cores and the memory of this process."""

import os
from types import SimpleNamespace

import psutil
import pytest

from scalekd_cache.config import machine


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty file system instead of /dev, /proc and /sys; 64 logical cores; enough memory."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.removeprefix("/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=128 << 30))
    monkeypatch.setattr(machine, "shared_memory", lambda: 64 << 30)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, 8), ("0", 1), ("0,3,5", 3), ("", 0), ("-1", 0), ("GPU-7a1,GPU-9b2", 2)]
)
def test_every_visible_gpu_counts(root, monkeypatch, chosen, expected):
    assert machine.visible_gpus() == 0
    for name in (*(f"nvidia{number}" for number in range(8)), "nvidiactl", "nvidia-uvm"):
        (root / "dev" / name).touch()
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.visible_gpus() == expected


@pytest.mark.parametrize(
    ("quota", "cores", "workers"),
    [(None, 64, 7), ("max 100000", 64, 7), ("1600000 100000", 16, 1), ("400000 100000", 4, 0), ("50000 100000", 1, 0)],
)
def test_workers_share_the_cores_of_the_container(root, quota, cores, workers):
    if quota is not None:
        (root / "sys/fs/cgroup/cpu.max").write_text(f"{quota}\n")
    assert machine.available_cores() == cores
    assert machine.worker_limit(8) == (workers, "")
    assert machine.default_workers() == (0 if cores <= 4 else min(16, cores - 1))


def test_workers_fit_in_memory(root, monkeypatch):
    """Docker's default of 64 MB of shared memory, and a cgroup's memory limit; both are named."""
    cgroup = root / "sys/fs/cgroup"
    assert machine.default_workers() == 16
    (cgroup / "memory.max").write_text("max\n")
    assert machine.default_workers() == 16
    (cgroup / "memory.max").write_text(f"{6 << 30}\n")
    (cgroup / "memory.current").write_text(f"{5 << 30}\n")
    (cgroup / "memory.stat").write_text(f"anon {3 << 30}\ninactive_file {2 << 30}\n")  # page cache counts as free
    assert machine.worker_limit(2) == (3, "limited by 3.22 GB of free memory")
    assert machine.describe_workers(6) == "6 loader workers (limited by 3.22 GB of free memory)"
    assert machine.describe_workers(1) == "1 loader worker"  # chosen by the user
    monkeypatch.setattr(machine, "shared_memory", lambda: 64 << 20)
    assert machine.default_workers() == 0
    assert "67.11 MB of shared memory; in Docker, set --shm-size" in machine.describe_workers(0)
