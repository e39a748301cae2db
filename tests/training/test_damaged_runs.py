"""Damaged files of a run, a full disk, a kill before the summary: one clear message or finding, with a fix."""

import json
import os

import pytest
from documented import call
from growing import two_groups
from small_cache import CPU
from small_run import FACTS, SUMMARY

from pipelines import evaluate, export, report
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.training.checkpoint import MODEL, OPTIMIZER, STUDENT, commit_checkpoint
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """A finished run with a checkpoint of random weights, two logged steps and no exported student."""
    path, student = tmp_path / "run", StudentConfig(name="test_resnet")
    folder = RunFolder(path, to_plain(DistillConfig(student=student)))
    folder.write_facts(FACTS)
    folder.start_metrics(0)
    for step in (1, 2):
        folder.log(step, {"loss": 1.0 / step, "lr": 0.1})
    folder.finish(SUMMARY)
    state = build_student(student, num_classes=2, image_size=64).model.state_dict()
    commit_checkpoint(folder.checkpoints, 2, {STUDENT: state, MODEL: {}, OPTIMIZER: {}}, {"loader": {}}, 1)
    return path


def large(path):
    path.touch()
    os.truncate(path, 1 << 40)


DAMAGE = {
    "empty": lambda path: path.touch(),
    "cut": lambda path: path.write_text('{"step": 1, "loss'),
    "another type": lambda path: path.write_text("[1]\n"),
    "not a number": lambda path: path.write_text(json.dumps({**FACTS, **SUMMARY, "views": float("nan")}) + "\n"),
    "not text": lambda path: path.write_bytes(b"\xff\x00\xfe"),
    "directory": lambda path: path.mkdir(),
    "loop of links": lambda path: path.symlink_to(path.name),
    "FIFO": lambda path: os.mkfifo(path),
    "too large": large,
}


@pytest.mark.parametrize("name", ["config.yaml", "cache.json", "summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_of_a_run_is_named(run, tmp_path, kind, name):
    (run / name).unlink()
    DAMAGE[kind](run / name)
    needed = name in ("config.yaml", "cache.json")
    page = tmp_path / "page.html"
    words = ["--run", str(run)]
    commands = {"report": lambda: call(report, [*words, "--out", str(page), "--images", "0"])}
    if needed:
        commands["evaluate"] = lambda: call(evaluate, [*words, "--device", "cpu"])
    if name != "metrics.jsonl":
        commands["export"] = lambda: call(export, [*words, "--out", str(tmp_path / "out")])
    for command, run_command in commands.items():
        if needed or command == "export":
            with pytest.raises(UserError) as error:
                run_command()
            assert name in str(error.value) or "config.yaml" in str(error.value), command
            assert "what to do" in str(error.value), command
        else:
            run_command()
            damaged_lines = name == "metrics.jsonl" and kind in ("another type", "not a number")
            silent = name == "metrics.jsonl" and kind in ("empty", "cut", "not text")  # no complete line
            text = page.read_text()
            assert silent or (("damaged line" if damaged_lines else name) in text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("target", ["metrics", "TensorBoard"])
def test_a_full_disk_is_one_message(tmp_path, target):
    folder = RunFolder(tmp_path / "run", {})
    folder.start_metrics(0)
    folder.log(1, {"loss": 1.0})
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    if target == "metrics":
        (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "kept")
        (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    else:
        os.dup2(os.open("/dev/full", os.O_WRONLY), folder._events._file.fileno())
    with pytest.raises(UserError, match="the disk is full"):
        folder.log(2, {"loss": 1.0})
    if target == "metrics":
        assert (tmp_path / "kept").read_text() == before


def test_killed_before_the_summary(tmp_path, monkeypatch):
    """With an export and card but no summary, a rerun writes the summary and leaves no other files."""
    run = tmp_path / "run"
    config = DistillConfig(
        cache=str(two_groups().root),
        run=str(run),
        student=StudentConfig(name="test_resnet"),
        optim=OptimConfig(name="adamw", lr=1e-3, base_batch_size=12),
        train=TrainConfig(epochs=1, global_batch_size=12, micro_batch_size=12, targets="none"),
    )

    def kill(folder, summary):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", kill)
        with pytest.raises(KeyboardInterrupt):
            distill(config, CPU)
    assert (run / "export" / "README.md").exists()
    summary = distill(config, CPU)
    assert json.loads((run / "summary.json").read_text()) == summary
    names = {path.name for path in run.iterdir()} - {".lock"}
    expected = {"config.yaml", "cache.json", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints", "export"}
    assert names == expected
    assert {path.name for path in (run / "export").iterdir()} == {"README.md", "config.json", "model.safetensors"}
