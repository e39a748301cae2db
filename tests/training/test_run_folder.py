"""Run folders: lock, options, metrics across interruptions, the summary table."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from small_run import FACTS, SUMMARY

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.training import metrics
from scalekd_cache.training.run_files import read_config, read_facts, read_summary
from scalekd_cache.training.run_folder import RunFolder, check_config, check_same_cache, with_weights_of_run
from scalekd_cache.training.run_summary import baseline_summary, summary_table


def finished(path, init=None, **changes):
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (path / "config.yaml").write_text(json.dumps(to_plain(DistillConfig(init=init))))
    return path


def test_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run", {"a": 1})
    with pytest.raises(UserError, match="another process is training") as error:
        RunFolder(tmp_path / "run", {"a": 1})
    assert str(tmp_path / "run") in str(error.value)
    script = f"""
from pathlib import Path
from scalekd_cache.training.run_folder import RunFolder
RunFolder(Path({str(tmp_path / "run")!r}), {{"a": 1}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "another process is training in" in done.stderr
    del folder
    RunFolder(tmp_path / "run", {"a": 1})


def test_other_options_are_named(tmp_path):
    path = tmp_path / "run"
    config = DistillConfig(train=TrainConfig(epochs=3))
    RunFolder(path, {"a": 1})  # rejected before its first step, so nothing is kept
    RunFolder(path, to_plain(config)).write_facts({})
    assert read_config(path) == to_plain(config) == yaml.safe_load((path / "config.yaml").read_text())
    RunFolder(path, to_plain(config))
    with pytest.raises(UserError, match="different options") as error:
        RunFolder(path, to_plain(DistillConfig(train=TrainConfig(epochs=4, seed=1))))
    assert "got: train.epochs=4, train.seed=1" in str(error.value)
    assert "expected: train.epochs=3, train.seed=0" in str(error.value)
    assert f", or delete {path}, which has no checkpoint" in str(error.value)
    assert "different options\n" in str(error.value)
    assert read_config(path) == to_plain(config)
    with pytest.raises(UserError, match=r"contains a run with different options \(it uses the cache caches/demo\)\n"):
        RunFolder(path, to_plain(DistillConfig(cache="caches/photos", train=TrainConfig(epochs=3, seed=1))))


@pytest.mark.parametrize(
    ("epochs", "extend", "got", "fix"),
    [
        (5, True, "optim.lr=0.3", "to extend it: scalekd distill --run {run} --epochs 5 --extend; for a new run"),
        (5, False, "optim.lr=0.3, train.epochs=5", "to resume it: scalekd distill --run {run} --resume; for a new run"),
        (3, True, "optim.lr=0.3", "to resume it: "),
        (2, True, "optim.lr=0.3, train.epochs=2", "to resume it: "),
    ],
)
def test_more_epochs_of_an_extended_run_are_not_a_different_option(tmp_path, epochs, extend, got, fix):
    path = tmp_path / "run"
    RunFolder(path, to_plain(DistillConfig(train=TrainConfig(epochs=3)))).write_facts({})
    given = DistillConfig(train=TrainConfig(epochs=epochs), optim=OptimConfig(lr=0.3), extend=extend)
    with pytest.raises(UserError, match="different options") as error:
        RunFolder(path, to_plain(given))
    lines = str(error.value).splitlines()
    assert lines[1] == f"  got: {got}"
    assert lines[3].startswith("  what to do: " + fix.format(run=path))
    RunFolder(path, to_plain(DistillConfig(train=TrainConfig(epochs=5), extend=True)))
    with pytest.raises(UserError, match=r"3 epochs, not 2\n.*; to extend it, set --epochs above 3; to start over"):
        RunFolder(path, to_plain(DistillConfig(train=TrainConfig(epochs=2), extend=True)))


def test_an_option_that_is_younger_than_the_run_has_its_default(tmp_path):
    path, config = tmp_path / "run", DistillConfig()
    RunFolder(path, to_plain(config)).write_facts({})
    text = (path / "config.yaml").read_text()
    assert "  balance: fixed\n" in text
    (path / "config.yaml").write_text(text.replace("  balance: fixed\n", ""))
    RunFolder(path, to_plain(config))
    other = to_plain(config)
    other["scalekd"] = {**other["scalekd"], "balance": "scale"}
    with pytest.raises(UserError, match="different options"):
        RunFolder(path, other)


def test_a_run_keeps_the_feature_weights_that_it_started_with(tmp_path):
    """config.yaml has numbers, in runs from before the rule too; a command without numbers resumes with them."""
    given = DistillConfig()
    for classes in (10, 1000):
        run, started = tmp_path / str(classes), given.on_data(classes=classes)
        folder = RunFolder(run, to_plain(with_weights_of_run(given, run)))
        folder.set_weights(started.scalekd)
        folder.write_facts({})
        folder.close()
        assert read_config(run) == to_plain(started)
        assert with_weights_of_run(given, run) == started
        check_config(run, to_plain(with_weights_of_run(given, run)))
        other = replace(given, scalekd=ScaleKDConfig(spatial_weight=0.04))
        with pytest.raises(UserError, match="different options") as error:
            check_config(run, to_plain(with_weights_of_run(other, run)))
        assert f"expected: scalekd.spatial_weight={started.scalekd.spatial_weight}" in str(error.value)
    run = tmp_path / "set by hand"
    RunFolder(run, to_plain(other.on_data(classes=10))).write_facts({})
    with pytest.raises(UserError, match="different options"):
        check_config(run, to_plain(with_weights_of_run(given, run)))
    check_config(run, to_plain(with_weights_of_run(other, run)))


def test_folders_without_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file", {})
    with pytest.raises(UserError, match="no run"):
        read_config(tmp_path)
    for text in (
        "- 1",
        "cache: caches/a\nstudent:\n  name: resnet50\ntrain:\n  epochs: 3\n",
    ):  # the second is truncated
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="configuration is damaged"):
            read_config(tmp_path)
    with pytest.raises(UserError, match=r"this run has no cache\.json"):
        read_facts(tmp_path)


def test_metrics_after_an_interruption_have_each_step_once(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder(path, {})
    folder.start_metrics(0)
    for step in (10, 20, 30, 40):
        folder.log(step, {"loss": step / 10, "lr": 0.1})
    folder._events.close()
    del folder
    folder = RunFolder(path, {})
    folder.start_metrics(20)
    folder.log(30, {"loss": 7.0})
    assert folder.summary() is None
    folder.finish(SUMMARY)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0] == {"step": 10, "loss": 1.0, "lr": 0.1}
    assert lines[2] == {"step": 30, "loss": 7.0}
    assert folder.summary() == read_summary(path) == SUMMARY
    assert list((path / "tensorboard").glob("events*"))


def test_a_line_that_was_cut_by_the_interruption_is_dropped(tmp_path):
    folder = RunFolder(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    folder.start_metrics(30)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10, "loss": 1.0}\n'


def test_a_damaged_summary_is_reported(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary is not valid JSON"):
        read_summary(tmp_path)


def test_the_summary_table_without_a_baseline(tmp_path):
    run = finished(tmp_path / "resnet18")
    lines = summary_table(run, SUMMARY).splitlines()
    assert lines[1:-1] == [
        "teacher   demo_swin, top-1 97.00%",
        "student   resnet18, top-1 91.25%, top-5 99.50%",
        "targets   cached",
        "baseline  no run with as many steps yet (train it with --targets none)",
        "epochs    3 (66 steps, 120 images/s)",
        "time      2.3 minutes",
        "cache     4 views, 6,245 bytes per view, including pixels",
        f"run       {run}",
        f"export    {run}/export",
    ]
    assert set(lines[0]) == set(lines[-1]) == {"-"}
    nothing = summary_table(run, {**SUMMARY, "top1": None, "top5": None, "teacher_top1": None})
    assert "student   resnet18, top-1 not measured\n" in nothing


def test_the_summary_table_with_a_baseline(tmp_path):
    run = finished(tmp_path / "resnet18")
    alone = finished(tmp_path / "resnet18-none", targets="none", top1=88.0)
    assert "baseline  top-1 88.00% with the same number of steps" in summary_table(run, SUMMARY)
    assert "baseline" not in summary_table(alone, {**SUMMARY, "targets": "none"})


@pytest.mark.parametrize(
    "change",
    [
        {"student": "resnet50"},
        {"image_size": 160},
        {"steps": 65},
        {"seed": 1},
        {"cache_fingerprint": "e" * 64},
        {"targets": "live"},
        {"init": "runs/before"},
    ],
)
def test_only_a_comparable_run_is_the_baseline(tmp_path, change):
    run = finished(tmp_path / "run")
    finished(tmp_path / "other", **{"targets": "none", **change})
    assert baseline_summary(run, SUMMARY) is None
    finished(tmp_path / "same", targets="none")
    assert baseline_summary(run, SUMMARY) is not None


def test_a_run_belongs_to_one_cache(tmp_path):
    run = tmp_path / "run"
    check_same_cache(run, "f" * 64, tmp_path / "cache")  # nothing exists yet
    RunFolder(run, {"seed": 0}).write_facts(FACTS)
    check_same_cache(run, "f" * 64, tmp_path / "cache")
    with pytest.raises(UserError, match="a different cache") as error:
        check_same_cache(run, "b" * 64, tmp_path / "other")
    assert "bbbb" in str(error.value)
    assert "ffff" in str(error.value)


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ('{"step": 3, "loss": 1.0}\n{"step": 3, "top1": 9.0}\n', 1 << 20, True),
        ('{"step": 3, "loss": 1.0}\n{"step": 2, "top1": 9.0}\n', 1 << 20, False),
        ('{"step": 3, "loss": 1.0}\n', 10, True),
    ],
    ids=["evaluated", "not evaluated", "too large"],
)
def test_whether_a_step_is_evaluated(tmp_path, monkeypatch, text, limit, expected):
    folder = RunFolder(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(metrics, "SHOWN_BYTES", limit)
    assert folder.is_evaluated(3) is expected
    folder.close()
