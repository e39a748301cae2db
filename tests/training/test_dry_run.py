"""Dry runs: the checks of the real run, nothing written; and the JSON of the reporting commands."""

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from cache_forms import FORMS
from commands import ENV, LIMIT_S, ROOT, execute
from small_cache import CPU, copy_of_cache, options, reseal, shared_cache, shared_weights
from small_run import SUMMARY, config_of
from unlabeled_cache import unlabeled_cache

from scalekd_cache.caching.job import dry_run
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.convert.timm_export import check_export_place
from scalekd_cache.errors import UserError
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.manifest import HELD_OUT
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_files import read_config
from scalekd_cache.training.run_folder import RunFolder, is_locked


def tree(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_of_training(tmp_path):
    said = "\n".join(plan_distill(config_of(tmp_path / "run"), CPU))
    assert "3 epochs, 3 steps per epoch, 32 images per step, 2 micro-batches of 16 per process" in said
    assert "student test_resnet: 0.37M parameters" in said
    assert f"would start at step 1 in {tmp_path / 'run'}" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_training_refuses(tmp_path):
    run = tmp_path / "run"
    RunFolder(run, to_plain(config_of(run))).write_facts({})
    with pytest.raises(UserError, match="a run of 3 epochs, not 4"):
        plan_distill(config_of(run, epochs=4), CPU)
    with pytest.raises(UserError, match="no model resnet5: did you mean"):
        plan_distill(DistillConfig(cache=str(shared_cache().root), student=StudentConfig(name="resnet5")), CPU)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        plan_distill(config_of(tmp_path / "file"), CPU)


@pytest.mark.parametrize("start", [plan_distill, distill])
@pytest.mark.parametrize(
    "off", [{"s3": False, "s4": False}, {"projector": "linear", "s4": False}, {"spatial_weight": 0, "frequency": False}]
)
def test_options_that_leave_no_loss(tmp_path, off, start):
    config = replace(config_of(tmp_path / "run", label_loss="none"), scalekd=ScaleKDConfig(logit_weight=0.0, **off))
    with pytest.raises(UserError, match=r"no loss(.|\n)*label_loss=none, scalekd.logit_weight=0, no feature losses"):
        start(config, CPU)
    assert not list(tmp_path.rglob("*.y*ml"))
    assert plan_distill(replace(config, train=replace(config.train, label_loss="ce")), CPU)
    assert plan_distill(replace(config, scalekd=replace(config.scalekd, logit_weight=0.5)), CPU)


def test_a_dry_run_opens_the_files_that_training_opens(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="the DeepSpeed JSON is missing"):
        plan_distill(config_of(run, deepspeed=str(tmp_path / "ds.json")), CPU)
    with pytest.raises(UserError, match="no initial weights in"):
        plan_distill(replace(config_of(run), init=str(tmp_path)), CPU)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the folder"):
        plan_distill(config_of(tmp_path / "file/run"), CPU)


def damaged_checkpoint(folder):
    (folder / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    return config_of(folder / "run")


def foreign_export(folder):
    (folder / "run" / "export").mkdir(parents=True)
    (folder / "run" / "export" / "notes.txt").touch()
    return config_of(folder / "run")


def temperature_with_top_k(folder, **train):
    cache = str(FORMS["shared pixels, top-k"]().root)
    return replace(config_of(folder / "run", **train), cache=cache, scalekd=ScaleKDConfig(temperature=4))


def images_gone(folder):
    cache = copy_of_cache(folder / "cache", "replayed")
    reseal(cache / "manifest.json", lambda fields: fields["data"].update(source=str(folder / "gone")))
    return replace(config_of(folder / "run"), cache=str(cache))


def held_out_gone(folder):
    shutil.copytree(unlabeled_cache().root, folder / "cache", ignore=shutil.ignore_patterns(HELD_OUT))
    return replace(config_of(folder / "run"), cache=str(folder / "cache"))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (damaged_checkpoint, "all checkpoints of this run are damaged"),
        (foreign_export, "the export folder contains other files"),
        (lambda folder: config_of(folder / "run", sync_bn=True), "sync_bn needs a GPU"),
        (temperature_with_top_k, "only temperature 1"),
        (images_gone, "not at the path stored in the cache"),
        (held_out_gone, "cannot read the teacher's outputs on held-out images"),
    ],
)
def test_a_dry_run_makes_the_checks_of_the_run(tmp_path, case, text):
    config = case(tmp_path)
    for start in (plan_distill, distill):
        with pytest.raises(UserError, match=text):
            start(config, CPU)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_live_targets_take_any_temperature(tmp_path):
    """The cache's top-k logits are not used."""
    plan = plan_distill(temperature_with_top_k(tmp_path, targets="live"), CPU)
    assert "dry run: nothing was written" in plan[-1]
    summary = distill(temperature_with_top_k(tmp_path, targets="live", epochs=1), CPU)
    assert summary["targets"] == "live"


@pytest.mark.parametrize("inside", ["", "units", "run/of/me"])
def test_a_run_is_not_written_into_a_cache(tmp_path, inside):
    cache = copy_of_cache(tmp_path / "cache")
    before = tree(cache)
    with pytest.raises(UserError, match=r"is (a cache|inside the cache \S+/cache): choose a different folder"):
        plan_distill(config_of(cache / inside), CPU)
    with pytest.raises(UserError, match=r"is (a cache|inside the cache \S+/cache): choose a different folder"):
        RunFolder(cache / inside, to_plain(config_of(cache / inside)))
    with pytest.raises(UserError, match=r"is (a cache|inside the cache \S+/cache): choose a different folder"):
        check_export_place(cache / inside)
    assert tree(cache) == before


def test_a_finished_training(tmp_path):
    run = tmp_path / "run"
    RunFolder(run, to_plain(config_of(run))).finish(SUMMARY)
    assert plan_distill(config_of(run), CPU) == [f"{run} is finished; nothing to do"]


def test_a_dry_run_of_stage_1(tmp_path, capsys):
    dry_run(options(tmp_path / "cache", shared_weights()), CPU)
    said = capsys.readouterr().out
    assert "would compute 3 of 3 units (192 views)" in said
    assert "192 views to compute, about" in said
    dry_run(options(tmp_path / "cache", shared_weights(), cache={"codec": "transform"}), CPU)
    assert "codec transform is not fitted in a dry run" in capsys.readouterr().out
    dry_run(
        options(tmp_path / "cache", "", teacher={"name": "demo_swin", "weights": None, "weights_dir": str(tmp_path)}),
        CPU,
    )
    assert "would first train the demo teacher" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_finished_cache_is_left_alone(capsys):
    before = tree(shared_cache().root)
    dry_run(options(shared_cache().root, shared_weights()), CPU)
    assert "would compute 0 of 3 units (0 views)" in capsys.readouterr().out
    with pytest.raises(UserError, match="different options"):
        dry_run(options(shared_cache().root, shared_weights(), views={"jpeg_quality": 50}), CPU)
    assert tree(shared_cache().root) == before


def test_the_commands(tmp_path):
    words = ("VENV=none", f"PYTHON={sys.executable}", "DRY_RUN=1", f"CACHE={shared_cache().root}")
    said = execute("make", "distill", *words, "STUDENT=test_resnet", f"RUN={tmp_path / 'run'}")
    assert "dry run: nothing was written" in said
    new = (f"CACHE={tmp_path / 'caches' / 'new'}", f"TEACHER_WEIGHTS={shared_weights()}", "SET=data.max_samples=32")
    assert "nothing was written" in execute("make", "cache-teacher", *words[:-1], *new, "VIEWS=1")
    assert not list(tmp_path.iterdir())  # no lock file either


def test_paths_without_a_cache(tmp_path, monkeypatch):
    root = shared_cache().root
    check_cache_path(str(root))
    check_cache_path("https://host/cache")
    with pytest.raises(UserError, match="is a file") as error:
        check_cache_path(str(root / "manifest.json"))
    assert f"set --cache {root}" in str(error.value)
    shutil.copytree(root, tmp_path / "caches" / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no cache caches/digit: did you mean caches/digits\?"):
        check_cache_path("caches/digit")


def test_a_mistyped_run_and_one_that_is_locked(tmp_path):
    run = tmp_path / "resnet18"
    folder = RunFolder(run, {"a": 1})
    folder.write_facts({})
    with pytest.raises(UserError, match=r"no run .*resnet81: did you mean .*resnet18\?"):
        read_config(tmp_path / "resnet81")
    for near in (tmp_path, run / "export"):  # the folder of runs, and a part of a run
        with pytest.raises(UserError, match=rf"no run {near}: did you mean {run}\?"):
            read_config(near)
    assert not is_locked(tmp_path / "resnet81")
    del folder
    assert not is_locked(run)
    with open(run / ".lock", "w") as lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = (
            "from pathlib import Path; from scalekd_cache.training.run_folder import is_locked; "
            f"print(is_locked(Path({str(run)!r})))"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.strip() == "True"


def command(*words, **options):
    whole = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(whole, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=LIMIT_S, **options)


def test_debug_gives_the_traceback_and_nothing_else_does():
    plain = command("pipelines.inspect_cache", "--cache", "nowhere")
    debug = command("pipelines.inspect_cache", "--cache", "nowhere", "--debug")
    assert (plain.returncode, "Traceback" in plain.stderr) == (2, False)
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert plain.stderr.startswith("error: there is no cache nowhere")


def test_json_for_scripts_and_a_closed_pipe():
    root = shared_cache().root
    facts = json.loads(command("pipelines.inspect_cache", "--cache", root, "--json").stdout)
    assert facts["images"] == 96
    assert json.loads(command("pipelines.verify", "--cache", root, "--json").stdout)["whole"] is True
    shell = f"{sys.executable} -m pipelines.inspect_cache --cache {root} | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stderr == ""
    assert done.stdout == f"cache: {root}\n"
