"""Conditions of `make bench-gpu`: page-locked batches, running worker processes, caches made on the device."""

import multiprocessing

import pytest
import torch
from image_files import folder_tree
from small_cache import shared_cache

from benchmarks.training import stage1, step
from benchmarks.training.stage1_pipeline import run

CUDA = torch.device("cuda")


def test_batches_for_a_gpu_are_page_locked(monkeypatch):
    made = []
    monkeypatch.setattr(step, "CacheLoader", lambda *args, **options: made.append(options))
    step.endless_loader(shared_cache(), 8, 3, CUDA)
    step.endless_loader(shared_cache(), 8, 0, torch.device("cpu"))
    assert [(options["pin_memory"], options["workers"]) for options in made] == [(True, 3), (False, 0)]


def test_a_gpu_benchmark_makes_its_cache_there_and_uses_workers(tmp_path, monkeypatch):
    asked = {}

    def make_cache(*args, device):
        asked["device"] = device
        return shared_cache()

    def steps(student, teacher, batch, cache, device, workers):
        asked["workers"] = workers
        raise InterruptedError

    monkeypatch.setattr(step, "choose_device", torch.device)
    monkeypatch.setattr(step, "write_photographs", lambda folder, count: folder)
    monkeypatch.setattr(step, "make_cache", make_cache)
    monkeypatch.setattr(step, "peaks", lambda *where: {})
    monkeypatch.setattr(step, "steps", steps)
    with pytest.raises(InterruptedError):
        step.main(["--device", "cuda"])
    assert asked["device"] == "cuda"
    assert asked["workers"] > 0


def test_no_worker_starts_in_a_timed_step():
    actions, _ = step.steps("resnet10t", "demo_swin", 8, shared_cache(), torch.device("cpu"), 1, ("cached",))
    started = {child.pid for child in multiprocessing.active_children()}
    assert started
    actions["cached"]()
    actions["cached"]()
    assert {child.pid for child in multiprocessing.active_children()} <= started


def test_stage_1_is_timed_from_its_first_forward_pass(tmp_path):
    data = folder_tree(tmp_path / "data", train=[f"{kind}/{number}.png" for kind in "ab" for number in range(8)])
    found = stage1.measure(
        tmp_path, data, teacher="demo_swin", images=16, views=1, batch=8, workers=1, device=torch.device("cpu"),
        size=64, repeats=1,
    )  # fmt: skip
    assert found.start_s[0] > 0
    assert 0 < found.idle[0] < 1
    assert found.descriptors > 3
    assert found.ratios == [found.plain_s[0] / found.stage1_s[0]]


def test_stage_1_with_a_free_teacher(tmp_path):
    found = run(tmp_path, 16, 2, 8)
    assert min(found) > 0
