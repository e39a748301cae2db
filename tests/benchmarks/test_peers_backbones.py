"""The benchmark of backbones: disjoint sets of images, and a table from result lines, without the peer."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.peers import backbone_data, backbones


@pytest.fixture
def few(monkeypatch):
    for name, count in (("SKIPPED", 2), ("SHOWN", 1), ("BANK", 2), ("TEST", 1)):
        monkeypatch.setattr(backbone_data, name, count)

    def images(_package, split):
        for position in range(100 if split == "train" else 20):
            value = position if split == "train" else 200 + position
            yield np.full((32, 32, 3), value, np.uint8), position % 10

    monkeypatch.setattr(backbone_data, "from_pngs", images)


def test_the_sets_of_images_are_disjoint_and_leave_out_the_first(few, tmp_path):
    sets = backbone_data.write_sets(tmp_path, tmp_path / "work", 30)
    found = [
        {np.asarray(Image.open(file))[0, 0, 0] for file in folder.rglob("*.png")}
        for folder in (sets.unlabeled / "train", sets.unlabeled / "val", sets.judged / "train", sets.judged / "val")
    ]
    assert found == [set(range(20, 50)), set(range(50, 60)), set(range(60, 80)), set(range(200, 210))]
    assert not [entry for entry in (sets.unlabeled / "train").iterdir() if entry.is_dir()]


def line(arm, seed, knn, **more):
    parts = [knn + 0.1 * part for part in range(10)]
    given = {"arm": arm, "student": "resnet18", "seed": seed, "knn": knn, "probe": knn + 5, "knn_parts": parts}
    return {**given, "images": 100, "size": 64, "batch": 16, **more}


def lines():
    trained = [
        line(arm, seed, base + seed, cpu_s=seconds, epochs=6)
        for arm, base, seconds in ((backbones.OURS, 34, 20.0), (backbones.PEER, 30, 90.0))
        for seed in range(3)
    ]
    random = [line("random weights", seed, 20.0 + seed) for seed in range(3)]
    cache = {
        "arm": "cache",
        "student": None,
        "seed": None,
        "views": 2,
        "cpu_s": 10.0,
        "bytes_per_view": {"total": 3000.0},
        "images": 100,
    }
    return [cache, *random, {**line("pixels", None, 24.0), "student": None}, *trained]


def test_differences_are_paired_by_seed_and_by_images():
    found = lines()
    assert backbones.over_seeds(found, backbones.OURS, backbones.PEER, "knn") == (4.0, 4.0, 4.0, 3)
    assert backbones.over_seeds(found, backbones.OURS, "pixels", "probe")[0] == pytest.approx(11)
    assert backbones.over_images(found, backbones.OURS, backbones.PEER).mean == pytest.approx(4)
    assert backbones.over_seeds(found, backbones.LATER, backbones.PEER, "knn") is None


@pytest.mark.parametrize(("arm", "epochs"), [(backbones.FIRST, 26), (backbones.LATER, 29), (backbones.PEER, 6)])
def test_epochs_at_equal_time_count_the_start_once_and_the_cache_for_a_first_use(arm, epochs):
    found = [*lines(), line(backbones.SHORT, 0, 30, cpu_s=5.0), line(backbones.MATCHED, 0, 30, cpu_s=90.0)]
    # one epoch more takes (20 - 5) / 5 = 3 s: 5 + 28 * 3 <= 90, and 5 + 25 * 3 <= 90 - 10
    assert backbones.epochs_of(backbones.Job(arm, "resnet18", 1), found, 6) == epochs


def test_runs_at_equal_time_come_after_those_that_their_epochs_follow_from():
    order = backbones.jobs("resnet18", 3)
    for place, job in enumerate(order):
        if job.arm in (backbones.FIRST, backbones.LATER):
            needed = {
                backbones.Job(arm, job.student, 0) for arm in (backbones.SHORT, backbones.OURS, backbones.MATCHED)
            }
            assert needed | {backbones.CACHE} <= set(order[:place])


def test_the_table_has_a_row_for_each_arm_and_difference():
    rows = {row.what: row for row in backbones.table(lines())}
    assert rows["ours, linear: k-NN"].value == 35
    assert rows["ours, linear: k-NN"].gap == "first use: 30 CPU s"
    assert rows["ours, linear - lightly-train, k-NN"].value == 4
