"""Wrong names, classes and folders are errors before a demo teacher is trained or weights are downloaded."""

import errno
import re
import time
from types import SimpleNamespace

import pytest
from image_files import folder_tree
from small_cache import CPU, copy_of_cache, make, options, shared_cache, shared_weights
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scalekd_cache.audit.describe import describe_cache
from scalekd_cache.caching import prepare
from scalekd_cache.caching.cache_info import cache_info
from scalekd_cache.caching.job import cache_teacher, dry_run
from scalekd_cache.caching.plan_check import check_teacher_given
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.config.stage2 import FEW_CLASSES_WEIGHTS, DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models import hub, timm_models
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher_spec import TeacherSpec, random_note, teacher_label
from scalekd_cache.reports.cache import facts_of_cache
from scalekd_cache.training import targets
from scalekd_cache.training.model_card import card_facts
from scalekd_cache.training.run_export import facts_of
from scalekd_cache.training.targets import heads_note, load_cache_tail, make_heads


def student_of(name):
    return DistillConfig(student=StudentConfig(name=name))


CASES = {
    "codec": ({"cache": {"codec": "int9"}}, None, "no feature codec int9: did you mean int8"),
    "teacher": ({"teacher": {"name": "swin_smal"}}, None, "no model swin_smal"),
    "student": ({}, student_of("resnet5"), "no model resnet5"),
    "student of another size": ({"views": {"size": 50}}, student_of("test_vit"), "failed on images of 50 x 50"),
    "weights": ({"teacher": {"weights": "none.safetensors"}}, None, "--teacher-weights none.safetensors is not a file"),
}


@pytest.fixture
def no_teacher(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise AssertionError("a teacher was trained, loaded or downloaded")

    shared_cache()  # made before its functions are replaced
    monkeypatch.setattr(prepare, "train_demo_teacher", fail)
    monkeypatch.setattr(prepare, "load_teacher", fail)
    return {"weights": None, "pretrained": True, "weights_dir": str(tmp_path / "teachers")}


@pytest.mark.parametrize("start", [cache_teacher, dry_run])
@pytest.mark.parametrize("case", CASES)
def test_names_are_checked_first(tmp_path, no_teacher, case, start):
    changes, student, message = CASES[case]
    config = options(tmp_path / "cache", None, **{**changes, "teacher": {**no_teacher, **changes.get("teacher", {})}})
    with pytest.raises(UserError, match=message):
        start(config, CPU, student)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "teachers").exists()


@pytest.mark.parametrize("start", [cache_teacher, dry_run])
@pytest.mark.parametrize("teacher", ["demo_swin", "test_resnet"])
def test_an_existing_cache_needs_its_teacher_options(tmp_path, no_teacher, teacher, start):
    """A command that grows a cache but omits --teacher-weights."""
    root, changes = copy_of_cache(tmp_path / "cache"), {**no_teacher, "name": teacher, "num_classes": 10}
    with pytest.raises(UserError, match="teacher options differ from those that the cache was made with") as error:
        start(options(root, None, teacher=changes, cache={"num_views": 4}), CPU)
    assert f"--teacher {teacher} without --teacher-weights" in str(error.value)
    assert f"--teacher demo_swin --teacher-weights {shared_weights()}" in str(error.value)
    with pytest.raises(UserError, match=r"views\.seed: 7 \(requested\)"):
        start(options(root, None, teacher=changes, views={"seed": 7}), CPU)
    assert not (tmp_path / "teachers").exists()


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        ({"weights": "teachers/demo_swin.safetensors"}, None),  # made again if it is missing
        ({"weights": None, "pretrained": False}, "--teacher demo_swin --pretrained false"),
        ({"weights": "a.safetensors", "pretrained": False}, "--teacher demo_swin --teacher-weights a.safetensors"),
    ],
)
def test_recorded_teachers(tmp_path, recorded, wanted):
    facts = {"spec": {"name": "demo_swin"}, "config": to_plain(TeacherConfig(**recorded)), "top1": None}
    if wanted is None:
        return check_teacher_given(facts, TeacherConfig(), tmp_path)
    with pytest.raises(UserError, match=f"expected: {wanted}"):
        check_teacher_given(facts, TeacherConfig(), tmp_path)


@pytest.mark.parametrize("teacher", ["demo_swin", "resnet18"])
def test_other_classes_are_found_without_the_teacher(tmp_path, no_teacher, teacher):
    data = {"source": str(folder_tree(tmp_path / "data")), "max_samples": None}
    config = options(tmp_path / "cache", None, data=data, teacher={**no_teacher, "name": teacher})
    with pytest.raises(UserError, match=r"different numbers of classes(.|\n)*2 classes \(ant, bee\)"):
        cache_teacher(config, CPU)
    assert not (tmp_path / "cache").exists()


SMALL = "last feature map is 1x1(.|\n)*got: {} at 16 pixels"
OTHER = "classifier for a different number of classes(.|\n)*got: teacher.num_classes=5(.|\n)*expected: {} or 0"


@pytest.mark.parametrize("start", [cache_teacher, dry_run])
@pytest.mark.parametrize(
    ("teacher", "size", "student", "message"),
    [
        ({"num_classes": 5}, 64, None, OTHER.format(10) + r"(.|\n)*the demo teacher"),
        ({}, 16, None, SMALL.format("demo_swin")),
        ({}, 32, "resnet18", "student's feature map S4 is 1x1"),
        ({"name": "test_vit", "num_classes": 5}, 160, None, OTHER.format(1000)),
        ({"name": "test_vit", "num_classes": 0}, 16, None, SMALL.format(r"test_vit[.\w]*")),
        ({"name": "resnet18", "num_classes": 0}, 64, None, "architecture is not supported"),
    ],
)
def test_teachers_that_do_not_fit_are_found_without_weights(
    tmp_path, no_teacher, teacher, size, student, message, start
):
    config = options(tmp_path / "cache", None, teacher={**no_teacher, **teacher}, views={"size": size})
    with pytest.raises(UserError, match=message):
        start(config, CPU, student and student_of(student))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("size", "student"), [(64, None), (96, None), (64, "resnet50"), (64, "vit_tiny_patch16_224")])
def test_teachers_that_fit_pass_without_weights(tmp_path, no_teacher, capsys, size, student):
    config = options(tmp_path / "cache", None, teacher=no_teacher, views={"size": size})
    dry_run(config, CPU, student and student_of(student))
    assert "would first train the demo teacher" in capsys.readouterr().out


def test_a_teacher_that_the_meta_device_cannot_run_is_checked_with_its_weights(tmp_path, no_teacher, monkeypatch):
    def value(model, image):
        return original(model, image) if image.mean().item() else None

    original = VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", value)
    config = options(tmp_path / "cache", None, teacher={**no_teacher, "name": "test_vit", "num_classes": 0})
    with pytest.raises(AssertionError, match="a teacher was"):
        dry_run(config, CPU)


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, no_teacher):
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        cache_teacher(options(tmp_path / "file" / "cache", None, teacher=no_teacher), CPU)


def test_missing_validation_images_are_reported_before_the_teacher(tmp_path, no_teacher, capsys):
    data = {"source": str(folder_tree(tmp_path / "data", val=())), "max_samples": None}
    config = options(tmp_path / "cache", None, data=data, teacher={**no_teacher, "pretrained": False})
    with pytest.raises(AssertionError, match="a teacher was"):
        dry_run(config, CPU)
    assert "no usable validation images, so the teacher's accuracy is not measured" in capsys.readouterr().out


def test_random_weights_are_called_random(tmp_path, capsys):
    small = {"num_views": 1, "samples_per_shard": 96}
    given = {"cache": small, "teacher": {"weights": None, "pretrained": False}}
    note = "note: teacher demo_swin (random weights) is for tests only"
    dry_run(options(tmp_path / "cache", None, **given), CPU)
    assert note in capsys.readouterr().out
    cache = make(tmp_path / "cache", None, **given)
    before, _, after = capsys.readouterr().out.partition(note)
    assert before.count("\n") == 1  # only the device
    assert "teacher demo_swin (random weights): top-1" in after
    facts = cache.manifest.facts.teacher
    assert teacher_label(facts) == cache_info(cache.root, cache.manifest).teacher == "demo_swin (random weights)"
    assert describe_cache(cache)["teacher"]["name"] == teacher_label(facts)
    of_run = facts_of([cache.manifest.facts], 1, StudentConfig())
    student = to_plain(DistillConfig(student=StudentConfig(name="resnet18")))
    for text in (
        of_run["teacher"],
        dict(facts_of_cache(cache))["teacher"],
        card_facts(student, of_run, None)["teacher"],
    ):
        assert text.startswith("demo_swin (random weights), top-1 ")
    assert random_note([teacher_label(facts), "demo_swin"]).startswith(note)
    assert TeacherSpec.from_json(facts["spec"]).name == "demo_swin"  # the name that loads it is unchanged
    assert teacher_label(shared_cache().manifest.facts.teacher) == "demo_swin"
    assert shared_weights().exists()


@pytest.mark.parametrize("answer", [OSError("no route"), None])
def test_without_a_network_a_download_fails_in_seconds(monkeypatch, tmp_path, answer):
    """No route to the hub, or a hub that never answers."""

    def urlopen(*_, **__):
        if answer is not None:
            raise answer
        time.sleep(60)

    monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        timm_models.fetch_weights("test_resnet", tmp_path / "teachers")
    assert time.monotonic() - started < 60
    (line,) = str(error.value).splitlines()
    assert "no connection to https://" in line
    assert re.search(r"fetch .*test_resnet` on a machine with network access", line)
    assert hub.constants.HF_HUB_OFFLINE is False
    assert not (tmp_path / "teachers").exists()


def test_with_hf_hub_offline_the_message_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        timm_models.fetch_weights("test_resnet", tmp_path / "teachers")
    assert "test_resnet: HF_HUB_OFFLINE is set (unset it to download), and the file is not in" in str(error.value)
    assert "no connection" not in str(error.value)


def test_a_download_to_a_full_disk_names_the_disk(monkeypatch, tmp_path):
    def create_model(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(timm_models.timm, "create_model", create_model)
    with pytest.raises(UserError, match="the disk is full") as error:
        timm_models.fetch_weights("test_resnet", tmp_path / "teachers")
    assert f"where: {hub.constants.HF_HUB_CACHE}" in str(error.value)
    assert "network" not in str(error.value)


def test_heads_far_larger_than_their_student_are_reported(monkeypatch):
    cache = shared_cache()
    tail = load_cache_tail(cache)
    student = build_student(StudentConfig(name="resnet18"), num_classes=10, image_size=64)

    def note(**options):
        config = DistillConfig(scalekd=ScaleKDConfig(**options))
        return heads_note(config, student, make_heads(config, student, tail))

    large = {"heads_s3": 4, "heads_s4": 4}
    assert note(**large) is None  # 0.6 times the student
    monkeypatch.setattr(targets, "HEAVY_HEADS", 0.3)
    said = "note: the heads have 0.6 times the student's parameters (6.7M), so most of each step is spent on them; "
    assert note(**large) == f"{said}cheaper: --heads linear or --feature-share 0.25 (docs/COSTS.md)"
    assert note(**large, feature_share=0.25) is note(projector="lite") is None


def test_the_note_about_the_heads_appears_from_three_times_the_student():
    student, config = SimpleNamespace(model=nn.Linear(10, 10, bias=False)), DistillConfig()
    assert heads_note(config, student, nn.Linear(10, 29, bias=False)) is None
    assert "3.0 times" in heads_note(config, student, nn.Linear(10, 30, bias=False))


def test_a_run_with_few_classes_prints_its_feature_weights():
    def note(classes, **weights):
        config = DistillConfig(scalekd=ScaleKDConfig(**weights)).on_data(classes=classes)
        return targets.weights_note(config.scalekd, classes)

    said = "feature weights: spatial 0.005, frequency 0.004 and 0.004, the defaults for 2 to 20 classes"
    assert note(10).startswith(said)
    assert "set --scalekd.spatial_weight, --scalekd.frequency_weight_s3, --scalekd.frequency_weight_s4" in note(10)
    assert note(10, **FEW_CLASSES_WEIGHTS) == note(10)
    assert note(10, spatial_weight=0.08) is note(21) is note(1000) is note(0) is None
