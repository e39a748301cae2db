"""Recipes: every file is understood, says what it stands for, and its views are tied to the cache's."""

import json
from pathlib import Path

import pytest

from pipelines import distill as distill_command
from pipelines.command import RECIPES, parse, recipe_section
from scalekd_cache.agreement import check_recipe
from scalekd_cache.config import CacheTeacherConfig, DistillConfig, to_plain
from scalekd_cache.errors import UserError
from scalekd_cache.student import SHORT_NAMES

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SHARED = [
    {"traditional", "traditional-mobilenet", "traditional-swin-s"},
    {"advanced-vit", "advanced-swin", "advanced-convnext"},
]


def views(name: str) -> dict[str, object]:
    plain = to_plain(parse(CacheTeacherConfig, "cache_teacher", [], recipe_section(name, "cache"), "").views)
    assert isinstance(plain, dict)
    return plain


def training(name: str) -> DistillConfig:
    return parse(DistillConfig, "distill", [], recipe_section(name, "distill"), "")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_understood_and_says_what_it_is(name):
    header = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("cache:\n")[0]
    config = training(name)
    if name != "demo":
        for word in ("paper row", "8 GPUs", "4 x 8", "expected   top-1", "TB", "GPU-hours", "= "):
            assert word in header, word
        assert any(f"STUDENT={student} " in header for student in SHORT_NAMES)
        assert f"RECIPE={name} " in header
        processes = 32 * config.train.micro_batch_size
        assert config.train.global_batch_size % processes == 0 or name.startswith("traditional")
    assert config.train.global_batch_size % (8 * config.train.micro_batch_size) == 0 or name == "demo"


def test_upstreams_constants():
    rows = {name: training(name) for name in NAMES}
    found = {
        name: (c.optim.name, c.optim.lr, c.optim.weight_decay, c.optim.no_decay, c.optim.warmup_epochs,
               c.optim.clip_norm, c.train.label_loss, c.train.label_smoothing, c.train.ema_decay, c.train.epochs)
        for name, c in rows.items()
        if name in ("traditional", "advanced", "advanced-mobilenet", "advanced-vit", "advanced-mixer")
    }  # fmt: skip
    assert found == {
        "traditional": ("sgd", 0.1, 1e-4, "nothing", 0, 0, "ce", 0, 0, 100),
        "advanced": ("lamb", 5e-3, 0.02, "nothing", 5, 5, "bce", 0, 0, 300),
        "advanced-mobilenet": ("lamb", 2e-3, 0.004, "nothing", 5, 0, "ce", 0.1, 0, 300),
        "advanced-vit": ("adamw", 1e-3, 0.05, "norm_bias_position", 20, 5, "ce", 0.1, 0.9999, 300),
        "advanced-mixer": ("adamw", 7e-4, 0.067, "position", 20, 1, "ce", 0, 0, 300),
    }
    swin_s = rows["traditional-swin-s"].scalekd
    assert (swin_s.heads_s3, swin_s.heads_s4, swin_s.s4_query) == (3, 6, "learned")
    assert (swin_s.frequency_weight_s4, swin_s.logit_weight) == (0, 0)
    assert (rows["advanced-vit"].scalekd.heads_s3, rows["advanced-vit"].scalekd.heads_s4) == (8, 8)


@pytest.mark.parametrize("one", NAMES)
@pytest.mark.parametrize("other", NAMES)
def test_a_cache_serves_the_recipes_of_its_views_alone(one, other):
    same = one == other or any({one, other} <= family for family in SHARED)
    if same:
        check_recipe(views(one), other, views(other), Path("cache"))
        return
    with pytest.raises(UserError, match=f"other views than recipe {other}") as caught:
        check_recipe(views(one), other, views(other), Path("cache"))
    assert f"make a cache with RECIPE={other}" in str(caught.value)


def test_the_command_refuses_before_it_trains(tmp_path, monkeypatch):
    class Kept:
        view_recipe = views("advanced")
        recipe = "advanced"

    monkeypatch.setattr(distill_command, "read_cache_facts", lambda *_: Kept)
    with pytest.raises(UserError, match=r"randaugment_magnitude=9\.0"):
        distill_command.main(["--cache", str(tmp_path), "--recipe", "advanced-vit"])


def test_pixels_and_seed_are_the_caches_own_business():
    kept = json.loads(json.dumps(views("advanced")))
    kept |= {"seed": 7, "pixels": "replayed", "jpeg_quality": 95}
    check_recipe(kept, "advanced", views("advanced"), Path("cache"))
