"""Recipes: every file parses, its header is complete, and its views must match those of the cache."""

import json
import re
from pathlib import Path

import pytest
import torch
from timm.models import get_pretrained_cfg

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.options import build
from scalekd_cache.config.recipes import (
    RECIPE_BYTES,
    RECIPES,
    check_recipe,
    has_changed,
    kept_options,
    local_options,
    recipe_file,
    recipe_section,
    training_options,
)
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import FEW_CLASSES_WEIGHTS, PUBLISHED_WEIGHTS, DistillConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import SHORT_NAMES, build_student
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.training import configure

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
OWN = {"demo", "cifar10", "cifar10-small"}
"""Recipes that reproduce no row of the paper."""
SHARED = [
    {"traditional", "traditional-mobilenet", "traditional-swin-s"},
    {"advanced-vit", "advanced-swin", "advanced-convnext"},
]
TEACHERS = {
    "swin_large_patch4_window7_224": ((768, 14, 14), (1536, 7, 7)),
    "swin_small_patch4_window7_224.ms_in1k": ((384, 14, 14), (768, 7, 7)),
}
"""Input and output shapes of the tail (tests/scalekd/test_method_matrix.py)."""


def views(name: str) -> dict[str, object]:
    plain = to_plain(build(CacheTeacherConfig, recipe_section(name, "cache")).views)
    assert isinstance(plain, dict)
    return plain


def training(name: str) -> DistillConfig:
    return build(DistillConfig, recipe_section(name, "distill"))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_understood_and_says_what_it_is(name):
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("cache:\n")[0]
    config = training(name)
    if name not in OWN:
        for word in ("paper row", "8 GPUs", "4 x 8", "expected   top-1", "TB", "GPU-hours", "= "):
            assert word in header, word
        assert any(f"--student {student} " in header for student in SHORT_NAMES)
        assert f"--recipe {name} " in header
        processes = 32 * config.train.micro_batch_size
        assert config.train.global_batch_size % processes == 0 or name.startswith("traditional")
    assert config.train.global_batch_size % (8 * config.train.micro_batch_size) == 0 or name in OWN


def test_upstreams_constants():
    rows = {name: training(name) for name in NAMES if name not in OWN}
    found = {
        name: (c.optim.name, c.optim.lr, c.optim.base_batch_size, c.optim.weight_decay, c.optim.no_decay,
               c.optim.warmup_epochs, c.optim.warmup_start, c.optim.min_lr, c.optim.clip_norm, c.train.label_loss,
               c.train.label_smoothing, c.train.ema_decay, c.student.drop_path)
        for name, c in rows.items()
    }  # fmt: skip
    vit = ("adamw", 1e-3, 1024, 0.05, "norm_bias_position", 20, 1e-3, 0.01)  # minimum 1e-5 of 1e-3
    assert found == {
        "traditional": ("sgd", 0.1, 256, 1e-4, "nothing", 0, 0, 0, 0, "ce", 0, 0, 0),
        "traditional-mobilenet": ("sgd", 0.1, 256, 1e-4, "nothing", 0, 0, 0, 0, "ce", 0.1, 0, 0),
        "traditional-swin-s": ("sgd", 0.1, 256, 1e-4, "nothing", 0, 0, 0, 0, "ce", 0, 0, 0),
        "advanced": ("lamb", 5e-3, 2048, 0.02, "nothing", 5, 0.25, 0, 5, "bce", 0, 0, 0),
        "advanced-mobilenet": ("lamb", 2e-3, 2048, 0.004, "nothing", 5, 0.25, 0, 0, "ce", 0.1, 0, 0),
        "advanced-vit": (*vit, 5, "ce", 0.1, 0.9999, 0),
        "advanced-swin": (*vit, 5, "ce", 0.1, 0.9999, 0.05),
        "advanced-convnext": (*vit, 0, "ce", 0.1, 0.9999, 0.1),
        "advanced-mixer": ("adamw", 7e-4, 1536, 0.067, "position", 20, 1e-6, 0, 1, "ce", 0, 0, 0),
    }
    schedules = {name: (c.optim.schedule, c.optim.schedule_per_epoch, c.train.epochs) for name, c in rows.items()}
    stairs = {"traditional", "traditional-swin-s"}
    assert {name for name, (kind, *_) in schedules.items() if kind == "step"} == stairs
    assert all(rows[name].optim.step_epochs == 30 for name in stairs)
    assert all(schedules[name][1] for name in schedules.keys() - stairs)
    assert all(row[2] == (300 if name.startswith("advanced") else 100) for name, row in schedules.items())
    for c in rows.values():  # the batch size of the learning rate: by default nothing is scaled
        assert c.train.global_batch_size == c.optim.base_batch_size
    swin_s = rows["traditional-swin-s"].scalekd
    assert (swin_s.heads_s3, swin_s.heads_s4, swin_s.s4_query) == (3, 6, "learned")
    assert (swin_s.frequency_weight_s4, swin_s.logit_weight) == (0, 0)
    assert (rows["advanced-vit"].scalekd.heads_s3, rows["advanced-vit"].scalekd.heads_s4) == (8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_feature_weights_of_the_recipes(name):
    """With 10 classes and with 1,000: the recipes for few classes always have the small weights, the others follow the
    number of classes."""
    few, many = (training(name).on_data(classes=classes).scalekd for classes in (10, 1000))
    own = {"frequency_weight_s4": 0.0} if name == "traditional-swin-s" else {}
    assert few.feature_weights() == {**FEW_CLASSES_WEIGHTS, **own}
    assert many.feature_weights() == (few.feature_weights() if name in OWN else {**PUBLISHED_WEIGHTS, **own})


def test_upstreams_augmentation():
    """Magnitude and its deviation on timm's scale of 10, from upstream's 7 of 8, 9 of 10 and 12 of 15, each 0.5."""
    rows = {name: views(name) for name in NAMES if name.startswith("advanced")}
    magnitudes = {name: (row["randaugment_magnitude"], row["randaugment_magnitude_std"]) for name, row in rows.items()}
    of_8, of_10, of_15 = (pytest.approx((10 * m / t, 5 / t)) for m, t in ((7, 8), (9, 10), (12, 15)))
    assert magnitudes == {
        "advanced": of_8,
        "advanced-mobilenet": of_8,
        "advanced-mixer": of_15,
        "advanced-vit": of_10,
        "advanced-swin": of_10,
        "advanced-convnext": of_10,
    }
    for name, row in rows.items():
        assert (row["randaugment_ops"], row["interpolation"]) == (2, "bicubic")
        assert row["erase_probability"] == (0 if name == "advanced-mobilenet" else 0.25)
        assert row["erase_area"] == pytest.approx([0.02, 1 / 3])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN])
def test_heads_fit_the_recipes_teacher_and_students(name):
    """Build the pair of the header's command on the meta device, with the recipe's number of heads."""
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("cache:\n")[0]
    config = training(name)
    teacher = build(CacheTeacherConfig, recipe_section(name, "cache")).teacher.name
    students = set(re.findall(r"--student (\w+)", header))
    assert students
    for student_name in students:
        with torch.device("meta"):
            student = build_student(StudentConfig(name=student_name), num_classes=1000, image_size=224)
            heads = ScaleKDHeads(config.scalekd, student.tap_shapes, *TEACHERS[teacher], student.layer_norm)
        numbers = {cap.pos_attention.num_heads for cap in heads.s3.values()}, len(heads.s4)
        assert numbers == {"advanced-vit": ({8}, 2), "advanced-mixer": ({8}, 2), "traditional-swin-s": ({3}, 1)}.get(
            name, ({16}, 2)
        )


def test_swin_s_is_upstreams_weights():
    """timm's default for this name is pre-trained on ImageNet-22K."""
    section = build(CacheTeacherConfig, recipe_section("traditional-swin-s", "cache"))
    assert get_pretrained_cfg(section.teacher.name).tag == "ms_in1k"
    for name in ("swin_base_patch4_window7_224", "swin_large_patch4_window7_224"):
        assert get_pretrained_cfg(name).tag == "ms_in22k_ft_in1k"


@pytest.mark.parametrize("one", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_a_cache_serves_the_recipes_of_its_views_alone(one, other):
    same = one == other or any({one, other} <= family for family in SHARED)
    if same:
        check_recipe(views(one), other, views(other), Path("cache"))
        return
    with pytest.raises(UserError, match=f"differ from those of recipe {other}") as caught:
        check_recipe(views(one), other, views(other), Path("cache"))
    assert f"make a cache with --recipe {other}" in str(caught.value)


def test_the_command_refuses_before_it_trains(tmp_path, monkeypatch):
    class Kept:
        view_recipe = views("advanced")
        recipe = "advanced"
        distill = kept_options("advanced")

    (tmp_path / "plan.json").touch()
    monkeypatch.setattr(configure, "read_cache_facts", lambda *_: Kept)
    with pytest.raises(UserError, match=r"randaugment_magnitude=9\.0"):
        configure.distill_config({"cache": str(tmp_path), "recipe": "advanced-vit", "student.name": "resnet18"})


def test_the_recipe_of_a_cache_may_be_given_again_although_its_views_were_changed(tmp_path, monkeypatch, capsys):
    """`cache-teacher --recipe cifar10 --size 96`, then `distill --recipe cifar10`."""

    class Kept:
        view_recipe = views("cifar10") | {"size": 96}
        recipe = "cifar10"
        distill = kept_options("cifar10")

    (tmp_path / "plan.json").touch()
    monkeypatch.setattr(configure, "read_cache_facts", lambda *_: Kept)
    given = {"cache": str(tmp_path), "student.name": "resnet18"}
    assert configure.distill_config({**given, "recipe": "cifar10"}) == configure.distill_config(given)
    assert "the cache's views differ from those of its recipe cifar10: views.size=96" in capsys.readouterr().out
    with pytest.raises(UserError, match="differ from those of recipe demo"):
        configure.distill_config({**given, "recipe": "demo"})


def test_pixels_and_seed_are_the_caches_own_business():
    kept = json.loads(json.dumps(views("advanced")))
    kept |= {"seed": 7, "pixels": "replayed", "jpeg_quality": 95}
    check_recipe(kept, "advanced", views("advanced"), Path("cache"))


def test_unknown_recipes_are_named(tmp_path):
    with pytest.raises(UserError, match="no recipe advansed: did you mean advanced, "):
        recipe_file("advansed")
    with pytest.raises(UserError, match="no recipe"):
        recipe_file(str(tmp_path / "mine.yaml"))


DOUBLED = "".join(f"  l{n}: &l{n} [*l{n - 1}, *l{n - 1}]\n" for n in range(1, 40))
"""A list of 2^39 values, in 40 lines."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache: [", "cannot parse the recipe"),
        ("- 1", "a cache section, a distill section or both"),
        ("views: {}", "a cache section, a distill section or both"),
        ("", "a cache section, a distill section or both"),
        ("cache: !!python/object/apply:os.getcwd []", "cannot parse the recipe"),
        ("cache: {name: \udcff}", "cannot parse the recipe"),
        ("[" * 100_000, "cannot parse the recipe"),
        ("cache: {views: 2020-99-99}", "cannot parse the recipe"),
        ("cache: {a: &a [1], b: *a}", "aliases"),
        (f"cache:\n  l0: &l0 [1]\n{DOUBLED}", "aliases"),
        ("cache: {views: {size: 64, seed: 1, size: 96}}", "size is set 2 times"),
        ("cache: {}\ndistill: {}\ncache: {}", "cache is set 2 times"),
        ("# long\n" + " " * RECIPE_BYTES, "too large"),
    ],
)
def test_invalid_recipes_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        recipe_section(str(file), "cache")
    assert str(file) in str(error.value)


@pytest.mark.parametrize("section", ["[1, 2]", "7", "text"])
def test_a_section_must_be_a_mapping(tmp_path, section):
    file = tmp_path / "mine.yaml"
    file.write_text(f"cache: {section}")
    with pytest.raises(UserError, match="section cache of the recipe is not a mapping"):
        recipe_section(str(file), "cache")


def test_a_custom_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("cache:\n  views: {size: 72}\n")
    assert recipe_section(str(file), "cache") == {"views": {"size": 72}}
    assert recipe_section(str(file), "distill") == {}


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_keeps_everything_that_a_shipped_recipe_says(name):
    kept = kept_options(name)
    assert kept == recipe_section(name, "distill")
    assert local_options(name) == []
    assert training_options(None, "moved.yaml", kept) == {**kept, "recipe": "moved.yaml"}
    assert not has_changed(name, kept)
    assert has_changed(name, {**kept, "train": {}})


def test_a_recipe_that_was_asked_for_is_read_from_its_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("distill: {train: {epochs: 3, deepspeed: ds.json}, data: images}")
    assert training_options(str(file), "demo", {})["data"] == "images"
    kept = kept_options(str(file))
    assert kept == {"train": {"epochs": 3}}
    assert local_options(str(file)) == ["data", "train.deepspeed"]
    file.unlink()
    assert not has_changed(str(file), kept)
    with pytest.raises(UserError, match="no recipe"):
        training_options(str(file), "demo", kept)


@pytest.mark.parametrize("text", ["train: 3", "train: [1]", "train: {lr: .nan}", "train: {day: 2020-01-01}"])
def test_options_that_a_cache_cannot_keep_are_refused(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(f"distill: {{{text}}}")
    with pytest.raises(UserError, match=r"distill\.train of the recipe is invalid"):
        kept_options(str(file))
