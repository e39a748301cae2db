"""Several processes give the same results as one: the same bytes in stage 1, the same losses in stage 2."""

import shutil
import socket

import pytest
from commands import (
    BIN,
    STEPS,
    STUDENT,
    TRAIN_OPTIONS,
    assert_same_losses,
    cache_flags,
    distill_flags,
    execute,
    file_bytes,
    launcher,
    make,
    read_json,
    run,
    steps_of,
)


@pytest.mark.parametrize("backend", [pytest.param("webdataset", marks=pytest.mark.ci_slow), "zarr"])
def test_who_wrote_a_cache_is_not_in_its_bytes(backend, cache, zarr_cache, weights, tmp_path):
    first = {"webdataset": cache, "zarr": zarr_cache}[backend]
    kind = {"cache.backend": backend}
    ways = {"again": cache_flags(tmp_path / "again", weights, **kind, workers=1)}
    run("cache_teacher", *ways["again"])
    ways["two"] = cache_flags(tmp_path / "two", weights, **kind)
    if backend == "zarr":
        run("cache_teacher", *ways["two"], nproc=2)
    else:
        execute(*launcher(2), "pipelines.cache_teacher", *ways["two"])
    expected = file_bytes(first / "units")
    assert len(expected) >= 3 * 4
    for name in ways:
        files = file_bytes(tmp_path / name / "units")
        assert files.keys() == expected.keys()
        assert [path for path in files if files[path] != expected[path]] == []
        assert (tmp_path / name / "tail.safetensors").read_bytes() == (first / "tail.safetensors").read_bytes()


@pytest.mark.parametrize("zero", [0, *(pytest.param(zero, marks=pytest.mark.ci_slow) for zero in (1, 2, 3))])
def test_two_processes_give_the_losses_of_one(zero, finished, cache, workshop):
    folder = workshop / "runs" / f"two-zero{zero}"
    words = distill_flags(cache, folder, **{"train.zero": zero})
    if zero == 0:  # one of the four with DeepSpeed's launcher, on a free port
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        execute(BIN / "deepspeed", "--num_gpus", 2, "--master_port", port, "--module", "pipelines.distill", *words)
    elif zero == 2:
        options = " ".join(f"{name}={value}" for name, value in TRAIN_OPTIONS.items())
        make("distill", NPROC=2, ZERO=2, STUDENT=STUDENT, CACHE=cache, RUN=folder, SET=options)
    else:
        run("distill", *words, nproc=2)
    summary, other = read_json(folder / "summary.json"), read_json(finished / "summary.json")
    assert (summary["world_size"], summary["zero"], summary["steps"]) == (2, zero, other["steps"])
    assert summary["val_images"] == other["val_images"]
    assert_same_losses(folder, finished, 1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, 0), (2, 1), id="1 to 2 processes"),
        pytest.param((2, 2), (1, 0), id="2 to 1 process", marks=pytest.mark.ci_slow),
        pytest.param((2, 3), (2, 0), id="ZeRO 3 to 0", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_processes(before, after, finished, cache, workshop):
    """A run that is stopped within an epoch and resumed has the losses of an uninterrupted run."""
    folder = workshop / "runs" / f"from-{before}-to-{after}"
    steps = {"train.checkpoint_steps": 2, "train.keep_checkpoints": 9}
    run("distill", *distill_flags(cache, folder, **steps, **{"train.zero": before[1]}), nproc=before[0])
    for later in sorted(folder.glob("checkpoints/step-*"))[1:]:  # simulates a stop after step 2
        shutil.rmtree(later)
    (folder / "summary.json").unlink()
    output = run("distill", *distill_flags(cache, folder, **{"train.zero": after[1]}), nproc=after[0])
    assert f"resuming {folder} after step 2 of {STEPS}" in output
    assert_same_losses(folder, finished, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_feature_share_on_two_processes_and_resumed(zero, cache, workshop):
    """Half of each micro-batch: the losses of one process, of two, and of a run that two processes resume."""
    compare_on_two_processes(cache, workshop / "runs", "share", zero, {"scalekd.feature_share": 0.5})


@pytest.mark.slow
def test_a_sparse_cache_on_two_processes_and_resumed(weights, workshop):
    """Made by two processes, with features for half of the views."""
    root = workshop / "caches" / "sparse"
    run("cache_teacher", *cache_flags(root, weights, **{"cache.stored_features": 0.5}), nproc=2)
    compare_on_two_processes(root, workshop / "runs", "sparse", 0, {})


@pytest.mark.slow
def test_two_teachers_on_two_processes_and_resumed(weights, workshop):
    """Both caches made in one pass by two processes; the second teacher has another grid and width."""
    root = workshop / "caches" / "teachers"
    given = {"teachers": "demo_swin,test_vit", "teacher.weights": f"{weights},", "teacher.pretrained": "false"}
    run("cache_teacher", *cache_flags(root, weights, **given), nproc=2)
    options = {"scalekd.balance": "scale", "scalekd.teacher_shares": "2,1"}
    compare_on_two_processes(f"{root}/demo_swin,{root}/test_vit", workshop / "runs", "teachers", 0, options)


def compare_on_two_processes(cache, runs, name, zero, options):
    """The losses of one process, of two, and of a run that two processes resume."""
    options = {**options, "train.checkpoint_steps": 2, "train.keep_checkpoints": 9}
    one, two = runs / f"{name}-one", runs / f"{name}-two-zero{zero}"
    if not one.exists():
        run("distill", *distill_flags(cache, one, **options))
    words = distill_flags(cache, two, **options, **{"train.zero": zero})
    run("distill", *words, nproc=2)
    assert_same_losses(two, one, 1e-4)
    whole = logged(two)
    for later in sorted(two.glob("checkpoints/step-*"))[1:]:
        shutil.rmtree(later)
    (two / "summary.json").unlink()
    assert "resuming" in run("distill", *words, nproc=2)
    assert logged(two) == whole


def logged(folder):
    rates = ("images_per_s", "data_wait")
    return [{name: value for name, value in line.items() if name not in rates} for line in steps_of(folder)]
