"""Reports of caches and runs without labels."""

import shutil

import pytest
import torch
from small_cache import CPU
from unlabeled_cache import TRAIN, VAL, unlabeled_cache

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.reports.cache import CacheReport, cache_report
from scalekd_cache.reports.neighbors import _nearest, read_spaces
from scalekd_cache.reports.run_data import RunReport
from scalekd_cache.reports.runs import run_report
from scalekd_cache.training.run import distill


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds."""
    folders = [tmp_path_factory.mktemp("unlabeled") / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        sizes = {"epochs": 1, "global_batch_size": 32, "micro_batch_size": 32}
        distill(
            DistillConfig(
                cache=str(unlabeled_cache().root),
                run=str(folder),
                student=StudentConfig(name="test_resnet"),
                scalekd=ScaleKDConfig(projector="linear"),
                optim=OptimConfig(name="adamw", lr=1e-3),
                train=TrainConfig(seed=seed, **sizes),
            ),
            CPU,
        )
    return folders


def test_nearest_neighbors_by_hand():
    space = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.2], [0.5, 0.5]])
    assert _nearest(space, [0, 2], 2) == [[1, 4], [4, 3]]


def test_a_run_and_its_neighbors(runs):
    notes = []
    spaces = read_spaces(runs[0], None, CPU, notes)
    assert notes == []
    assert spaces.searched == VAL
    assert all(len(row.teacher) == len(row.student) == 5 for row in spaces.neighbors)
    for row in spaces.neighbors:
        assert sum(one.common for one in row.teacher) == sum(one.common for one in row.student)
    page = run_report(runs[:1], RunReport(), CPU)
    for text in (
        "Nearest neighbors",
        "Feature maps",
        "cosine of embeddings",
        "linear probe, teacher",
        "k-NN accuracy on",
    ):
        assert text in page
    assert "top-1" not in page.split('<script type="application/json"')[0]


def test_runs_are_compared_by_held_out_figures(runs):
    page = run_report(runs, RunReport(images=0), CPU).split('<script type="application/json"')[0]
    assert "Mean and spread over seeds" in page
    assert "common neighbors" in page
    assert ">top-1<" not in page
    assert "Nearest neighbors" not in page


def test_without_the_cache_there_is_a_note(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(unlabeled_cache().root), str(tmp_path / "gone")))
    page = run_report([run], RunReport(), CPU)
    assert "held-out images are not compared" in page
    assert "Nearest neighbors" not in page


def test_a_cache_report_without_labels():
    page = cache_report(unlabeled_cache(), CacheReport(views=24, teacher_views=0, images=2), CPU)
    assert f"{TRAIN} without labels, 2 views each" in page
    assert "features only (no classifier)" in page
    assert "0 classes" not in page
    assert "disagrees with the label" not in page
    assert "label <bdi>" not in page
