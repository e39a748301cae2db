"""Several seeds and students in one command."""

import dataclasses
import json

import pytest
from small_cache import CPU, shared_cache
from small_run import SUMMARY

from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.training import series
from scalekd_cache.training.run_files import read_config
from scalekd_cache.training.series import distill_series, series_table, single_runs, summarize_series


def config_of(name="resnet18", run=None, **train):
    return DistillConfig(run=run, student=StudentConfig(name=name), train=TrainConfig(**train))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(), [("resnet18", 0, "runs/resnet18")]),
        (config_of(run="r", seed=3), [("resnet18", 3, "r")]),
        (config_of(targets="none", seeds="0"), [("resnet18", 0, "runs/resnet18-none-seed0")]),
        (config_of(run="r", seeds="2, 0,2"), [("resnet18", 2, "r-seed2"), ("resnet18", 0, "r-seed0")]),
        (config_of("a,b"), [("a", 0, "runs/a"), ("b", 0, "runs/b")]),
        (
            config_of("a, b", run="r", seeds="0,1"),
            [("a", 0, "r-a-seed0"), ("a", 1, "r-a-seed1"), ("b", 0, "r-b-seed0"), ("b", 1, "r-b-seed1")],
        ),
    ],
)
def test_single_runs_and_their_folders(config, expected):
    runs = single_runs(config)
    assert [(run.student.name, run.train.seed, run.run) for run in runs] == expected
    assert all(run.train.seeds is None for run in runs)


@pytest.mark.parametrize("seeds", ["a", "0;1", "-1", "0,,x", ""])
def test_seeds_are_numbers(seeds):
    if seeds:
        with pytest.raises(UserError, match=r"train\.seeds"):
            TrainConfig(seeds=seeds)
    assert series.seeds_of(DistillConfig()) == []


def test_mean_and_sample_deviation():
    runs = [{**SUMMARY, "seed": seed, "top1": top1, "minutes": 1.5} for seed, top1 in enumerate((90.0, 92.0, 94.0))]
    other = {**SUMMARY, "student": "resnet50", "top1": None, "top5": None}
    rows = summarize_series([*runs, other])
    assert json.loads(json.dumps(rows)) == rows
    first = {name: rows[0][name] for name in ("n", "seeds", "top1", "top1_mean", "top1_std", "top5_std", "minutes")}
    assert first == {
        "n": 3, "seeds": [0, 1, 2], "top1": [90, 92, 94], "top1_mean": 92, "top1_std": 2, "top5_std": 0, "minutes": 4.5,
    }  # fmt: skip
    assert (rows[1]["n"], rows[1]["top1_mean"], rows[1]["top1_std"]) == (1, None, None)
    table = series_table(rows).splitlines()
    assert table[0].split()[:5] == ["student", "targets", "n", "top-1", "std"]
    assert table[1].split()[:5] == ["resnet18", "cached", "3", "92.00%", "2.00"]
    assert "not measured  -" in table[2]
    assert table[1].endswith("4.5 minutes")


def test_a_series_of_runs(tmp_path, capsys):
    """Two seeds; a rerun finds both finished. A student that does not exist ends the series before its first run."""
    train = TrainConfig(epochs=1, global_batch_size=32, micro_batch_size=16, seeds="0,1", eval_epochs=1)
    config = DistillConfig(
        cache=str(shared_cache().root), run=str(tmp_path / "r"), student=StudentConfig(name="test_resnet"), train=train
    )
    wrong = dataclasses.replace(config, student=StudentConfig(name="test_resnet,resnet5"))
    with pytest.raises(UserError, match="no model resnet5"):
        distill_series(single_runs(wrong), CPU)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no model resnet5"):  # alone, as a single run too
        distill_series(single_runs(dataclasses.replace(config, student=StudentConfig(name="resnet5"))), CPU)
    assert not list(tmp_path.iterdir())
    summaries = distill_series(single_runs(config), CPU)
    assert [summary["seed"] for summary in summaries] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-seed0", "r-seed1"]
    assert read_config(tmp_path / "r-seed1")["train"]["seeds"] is None
    assert "run 2 of 2" in capsys.readouterr().out
    assert distill_series(single_runs(config), CPU) == summaries
