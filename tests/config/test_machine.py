"""Defaults that depend on the machine: all visible GPUs, and workers for the cores that this process may use."""

import os

import pytest

from scalekd_cache.config import machine


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty file system instead of /dev and /sys; 64 logical cores."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.removeprefix("/"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
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
    assert machine.default_workers(8) == workers
    assert machine.default_workers() == (0 if cores <= 4 else min(16, cores - 1))
