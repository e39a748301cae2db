"""Both stages with the user's commands, in one process."""

import os
import signal
import subprocess
import time

import pytest
import timm
import torch
import yaml
from commands import (
    ENV,
    LIMIT_S,
    ROOT,
    STEPS,
    STUDENT,
    TERMS,
    assert_same_losses,
    cache_flags,
    distill_flags,
    file_bytes,
    launcher,
    make,
    metric_lines,
    read_json,
    run,
    snapshot,
    steps_of,
)


def test_make_help_names_targets_and_variables():
    output = make("help")
    for word in (
        "make cache-teacher",
        "make distill",
        "make evaluate",
        "make export",
        " STUDENT ",
        " TEACHER_WEIGHTS ",
    ):
        assert word in output


def test_make_distill_asks_for_a_student():
    output = make("distill", status=2)
    assert "set STUDENT, for example" in output
    assert "Traceback" not in output


def test_run_folder_holds_what_was_asked_and_measured(finished, cache):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["student"]["name"] == STUDENT
    assert config["train"]["epochs"] == 2
    lines = steps_of(finished)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert {"step", "epoch", "loss", *TERMS, "lr", "images_per_s", "data_wait"} <= set(line)
        assert line["loss"] == pytest.approx(sum(line[name] for name in TERMS), rel=1e-6)
        assert line["epoch"] == (line["step"] - 1) // 3
        assert line["images_per_s"] > 0
        assert 0 <= line["data_wait"] <= 1
    assert min(line[name] for line in lines for name in TERMS[:-1]) > 0
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in metric_lines(finished) if "top1" in line] == [3, STEPS]
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    tags = sorted(folder.name for folder in (finished / "checkpoints").glob("step-*"))
    assert tags == ["step-00000006"]


def test_summary_agrees_with_the_cache(finished, cache):
    summary, manifest = read_json(finished / "summary.json"), read_json(cache / "manifest.json")
    assert summary["student"] == STUDENT
    assert summary["teacher"] == "demo_swin"
    assert summary["targets"] == "cached"
    assert (summary["epochs"], summary["steps"], summary["views"]) == (2, STEPS, 2)
    assert summary["cache_fingerprint"] == manifest["fingerprint"]
    assert summary["teacher_top1"] == manifest["teacher"]["top1"]
    assert 0 <= summary["top1"] <= summary["top5"] <= 100
    assert summary["images_per_s"] > 0
    on_disk = sum(len(data) for data in file_bytes(cache / "units").values()) / (96 * 2)
    assert summary["bytes_per_view"] == pytest.approx(on_disk, rel=0.1)


def test_evaluate_gives_the_accuracy_of_the_summary(finished):
    output = make("evaluate", RUN=finished, JSON=1)
    line = yaml.safe_load(next(line for line in output.splitlines() if line.startswith("{")))
    assert "% of" not in output
    summary = read_json(finished / "summary.json")
    assert line["images"] == summary["val_images"] > 0
    assert line["top1"] == pytest.approx(summary["top1"], abs=1e-4)
    assert line["top5"] == pytest.approx(summary["top5"], abs=1e-4)


def test_export_loads_by_plain_timm(finished, tmp_path):
    output = make("export", RUN=finished, OUT=tmp_path / "student")
    assert "create_model('local-dir:" in output
    again, first = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        for folder in (tmp_path / "student", finished / "export")
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), first(images))
    assert again.num_classes == 10
    assert not list(finished.glob("export/*.bin"))


def test_verify_says_whole_and_then_what_is_broken(cache, tmp_path):
    assert "no problems (every byte checked" in make("verify", CACHE=cache, DEEP=1)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(cache), str(copy)], check=True)
    tar = copy / "units" / "g000-r00001" / "v0001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    output = run("verify", *("--cache", copy, "--deep", "true"), status=1)
    assert "g000-r00001/v0001.tar" in output


def test_caching_again_touches_nothing(cache, weights):
    before = snapshot(cache)
    output = run("cache_teacher", *cache_flags(cache, weights))
    assert "nothing to do" in output
    assert snapshot(cache) == before


def test_distilling_again_touches_nothing_and_knows_the_student_alone(finished, alone, cache):
    before = snapshot(finished)
    output = run("distill", *distill_flags(cache, finished))
    assert "nothing to do" in output
    assert snapshot(finished) == before
    top1 = read_json(alone / "summary.json")["top1"]
    assert f"top-1 {top1:.2f}% with the same number of steps" in output


def test_without_targets_the_same_samples_train_on_labels_only(finished, alone):
    lines, taught = steps_of(alone), steps_of(finished)
    assert len(lines) == len(taught)
    for line in lines:
        assert line["loss"] == line["label"]
        assert not any(line[name] for name in TERMS if name != "label")
    # The first step's learning rate is 0, so these two losses depend only on samples, views and initial weights.
    assert lines[0]["lr"] == 0
    for line, other in zip(lines[:2], taught[:2]):
        assert line["label"] == pytest.approx(2 * other["label"], rel=1e-5)  # with targets, labels have weight 1/2


def test_zarr_and_webdataset_give_the_same_losses(finished, zarr_cache, cache, workshop):
    assert read_json(zarr_cache / "manifest.json")["fingerprint"] == read_json(cache / "manifest.json")["fingerprint"]
    folder = workshop / "runs" / "zarr"
    run("distill", *distill_flags(zarr_cache, folder))
    assert_same_losses(folder, finished, 1e-6)


def test_lossless_cache_gives_the_losses_of_the_live_teacher(workshop, weights):
    cache = workshop / "caches" / "float32"
    # The teacher gets the same batch size in both: on some machines its summation order depends on it, and AdamW
    # amplifies the last bit of a gradient near 0.
    run("cache_teacher", *cache_flags(cache, weights, **{"cache.codec": "float32", "teacher.batch_size": 8}))
    options = {"train.global_batch_size": 8, "train.micro_batch_size": 8}
    folders = {}
    for targets in ("cached", "live"):
        folders[targets] = workshop / "runs" / f"float32-{targets}"
        run("distill", *distill_flags(cache, folders[targets], **{**options, "train.targets": targets}))
    assert len(steps_of(folders["live"])) >= 20
    assert_same_losses(folders["cached"], folders["live"], 1e-4, steps=20)


@pytest.mark.parametrize(
    ("sent", "status", "saved"),
    [(signal.SIGKILL, -9, 3), pytest.param(signal.SIGTERM, 75, None, marks=pytest.mark.ci_slow)],
)
def test_an_interrupted_run_goes_on_where_its_checkpoint_is(finished, cache, workshop, sent, status, saved):
    """After a kill, a run resumes at the end of an epoch; after a stop signal, at the step of the signal."""
    folder = workshop / "runs" / sent.name
    words = distill_flags(cache, folder)
    command = [*map(str, launcher()), "pipelines.distill", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = folder / "metrics.jsonl"
    try:
        deadline = time.monotonic() + LIMIT_S
        # The step after the checkpoint is logged and then lost.
        while not (metrics.exists() and '"step": 4, "loss"' in metrics.read_text()):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, sent)
        assert process.wait(LIMIT_S) == status
    step = int(sorted(folder.glob("checkpoints/step-*"))[-1].name.removeprefix("step-"))
    assert step == saved or (saved is None and 4 <= step < STEPS)
    assert not list(folder.glob("checkpoints/.tmp-*"))
    assert not (folder / "summary.json").exists()
    output = run("distill", *words)
    assert f"resuming {folder} after step {step} of {STEPS}" in output
    assert "built successfully" not in output  # DeepSpeed prints it at every start
    assert [line["step"] for line in steps_of(folder)] == list(range(1, STEPS + 1))
    assert_same_losses(folder, finished, 1e-5)
    assert read_json(folder / "summary.json")["top1"] == read_json(finished / "summary.json")["top1"]
