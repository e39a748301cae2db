"""Stage-1 jobs: complete, resumed, rejected before anything is written, repaired."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import ENV, LIMIT_S, ROOT
from safetensors.torch import load_file, save_file
from small_cache import CPU, SAMPLES, VIEWS, copy_of_cache, make, options, shared_weights, unit_files, write_weights

from scalekd_cache.caching import make_units as caching
from scalekd_cache.caching import prepare
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache


def everything(root):
    return {path: (s.st_ino, s.st_mtime_ns) for path in root.rglob("*") if (s := path.stat())}


@pytest.fixture
def no_work(monkeypatch):
    """Fail if a view is made."""

    shared_weights()  # creates its cache if no test has used it yet

    def fail(*args):
        raise AssertionError("a view was made")

    monkeypatch.setattr(caching, "_append_batch", fail)


def write_recipe(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(f"distill: {{{text}}}")
    return file


def test_a_cache_says_what_it_is(tmp_path, capsys):
    root = tmp_path / "deep" / "cache"
    recipe = write_recipe(tmp_path, "train: {epochs: 7, deepspeed: ds.json}, data: pictures")
    manifest = make(root, shared_weights(), recipe=str(recipe)).manifest
    out = capsys.readouterr().out
    assert f"{SAMPLES} images x {VIEWS} views" in out
    assert f"{SAMPLES * VIEWS:,} views to compute" in out
    assert f"{root}: " in out
    assert manifest.facts.recipe == str(recipe)
    assert manifest.facts.distill == {"train": {"epochs": 7}}
    assert f"the machine-specific options of recipe {recipe} (data, train.deepspeed): " in out
    assert manifest.num_samples == SAMPLES
    assert manifest.facts.data["max_samples"] == SAMPLES
    assert manifest.facts.teacher["spec"]["name"] == "demo_swin"
    assert 0 <= manifest.facts.teacher["top1"] <= 100
    assert manifest.fidelity["cosine_mean_removed"]["p1"] > 0.999
    assert {"torch", "timm", "pillow"} <= manifest.facts.versions.keys()
    assert list(verify_cache(root, deep=True)) == []


def test_a_second_call_makes_nothing(tmp_path, no_work, capsys):
    root = copy_of_cache(tmp_path / "cache")
    before = everything(root)
    manifest = cache_teacher(options(root, shared_weights()), CPU)
    assert everything(root) == before
    assert manifest == read_manifest(root)
    assert "is complete" in capsys.readouterr().out
    fewer = cache_teacher(options(root, shared_weights(), cache={"num_views": 1}), CPU)
    assert fewer.num_views == VIEWS
    assert everything(root) == before


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"views": {"seed": 7}}, ["views.seed: 7 (requested) / 0 (cache)"]),
        ({"views": {"pixels": "replayed"}}, ["views.pixels: replayed (requested) / baked (cache)"]),
        ({"cache": {"codec": "float16"}}, ["codec.id: float16 (requested) / int8 (cache)"]),
        ({"cache": {"backend": "zarr"}}, ["backend: zarr (requested) / webdataset (cache)"]),
        ({"cache": {"samples_per_shard": 16}}, ["samples_per_shard: 16 (requested) / 32 (cache)"]),
        ({"teacher": {"precision": "bfloat16"}}, ["precision: bfloat16 (requested) / float32 (cache)"]),
        ({"teacher": {"weights": None, "pretrained": False}, "views": {"seed": 3}}, ["teacher.weights_sha256: "]),
    ],
)
def test_other_options_are_refused_by_name(tmp_path, no_work, changes, texts):
    root = copy_of_cache(tmp_path / "cache")
    before = everything(root)
    with pytest.raises(UserError, match="made with different options") as error:
        cache_teacher(options(root, shared_weights(), **changes), CPU)
    for text in texts:
        assert text in str(error.value)
    assert everything(root) == before


def test_another_number_of_images_is_refused_by_name(tmp_path, no_work):
    root = copy_of_cache(tmp_path / "cache")
    before = everything(root)
    with pytest.raises(
        UserError, match=r"32 missing: digits/(?s:.*)set --data\.max_samples to the value used for the cache"
    ):
        cache_teacher(options(root, shared_weights(), data={"max_samples": 64}), CPU)
    assert everything(root) == before


def test_other_options_explain_more_than_a_teacher_that_does_not_fit_them(tmp_path):
    """A weights file without one of its tensors cannot be loaded; the error must name the cache's view size."""
    root, partial = copy_of_cache(tmp_path / "cache"), tmp_path / "partial.safetensors"
    save_file({name: value for name, value in load_file(shared_weights()).items() if name != "norm.weight"}, partial)
    with pytest.raises(UserError, match="do not match the model") as alone:
        cache_teacher(options(tmp_path / "new", partial, views={"size": 32}), CPU)
    with pytest.raises(UserError, match="made with different options") as error:
        cache_teacher(options(root, partial, views={"size": 32}), CPU)
    assert "views.size: 32 (requested) / 64 (cache)" in str(error.value)
    assert "made with different options" not in str(alone.value)
    assert str(error.value).count("(requested)") == 1


def test_growth_touches_nothing_that_is_there(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    before = everything(root)
    cache_teacher(options(root, shared_weights(), cache={"num_views": 4}), CPU)
    replaced = {root / "plan.json", root / "manifest.json"}
    after = everything(root)
    for path, data in files.items():
        if path not in replaced:
            assert path.read_bytes() == data
            assert after[path] == before[path]
    assert (root / "tail.safetensors") in files
    assert len(after) > len(before)


def test_a_truncated_tail_is_written_again(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    (root / "manifest.json").unlink()
    tail = (root / "tail.safetensors").read_bytes()
    (root / "tail.safetensors").write_bytes(tail[:-100])
    cache_teacher(options(root, shared_weights()), CPU)
    assert (root / "tail.safetensors").read_bytes() == tail


def test_the_teacher_is_measured_once(tmp_path, monkeypatch):
    root = copy_of_cache(tmp_path / "cache")
    top1 = read_manifest(root).facts.teacher["top1"]
    monkeypatch.setattr(prepare, "evaluate", None)
    assert cache_teacher(options(root, shared_weights(), cache={"num_views": 3}), CPU).facts.teacher["top1"] == top1


def test_a_copy_elsewhere_is_valid_and_may_be_read_only(tmp_path, no_work):
    """Copies have new inodes and times. Reading and rerunning a finished job write nothing."""
    root = copy_of_cache(tmp_path / "cache")
    copy = tmp_path / "other" / "name"
    copy.parent.mkdir()
    subprocess.run(["cp", "-r", str(root), str(copy)], check=True)
    shutil.rmtree(root)
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = everything(copy)
    assert list(verify_cache(copy, deep=True)) == []
    cache = Cache.open(copy)
    assert len(cache.read(range(SAMPLES), 1)) == SAMPLES
    cache_teacher(options(copy, shared_weights()), CPU)
    assert everything(copy) == before


def test_options_that_change_no_byte_are_accepted(tmp_path, no_work):
    root = copy_of_cache(tmp_path / "cache")
    shutil.copy(shared_weights(), tmp_path / "elsewhere.safetensors")
    changes = {"teacher": {"batch_size": 8, "weights": str(tmp_path / "elsewhere.safetensors")}, "workers": 2}
    cache_teacher(options(root, shared_weights(), recipe="other", **changes), CPU)


def test_a_cache_keeps_the_recipe_of_its_first_job(tmp_path):
    """A file that is edited or gone changes nothing: neither later views, nor a cache with the same pixels."""
    root, recipe = tmp_path / "cache", write_recipe(tmp_path, "train: {epochs: 7}")
    small = {"num_views": 1, "samples_per_shard": 96}
    make(root, shared_weights(), recipe=str(recipe), cache=small)
    write_recipe(tmp_path, "train: {epochs: 9}")
    make(root, shared_weights(), recipe=str(recipe), cache={**small, "num_views": 2})
    recipe.unlink()
    shared = {**small, "pixels_from": str(root)}
    other = make(tmp_path / "other", shared_weights(), recipe=str(recipe), cache=shared)
    for facts in (read_manifest(root).facts, other.manifest.facts):
        assert (facts.recipe, facts.distill) == (str(recipe), {"train": {"epochs": 7}})


@pytest.mark.parametrize("finished", [True, False])
def test_a_lost_unit_is_made_again_with_the_same_bytes(tmp_path, finished):
    root = copy_of_cache(tmp_path / "cache")
    files, kept = unit_files(root), read_manifest(root)
    shutil.rmtree(root / "units" / "g000-r00001")
    if not finished:
        (root / "manifest.json").unlink()
    others = {path: value for path, value in everything(root / "units").items() if path.name != "units"}
    assert cache_teacher(options(root, shared_weights()), CPU) == kept
    assert unit_files(root) == files
    now = everything(root / "units")
    assert {path: now[path] for path in others} == others
    assert list(verify_cache(root, deep=True)) == []


def test_a_short_file_is_made_again(tmp_path):
    root = copy_of_cache(tmp_path / "cache")
    files = unit_files(root)
    tar = root / "units" / "g000-r00002" / "v0001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    (root / "manifest.json").unlink()
    cache_teacher(options(root, shared_weights()), CPU)
    assert unit_files(root) == files


def test_an_interrupted_job_goes_on(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    append = caching._append_batch
    calls = []

    def interrupted(stage, *args):
        if stage.root == root:  # ignore the small unit that measures sizes
            calls.append(1)
            if len(calls) == 6:  # in the second unit
                raise KeyboardInterrupt
        append(stage, *args)

    monkeypatch.setattr(caching, "_append_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(options(root, shared_weights()), CPU)
    assert [path.name for path in (root / "units").iterdir()] == ["g000-r00000"]
    with pytest.raises(UserError, match="not a finished cache"):
        Cache.open(root)
    cache_teacher(options(root, shared_weights()), CPU)
    assert len(calls) == 6 + 8  # two batches of two views for each of the two remaining units
    assert unit_files(root) == unit_files(copy_of_cache(tmp_path / "other"))


def refused(root, config, message, student=None):
    with pytest.raises(UserError, match=message) as error:
        cache_teacher(config, CPU, student)
    assert not root.exists()
    return str(error.value)


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    root = tmp_path / "cache"
    weights = write_weights(tmp_path / "seven.safetensors", num_classes=7)
    text = refused(root, options(root, weights), "different numbers of classes")
    assert "7 classes" in text
    assert "10 classes" in text


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    text = refused(root, options(root, shared_weights()), "does not fit on the disk")
    assert "192 views" in text
    grown = copy_of_cache(tmp_path / "whole")
    cache_teacher(options(grown, shared_weights()), CPU)  # nothing to make, nothing to store


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("hello")
    with pytest.raises(UserError, match="is a file"):
        cache_teacher(options(file, shared_weights()), CPU)
    below = file / "cache"
    with pytest.raises(UserError, match="cannot write to") as error:
        cache_teacher(options(below, shared_weights()), CPU)
    assert str(below) in str(error.value)
    assert file.read_text() == "hello"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        cache_teacher(options(tmp_path / "cache", shared_weights()), CPU)


def test_a_student_that_does_not_fit_is_refused(tmp_path):
    root = tmp_path / "cache"
    student = DistillConfig(
        student=StudentConfig(name="resnet81"), train=TrainConfig(global_batch_size=32, micro_batch_size=16)
    )
    assert "resnet18" in refused(root, options(root, shared_weights()), "resnet81", student)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_plan_is_reported(tmp_path, text):
    root = copy_of_cache(tmp_path / "cache")
    (root / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json"):
        cache_teacher(options(root, shared_weights()), CPU)


def test_random_weights_are_the_same_every_time(tmp_path):
    random = {"weights": None, "pretrained": False}
    first = make(tmp_path / "a", None, teacher=random, data={"max_samples": 20}).manifest
    second = make(tmp_path / "b", None, teacher=random, data={"max_samples": 20}).manifest
    assert first.units_digest == second.units_digest
    other = options(tmp_path / "c", None, teacher=random, data={"max_samples": 20})
    other = dataclasses.replace(other, views=dataclasses.replace(other.views, seed=1))
    assert (
        cache_teacher(other, CPU).facts.teacher["spec"]["weights_sha256"]
        != first.facts.teacher["spec"]["weights_sha256"]
    )


def test_weights_in_the_weights_folder_are_found(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(prepare, "train_demo_teacher", lambda file, data: trained.append(file) or write_weights(file))
    config = options(tmp_path / "cache", None, data={"max_samples": 16}, teacher={"weights_dir": str(tmp_path)})
    config = dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, weights=None))
    manifest = cache_teacher(config, CPU)
    assert trained == [tmp_path / "demo_swin.safetensors"]
    assert manifest.facts.teacher["config"]["weights"] == str(trained[0])
    (tmp_path / "cache" / "manifest.json").unlink()
    cache_teacher(config, CPU)
    assert len(trained) == 1


def test_a_zarr_cache_holds_the_same_records(tmp_path):
    cache = make(tmp_path / "cache", shared_weights(), cache={"backend": "zarr"})
    other = Cache.open(copy_of_cache(tmp_path / "other"))
    for view in range(VIEWS):
        assert cache.read(range(SAMPLES), view) == other.read(range(SAMPLES), view)
    assert json.loads((tmp_path / "cache" / "plan.json").read_text())["backend"] == "zarr"


WITH_BROKEN_PACKAGES = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"numcodecs", "zfpy", "zarr", "pillow_heif", "pillow_avif", "pillow_jxl"}:
            raise ValueError("invalid literal for int() with base 10: 'post0'")
sys.meta_path.insert(0, Broken())
from small_cache import make
from scalekd_cache.store.verify import verify_cache
for backend in ("webdataset", "zarr"):
    cache = make(f"{sys.argv[1]}/{backend}", sys.argv[2], data={"max_samples": 16}, cache={"backend": backend})
    assert len(cache.read([0, 5], 1)) == 2
    assert verify_cache(cache.root, deep=True) == []
print("made", "numcodecs" in sys.modules)
"""


def test_packages_whose_import_fails_end_no_job_that_needs_none(tmp_path):
    """As numcodecs 0.16.6 next to a zfpy of version 1.0.1.post0; plug-ins of Pillow too."""
    words = [sys.executable, "-c", WITH_BROKEN_PACKAGES, str(tmp_path), str(shared_weights())]
    environment = {**ENV, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("made False\n")
