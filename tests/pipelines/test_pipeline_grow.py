"""Growing and sharing caches with the user's commands, with a writer running next to the student."""

import subprocess
import time

import pytest
from commands import (
    CACHE_OPTIONS,
    ENV,
    LIMIT_S,
    ROOT,
    STEPS,
    STUDENT,
    TRAIN_OPTIONS,
    assert_same_losses,
    cache_flags,
    distill_flags,
    launcher,
    make,
    read_json,
    run,
    snapshot,
    steps_of,
)


def words(options):
    return " ".join(f"{name}={value}" for name, value in options.items())


def wait_for_text(file, text, process):
    """Wait until a running process has printed this text; the writer of the tests starts faster than the student."""
    end = time.monotonic() + LIMIT_S
    while text not in file.read_text():
        assert process.poll() is None, file.read_text()[-3000:]
        assert time.monotonic() < end, f"{text} is not printed"
        time.sleep(0.1)


def exact(folder):
    rates = ("images_per_s", "data_wait")
    return [{name: value for name, value in line.items() if name not in rates} for line in steps_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "nproc", "workers"), [("webdataset", 2, 0), ("zarr", 1, 1)])
def test_a_student_follows_a_writer(backend, nproc, workers, weights, tmp_path):
    """The student starts first: it waits for the plan, the first group, and the second group."""
    cache, run_folder = tmp_path / "cache", tmp_path / "followed"
    options = {**TRAIN_OPTIONS, "train.epochs": 3, "train.workers": workers}
    flags = distill_flags(cache, run_folder, **options, follow="true")
    with open(tmp_path / "output", "w") as output:
        command = [*map(str, launcher(nproc)), "pipelines.distill", *flags]
        student = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for_text(tmp_path / "output", f"waiting for `scalekd cache-teacher` to start writing {cache}", student)
            # Small batches and one view at a time make the writer slow.
            layout = {"cache.backend": backend, "cache.views_per_group": 1, "teacher.batch_size": 1}
            run("cache_teacher", *cache_flags(cache, weights, **layout))
            assert student.wait(LIMIT_S) == 0, (tmp_path / "output").read_text()[-3000:]
        finally:
            student.kill()
            student.wait()
    said = (tmp_path / "output").read_text()
    waits = [
        line for line in said.splitlines() if f"waiting for `scalekd cache-teacher` to start writing {cache}" in line
    ]
    assert len(waits) == len(set(waits)) > 0  # once a minute, by one rank
    run("distill", *distill_flags(cache, tmp_path / "after", **options), nproc=nproc)
    assert exact(run_folder) == exact(tmp_path / "after")
    assert len(exact(run_folder)) == 9
    assert read_json(run_folder / "summary.json")["views"] == 2
    assert ": top-1 " in make("evaluate", RUN=run_folder)


@pytest.mark.slow
def test_make_shares_pixels_and_trains_from_them(cache, finished, weights, tmp_path):
    before = snapshot(cache)
    second = tmp_path / "second"
    shard = {name: CACHE_OPTIONS[name] for name in ("cache.samples_per_shard", "teacher.check_classes")}
    output = make(
        "cache-teacher", CACHE=second, PIXELS_FROM=cache, CODEC="float16", TEACHER_WEIGHTS=weights, SET=words(shard)
    )
    assert "0 for pixels, shared with" in output
    assert snapshot(cache) == before
    folder = tmp_path / "run"
    output = make("distill", NPROC=2, STUDENT=STUDENT, CACHE=second, RUN=folder, SET=words(TRAIN_OPTIONS))
    assert f"pixels from {cache}" in output
    assert len(steps_of(folder)) == STEPS
    assert_same_losses(folder, finished, 0.02)  # targets of the same views from another codec
    assert exact(folder) != exact(finished)
    make("distill", status=2, STUDENT=STUDENT, CACHE=second, RUN=tmp_path / "no", PIXELS_FROM=tmp_path / "nothing")


@pytest.mark.slow
def test_make_adds_views_and_touches_nothing(weights, tmp_path):
    cache = tmp_path / "cache"
    options = words({"data.max_samples": 48, "cache.samples_per_shard": 16})
    make("cache-teacher", CACHE=cache, TEACHER_WEIGHTS=weights, VIEWS=8, SET=options)
    before = {name: facts for name, facts in snapshot(cache).items() if name not in ("plan.json", "manifest.json")}
    output = make("cache-teacher", CACHE=cache, TEACHER_WEIGHTS=weights, VIEWS=16, SET=options)
    assert "48 images x 16 views" in output
    after = snapshot(cache)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 + 2 * 3 * (3 + 2 * 4)
    output = make("cache-teacher", CACHE=cache, TEACHER_WEIGHTS=weights, VIEWS=8, SET=options)
    assert "views are never removed" in output
    assert "train.views=8" in output
    assert snapshot(cache) == after
