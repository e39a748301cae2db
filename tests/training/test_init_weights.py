"""Initial weights of a run: loaded strictly, or rejected."""

import dataclasses

import pytest
import torch
from commands import distill_flags, run, steps_of
from safetensors.torch import save_file
from small_cache import shared_cache
from small_trainer import config_of

from scalekd_cache.config.stage2 import ScaleKDConfig, StudentConfig
from scalekd_cache.convert.timm_export import export_student
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import load_tail
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.training.init_weights import load_init_weights, normalization_note


def pair(seed, name="test_resnet", classes=10):
    cache = shared_cache()
    torch.manual_seed(seed)
    student = build_student(StudentConfig(name=name), num_classes=classes, image_size=64)
    tail = load_tail(cache.root / "tail.safetensors", TeacherSpec.from_json(cache.manifest.facts.teacher["spec"]))
    return student, make_heads(config_of(student=name), student, tail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output of import-upstream: student/ and heads.safetensors."""
    folder = tmp_path_factory.mktemp("start")
    student, heads = pair(0)
    export_student(student, StudentConfig(name="test_resnet"), folder / "student", image_size=64, class_names=[])
    save_file({name: value.clone() for name, value in heads.state_dict().items()}, str(folder / "heads.safetensors"))
    return folder


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_student_and_heads_are_loaded(folder):
    (wanted, wanted_heads), (student, heads) = pair(0), pair(1)
    assert not same(student.model, wanted.model)
    assert not same(heads, wanted_heads)
    assert len(load_init_weights(folder, student.model, heads)) == 2
    assert same(student.model, wanted.model)
    assert same(heads, wanted_heads)
    alone, _ = pair(2)
    assert len(load_init_weights(folder / "student", alone.model, None)) == 1
    assert same(alone.model, wanted.model)


@pytest.mark.parametrize(
    ("name", "classes", "named"), [("test_resnet", 7, "fc.weight is"), ("resnet18", 10, "missing")]
)
def test_another_model_or_number_of_classes_is_refused(folder, name, classes, named):
    student, _ = pair(1, name, classes)
    before = {key: value.clone() for key, value in student.model.state_dict().items()}
    with pytest.raises(UserError, match=named):
        load_init_weights(folder, student.model, None)
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


def test_a_folder_without_a_student(tmp_path):
    student, heads = pair(1)
    with pytest.raises(UserError, match="no initial weights"):
        load_init_weights(tmp_path, student.model, heads)


def test_a_run_starts_from_a_finished_one(cache, finished, tmp_path):
    """The first loss of a new run is near the last of the old one, not near that of random weights."""
    options = {"init": finished, "train.epochs": 1}
    output = run("distill", *distill_flags(cache, tmp_path / "run", **options))
    assert f"initial weights: {finished}/export/model.safetensors" in output
    before = [line["label"] for line in steps_of(finished)]
    label = [line["label"] for line in steps_of(tmp_path / "run")]
    assert label[0] < before[0] - 0.5 * (before[0] - before[-1])


def test_a_run_that_trains_fewer_projectors_takes_its_own(folder):
    """A checkpoint has all projectors; the recipe for Swin-S trains without the frequency loss of S4."""
    cache = shared_cache()
    student, whole = pair(0)
    tail = load_tail(cache.root / "tail.safetensors", TeacherSpec.from_json(cache.manifest.facts.teacher["spec"]))
    config = dataclasses.replace(config_of(student="test_resnet"), scalekd=ScaleKDConfig(frequency_weight_s4=0.0))
    heads = make_heads(config, student, tail)
    assert len(heads.state_dict()) < len(whole.state_dict())
    load_init_weights(folder, student.model, heads)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in heads.state_dict().items())


def test_another_normalization_is_reported(folder):
    own, other = StudentConfig(name="test_resnet"), StudentConfig(name="test_resnet", mean=(0.5, 0.5, 0.5))
    assert normalization_note(folder, own) is None
    note = normalization_note(folder / "student", other)
    assert note is not None
    assert "--student.mean 0.485,0.456,0.406 --student.std 0.229,0.224,0.225" in note
