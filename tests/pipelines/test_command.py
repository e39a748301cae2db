"""The command line: recipes, overrides, typos."""

import sys

import pytest
from commands import execute

from pipelines import command
from pipelines.cache_teacher import stage1_section
from pipelines.command import parse, value_of
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.recipes import RECIPES, recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError


def cache_options(argv=(), recipe=None):
    return parse(CacheTeacherConfig, "cache_teacher", argv, recipe or {}, "about")


def distill_options(argv=(), recipe=None):
    return parse(DistillConfig, "distill", argv, recipe or {}, "about")


def test_without_anything_the_defaults_hold():
    assert cache_options() == CacheTeacherConfig()
    assert distill_options() == DistillConfig()


def test_dotted_options_reach_their_fields():
    config = cache_options(
        ["--views.size=64", "--data.source", "/data", "--cache.num_views", "7", "--workers=3",
         "--views.crop_scale=[0.2,0.5]",
         "--teacher.pretrained", "false", "--data.max_samples=10", "--views.pixels", "replayed"]
    )  # fmt: skip
    assert (config.views.size, config.data.source, config.cache.num_views, config.workers) == (64, "/data", 7, 3)
    assert config.views.crop_scale == (0.2, 0.5)
    assert config.teacher.pretrained is False
    assert config.data.max_samples == 10
    assert config.views.pixels == "replayed"
    assert isinstance(config.views, ViewConfig)
    assert distill_options(["--optim.lr", "1e-3", "--train.zero=2"]).optim.lr == 1e-3


def test_the_command_line_goes_over_the_recipe_and_the_recipe_over_defaults():
    recipe = {"views": {"size": 64, "seed": 3}, "cache": {"num_views": 2}}
    config = cache_options(["--views.size=96"], recipe)
    assert (config.views.size, config.views.seed, config.cache.num_views) == (96, 3, 2)
    assert config.views.jpeg_quality == ViewConfig().jpeg_quality


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_is_understood(name):
    cache = cache_options([], recipe_section(name, "cache"))
    assert cache != CacheTeacherConfig()
    training = distill_options(["--student.name", "resnet50"], recipe_section(name, "distill"))
    assert training.student.name == "resnet50"
    assert training.train.micro_batch_size <= training.train.global_batch_size


def test_recipes_are_what_they_are_called():
    advanced = distill_options([], recipe_section("advanced", "distill"))
    assert (advanced.optim.name, advanced.optim.lr, advanced.train.label_loss) == ("lamb", 5e-3, "bce")
    traditional = distill_options([], recipe_section("traditional", "distill"))
    assert (traditional.optim.name, traditional.train.epochs) == ("sgd", 100)
    assert cache_options([], recipe_section("demo", "cache")).views.size == 64


@pytest.mark.parametrize(
    ("argv", "recipe", "texts"),
    [
        (["--views.sise=64"], {}, ["--views.sise", "did you mean --views.size"]),
        (["--optimizer.lr", "1"], {}, ["--optimizer.lr"]),
        (["--views.size=big"], {}, ["views.size", "big"]),
        (["--views.pixels=boiled"], {}, ["views.pixels", "boiled"]),
        ([], {"views": {"sise": 64}}, ["sise"]),
        ([], {"veiws": {"size": 64}}, ["veiws"]),
        ([], {"views": {"size": "big"}}, ["size", "big"]),
    ],
)
def test_mistypes_are_named(argv, recipe, texts):
    with pytest.raises(UserError) as error:
        cache_options(argv, recipe)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(("argv", "recipe"), [(["--views.size=5"], {}), ([], {"views": {"size": 5}})])
def test_values_out_of_range_keep_their_message(argv, recipe):
    with pytest.raises(UserError, match=r"views\.size is out of range") as error:
        cache_options(argv, recipe)
    assert "8 to 4096" in str(error.value)


def test_options_that_clash_keep_their_message():
    with pytest.raises(UserError, match="LAMB does not work with ZeRO"):
        distill_options(["--optim.name=lamb", "--train.zero=1"])


def test_value_of():
    argv = ["--cache", "here", "--recipe=mine", "--train.epochs", "3"]
    assert value_of(argv, "--cache") == "here"
    assert value_of(argv, "--recipe") == "mine"
    assert value_of(argv, "--train.epochs") == "3"
    assert value_of(argv, "--run") is None
    assert value_of(["--cache"], "--cache") is None
    assert value_of(["--cachet", "x"], "--cache") is None


@pytest.mark.parametrize(
    ("raised", "status", "text"),
    [
        (UserError("it broke", fix="mend it"), 2, "error: it broke\n  what to do: mend it\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the same command to resume\n"),
        (None, 0, ""),
        (1, 1, ""),
    ],
)
def test_the_exit_status(monkeypatch, capsys, raised, status, text):
    def main(argv):
        assert argv == ["--x"]
        if isinstance(raised, BaseException):
            raise raised
        return raised

    monkeypatch.setattr(sys, "argv", ["prog", "--x"])
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        command.run(main)
    assert (stopped.value.code or 0) == status
    assert capsys.readouterr().err == text


def test_debug_shows_where_it_broke(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--debug", "--x"])

    def main(argv):
        raise UserError(" ".join(argv))

    with pytest.raises(UserError, match=r"^--x$"):
        command.run(main)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        distill_options(["--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    for name in ("--student.name", "--scalekd.temperature", "--optim.lr", "--train.zero", "--cache"):
        assert name in text
    assert "DeepSpeed ZeRO stage" in text


@pytest.mark.parametrize(
    ("data", "cache"),
    [
        ("demo", "caches/demo"),
        ("/sets/pets", "caches/pets"),
        ("/sets/pets//", "caches/pets"),
        ("/sets/my pets", "caches/my-pets"),
        ("/sets/pets-train-{000000..000015}.tar", "caches/pets-train"),
        ("/sets/{000..015}.tar", "caches/data"),
        ("/sets/{a,b}/train-{0..9}.tar", "caches/train"),
        ("/sets/it's $HOME", "caches/it-s-HOME"),
        ("/sets/...", "caches/data"),
        ("/", "caches/data"),
    ],
)
def test_the_default_cache_has_a_plain_name(data, cache):
    assert default_cache(data) == cache
    assert stage1_section(["--data.source", data])["cache"]["path"] == cache
    assert "path" in stage1_section(["--data.source", data, "--cache.path", "x"])["cache"]


@pytest.mark.parametrize(("data", "name"), [(".", "here"), ("./", "here"), ("..", "above"), ("../../above", "above")])
def test_the_default_cache_of_a_relative_folder(tmp_path, monkeypatch, data, name):
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    assert default_cache(data) == f"caches/{name}"


@pytest.mark.parametrize("data", ["/sets/my pets", "/sets/x-{0..1}.tar", "/sets/it's", "..", "demo"])
def test_make_has_the_same_default(data):
    words = execute("make", "-n", "cache-teacher", "VENV=none", f"PYTHON={sys.executable}", f"DATA={data}")
    assert f'--cache.path "{default_cache(data)}"' in words
