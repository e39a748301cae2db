"""Class-sorted data: stage 1 records the class correlation of neighbors, stage 2 enlarges its shuffle window."""

import dataclasses

import numpy as np
import pytest
from image_files import shard
from small_cache import CPU, make, shared_cache, shared_weights

from scalekd_cache.config.stage2 import TrainConfig
from scalekd_cache.loader.order import WINDOW, class_correlation
from scalekd_cache.training.targets import make_order


def labels_of(cache):
    return np.array([record.label for record in cache.read(np.arange(len(cache)), 0)])


@pytest.fixture(scope="module")
def sorted_tars(tmp_path_factory):
    """A cache of two tars written class by class."""
    root = tmp_path_factory.mktemp("sorted")
    for number in range(2):
        labels = np.repeat(np.arange(5) + 5 * number, 20)
        shard(root / "images" / f"train-{number}.tar", [f"{number}-{row}" for row in range(len(labels))], labels)
    return make(root / "cache", shared_weights(), data={"source": str(root / "images"), "max_samples": None})


def test_stage_1_keeps_how_often_neighbors_are_of_one_class(sorted_tars):
    for cache, alike in ((sorted_tars, True), (shared_cache(), False)):
        neighbors, chance = cache.manifest.facts.data["class_likeness"]
        assert (neighbors, chance) == pytest.approx(class_correlation(labels_of(cache)))
        assert (neighbors > 2 * chance) is alike


def test_stage_2_mixes_wider_and_says_so(capsys):
    cache, train = shared_cache(), TrainConfig(shuffle_block=1)
    assert make_order(train, cache, CPU).window == WINDOW
    assert capsys.readouterr().out == ""
    facts = dataclasses.replace(
        cache.manifest.facts, data={**cache.manifest.facts.data, "class_likeness": [0.98, 0.001]}
    )
    cache.manifest = dataclasses.replace(cache.manifest, facts=facts, num_samples=1_281_167)
    order = make_order(TrainConfig(), cache, CPU)
    assert order.window == 10_010
    assert "98% of neighboring images share a class, compared with 0.1% expected by chance" in capsys.readouterr().out
    assert make_order(TrainConfig(shuffle_window=7), cache, CPU).window == 7
    assert capsys.readouterr().out == ""
