"""The duration of stage 1 on this machine: the forecast and the job, with tasks of known duration."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
from small_cache import CPU, make, options, shared_weights
from unlabeled_cache import write_pictures

from scalekd_cache.caching import size_probe
from scalekd_cache.caching.sample_views import ViewDataset
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.planning import forecast as planning
from scalekd_cache.planning.forecast_result import describe
from scalekd_cache.store.unit import UnitWriter

IMAGE_S, VIEW_S, COMMIT_S = 0.5, 0.05, 2.0
TRAINING = DistillConfig(student=StudentConfig(name="test_resnet"))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the teacher, the sampling of views and commits move; with the images of every pass."""
    shared_weights()  # a cache is made with them once
    found = SimpleNamespace(now=0.0, images=0)

    def costs(owner, name, seconds):
        run = getattr(owner, name)

        def work(self, *given):
            found.now += seconds(*given)
            return run(self, *given)

        monkeypatch.setattr(owner, name, work)

    def images(batch):
        found.images += len(batch)
        return IMAGE_S * len(batch)

    costs(Teacher, "normalize", images)
    costs(ViewDataset, "_sample", lambda *_: VIEW_S)
    costs(UnitWriter, "commit", lambda *_: COMMIT_S)
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(planning, "MAX_EXTRA_S", 0.0)
    return found


LABELED = {"data": {"max_samples": 24}, "cache": {"num_views": 1}}
UNLABELED = {
    "teacher": {"name": "test_vit", "pretrained": False, "weights": None, "num_classes": 0},
    "cache": {"num_views": 3, "views_per_group": 3, "backend": "zarr", "samples_per_shard": 8},
}


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
def test_the_forecast_has_the_views_the_checks_and_the_evaluation(tmp_path, clock, kind):
    pictures = {} if kind == "labeled" else {"data": {"source": str(write_pictures(tmp_path / "data"))}}
    weights, changes = (shared_weights(), LABELED) if kind == "labeled" else (None, {**UNLABELED, **pictures})
    plan = planning.forecast(
        options(tmp_path / "cache", weights, **changes), TRAINING, CPU, students=1, epochs=1, gpu="h100"
    )
    clock.now, clock.images = 0.0, 0
    cache = make(tmp_path / "cache", weights, **changes)
    views = cache.manifest.num_samples * cache.manifest.num_views
    assert clock.images > 1.3 * views  # a small cache: the checks and the evaluation are a large part
    assert plan.here.stage_1_s == pytest.approx(clock.now, rel=0.1)
    assert plan.here.teacher_s_per_view == pytest.approx(IMAGE_S)
    assert "stage 1, with checks and evaluation" in describe(plan)


def test_a_slow_teacher_runs_on_fewer_images_where_the_size_is_fixed(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(planning, "measure_sizes", partial(size_probe.measure_sizes, teacher_s=5 * IMAGE_S))
    config = options(tmp_path / "cache", shared_weights(), data={"max_samples": 24}, cache={"num_views": 2})
    planning.forecast(config, TRAINING, CPU, students=1, epochs=1, gpu="h100")
    assert clock.images == 2 + 2 * 2  # the pass that is timed, twice, and two views of two images
    fitted = SimpleNamespace(codec=SimpleNamespace(id="transform"))
    assert size_probe.images_within(fitted, views=2, teacher_s=0, pass_s=9) > 10**6
