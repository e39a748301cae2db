"""Trackers receive the content of metrics.jsonl. No servers: CSV, mlflow's folder, mocks of wandb and trackio."""

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import types

import pytest
from commands import metric_lines
from small_cache import CPU, shared_cache

from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.trackers import Tracker

OPTIONS = {"train": {"epochs": 2, "deepspeed": None}, "student": {"mean": [0.5, 0.5, 0.5]}}


def config_of(run, tracker, epochs=2):
    small = TrainConfig(epochs=epochs, global_batch_size=48, micro_batch_size=16, log_every=1, tracker=tracker)
    return DistillConfig(
        cache=str(shared_cache().root), run=str(run), student=StudentConfig(name="test_resnet"), train=small
    )


def test_a_csv_file_and_a_function_get_every_line(tmp_path):
    run, seen = tmp_path / "run", []
    distill(config_of(run, "csv"), CPU, log=lambda step, values: seen.append({"step": step, **values}))
    lines = metric_lines(run)
    assert seen == lines
    assert len(lines) == 6  # four steps, and an evaluation after each of the two epochs
    assert [line["step"] for line in lines if "top1" in line] == [2, 4]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items() if value} for row in rows] == lines
    assert not (run / "tracker.json").exists()


class Session:
    """The API of wandb and trackio that is used."""

    def __init__(self):
        self.started, self.lines, self.ended = [], [], 0

    def init(self, **given):
        self.started.append(given)
        return self

    def log(self, values, step):
        self.lines.append({"step": step, **values})

    def finish(self):
        self.ended += 1


@pytest.fixture
def stand_in(monkeypatch):
    def install(name):
        session, module = Session(), types.ModuleType(name)
        module.init = session.init
        monkeypatch.setitem(sys.modules, name, module)
        return session

    return install


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_continues_in_its_tracker(tmp_path, stand_in, name):
    session = stand_in(name)
    for step in (1, 2):
        tracker = Tracker(name, tmp_path, OPTIONS, print)
        tracker(step, {"loss": 0.5})
        tracker.close()
    assert session.lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert session.ended == 2
    assert session.started[0]["config"] == {
        "train.epochs": 2,
        "train.deepspeed": "None",
        "student.mean": "[0.5, 0.5, 0.5]",
    }
    first, second = session.started
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("scalekd-cache", tmp_path.name, "allow")
    other = tmp_path / "other"
    other.mkdir()
    Tracker(name, other, OPTIONS, print).close()
    if name == "wandb":
        assert session.started[2]["id"] != first["id"]
        (other / "tracker.json").write_text("[")
        Tracker(name, other, OPTIONS, print).close()
        assert session.started[3]["id"] != session.started[2]["id"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, stand_in, capsys):
    session = stand_in("wandb")

    def fail(*_, **__):
        raise OSError("no route to host")

    session.log = fail
    tracker = Tracker("wandb", tmp_path, OPTIONS, print)
    tracker(1, {"loss": 1.0})
    tracker(2, {"loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out.count("the tracker wandb failed and was turned off") == 1
    session.init = sys.modules["wandb"].init = fail
    with pytest.raises(UserError, match=r"cannot start the tracker wandb(.|\n)*no route(.|\n)*WANDB_MODE=offline"):
        Tracker("wandb", tmp_path, OPTIONS, print)


def test_mlflow_logs_into_the_run_folder_without_settings(tmp_path, monkeypatch):
    """Two runs of one process do not share a folder, as with `--seeds`."""
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    many = {"train": {f"option{number}": number for number in range(150)}}
    for run in (tmp_path / "a b", tmp_path / "b"):
        run.mkdir()
        for step in (1, 2):
            tracker = Tracker("mlflow", run, many, print)
            tracker(step, {"loss": 0.5 / step, "swin/s4": 1.0})
            tracker.close()
        kept = json.loads((run / "tracker.json").read_text())["mlflow"]
        client = mlflow.MlflowClient((run / "mlruns").as_uri())
        assert [(one.step, one.value) for one in client.get_metric_history(kept, "loss")] == [(1, 0.5), (2, 0.25)]
        found = client.get_run(kept)
        assert (found.info.status, found.info.run_name, len(found.data.params)) == ("FINISHED", run.name, 150)


def test_a_run_resumes_although_its_mlruns_folder_was_deleted(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    code = "import sys; from pathlib import Path; from scalekd_cache.training.trackers import Tracker; "
    code += "Tracker('mlflow', Path(sys.argv[1]), {}, print).close()"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)  # mlflow keeps its stores open in a process
    shutil.rmtree(tmp_path / "mlruns")
    tracker = Tracker("mlflow", tmp_path, OPTIONS, print)
    tracker(2, {"loss": 0.5})
    tracker.close()
    kept = json.loads((tmp_path / "tracker.json").read_text())["mlflow"]
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    assert [one.value for one in client.get_metric_history(kept, "loss")] == [0.5]


def test_mlflow_uses_the_given_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run = tmp_path / "run"
    run.mkdir()
    Tracker("mlflow", run, OPTIONS, print).close()
    assert mlflow.MlflowClient().get_run(json.loads((run / "tracker.json").read_text())["mlflow"])
    assert [file.name for file in run.iterdir()] == ["tracker.json"]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_cannot_start_leaves_no_run(tmp_path, stand_in, name):
    run = tmp_path / "runs" / "run"

    def fail(**_):
        if name == "wandb":  # its log of the failure
            (run / name).mkdir()
        raise OSError("no API key")

    stand_in(name)
    sys.modules[name].init = fail
    with pytest.raises(UserError, match=rf"cannot start the tracker {name}\n(.|\n)*no API key(.|\n)*remove --tracker"):
        distill(config_of(run, name), CPU)
    assert not run.parent.exists()


def test_a_missing_tracker_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of(tmp_path / "run", "wandb")
    for start in (plan_distill, distill):
        with pytest.raises(UserError, match=r"train\.tracker=wandb needs wandb(.|\n)*\[wandb\]"):
            start(config, CPU)
    assert not (tmp_path / "run").exists()
    assert dataclasses.replace(config.train, tracker="csv").tracker == "csv"
