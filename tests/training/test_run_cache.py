"""The cache of a run: growing, extended afterwards, and used with fewer views than it has."""

import json
import shutil

import pytest
from commands import steps_of
from growing import IMAGES, Writer, make_growing, two_groups
from small_cache import CPU

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.store import growing as follow
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_cache import open_run_cache
from scalekd_cache.training.run_evaluation import evaluate_run
from scalekd_cache.training.run_export import export_run
from scalekd_cache.training.run_files import FACTS


def config_of(root, run, **changes):
    train = {"epochs": 3, "global_batch_size": 12, "micro_batch_size": 6, "log_every": 1, "shuffle_block": 8}
    return DistillConfig(
        cache=str(root),
        run=str(run),
        student=StudentConfig(name="test_resnet"),
        optim=OptimConfig(name="adamw", lr=1e-3, base_batch_size=12),
        train=TrainConfig(**{**train, "eval_epochs": 3, **changes.pop("train", {})}),
        **changes,
    )


def losses(run):
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in steps_of(run)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of three epochs on the finished cache: views 0, 1, 0."""
    run = tmp_path_factory.mktemp("reference") / "run"
    summary = distill(config_of(two_groups().root, run), CPU)
    assert summary["views"] == 2
    return run


def test_a_run_that_follows_has_the_losses_of_one_on_the_finished_cache(reference, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    writer = Writer(tmp_path / "cache", two_groups())
    writer.commit(0)
    with pytest.raises(UserError, match="--follow"):
        distill(config_of(writer.root, tmp_path / "other"), CPU)
    run = tmp_path / "run"
    # Times out after catching up; the trained steps are kept, and the run resumes from there.
    short = config_of(writer.root, run, follow=True, follow_timeout_minutes=0.01)
    with pytest.raises(UserError, match="no new units"):
        distill(short, CPU)
    assert json.loads((run / FACTS).read_text())["views"] == 2
    assert (run / "checkpoints" / "step-00000002").is_dir()
    timer = writer.later(1.0, group=1)
    summary = distill(config_of(writer.root, run, follow=True), CPU)
    timer.join()
    said = capfd.readouterr().out
    assert "images x 2 views planned (still growing)" in said
    assert "view 1 has 0 of 3 units" in said
    assert "resuming" in said
    assert losses(run) == losses(reference)
    assert len(losses(run)) == 6
    writer.finish()
    assert distill(config_of(writer.root, run), CPU) == summary
    shutil.rmtree(writer.root)
    tally = evaluate_run(run, None, CPU, 0)
    assert round(tally.top1_percent, 4) == summary["top1"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_described_before_its_view_is_loaded(tmp_path, workers):
    """With loader workers, the main process never loads the second group."""
    writer = Writer(tmp_path / "cache", two_groups())
    writer.commit(0)
    cache = follow.open_growing_cache(writer.root, 5, print)
    order = Order(num_samples=IMAGES, block=8, window=3, seed=0)
    loader = CacheLoader(cache, order, epochs=2, global_batch=12, micro_batch=6, workers=workers)
    assert loader.describe(0, 1).startswith("micro-batch 1 (view 0, shards units/g000-")
    assert loader.describe(2, 1) == "micro-batch 1 (view 1)"
    writer.commit(1)
    list(loader)
    assert (loader.describe(2, 1) == "micro-batch 1 (view 1)") == (workers > 0)


def test_a_run_keeps_its_views_when_the_cache_grows(reference, tmp_path, monkeypatch, capfd):
    root, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(two_groups().root, root)
    config = config_of(root, run)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            "scalekd_cache.training.trainer.Trainer._check_finite", lambda self, step, _: stop() if step == 3 else None
        )
        with pytest.raises(KeyboardInterrupt):
            distill(config, CPU)
    make_growing(root, {"num_views": 3})
    assert open_run_cache(config, run, CPU).views == 2
    (run / FACTS).unlink()  # the number of views is then read from the newest checkpoint
    distill(config, CPU)
    assert "this run reads the first 2" in capfd.readouterr().out
    assert losses(run) == losses(reference)  # epoch 2 reads view 0, not the new view 2
    assert open_run_cache(config_of(root, tmp_path / "new"), tmp_path / "new", CPU).views == 3
    assert open_run_cache(config_of(root, "x", train={"views": 1}), tmp_path / "new", CPU).views == 1
    with pytest.raises(UserError, match="fewer views than the run needs") as error:
        open_run_cache(config_of(root, "x", train={"views": 4}), tmp_path / "new", CPU)
    assert "--views 4" in str(error.value)


def test_a_run_that_followed_does_not_resume_with_fewer_views(tmp_path):
    """Followed to 3 views, then resumed without FOLLOW while the manifest still says 2."""
    root, run = two_groups().root, tmp_path / "run"
    run.mkdir()
    facts = {
        "fingerprint": two_groups().manifest.facts.fingerprint,
        "views": 3,
        "image_size": 64,
        "class_names": ["a"],
        "data": {"source": "demo"},
    }
    (run / FACTS).write_text(json.dumps(facts))
    with pytest.raises(UserError, match="fewer views than the run needs") as error:
        open_run_cache(config_of(root, run), run, CPU)
    assert "--follow" in str(error.value)


def test_a_run_describes_its_cache(tmp_path):
    reads = open_run_cache(config_of(two_groups().root, tmp_path), tmp_path, CPU)
    assert reads.describe() == [f"{two_groups().root}: {IMAGES} images x 2 views"]


def test_asking_for_fewer_views_removes_nothing_and_says_how_to_train_on_them(tmp_path, capfd):
    root = tmp_path / "cache"
    shutil.copytree(two_groups().root, root)
    make_growing(root, {"num_views": 1})
    assert "--train.views=1" in capfd.readouterr().out
    assert Cache.open(root).manifest.num_views == 2


def test_a_finished_run_without_checkpoints_names_its_exported_student(reference, tmp_path):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="this finished run has no usable checkpoint") as error:
        export_run(run, tmp_path / "out")
    assert str(run / "export") in str(error.value)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        export_run(run, tmp_path / "out")
