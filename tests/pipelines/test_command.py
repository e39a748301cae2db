"""The command line: recipes, overrides, typos."""

import contextlib
import io
import shlex
import sys
import threading
from pathlib import Path

import click
import pytest
from commands import execute
from documented import given_by

from pipelines import cache_teacher, command, launcher
from pipelines.__main__ import SCALEKD
from pipelines.command import typed_command
from pipelines.make_options import options
from pipelines.report import run_folders
from scalekd_cache.caching.configure import cache_teacher_config
from scalekd_cache.config.options import build, options_of
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.recipes import RECIPES, recipe_section
from scalekd_cache.config.stage1 import CacheTeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import RunInterrupted, UserError
from scalekd_cache.store.locks import lock


def cache_options(argv=(), recipe=None):
    return build(CacheTeacherConfig, recipe or {}, given_by("cache-teacher", argv))


def distill_options(argv=(), recipe=None):
    return build(DistillConfig, recipe or {}, given_by("distill", argv))


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
    assert distill_options(["--optim.lr", "1e-3", "--train.zero=2"]) == build(
        DistillConfig, {"optim": {"lr": 0.001}, "train": {"zero": 2}}
    )


def test_plain_names_are_the_dotted_options():
    plain = [
        "--data",
        "/data",
        "--views",
        "7",
        "--size",
        "64",
        "--codec=float16",
        "--teacher-weights",
        "w",
        "--store=zarr",
    ]
    dotted = ["--data.source", "/data", "--cache.num_views", "7", "--views.size=64", "--cache.codec", "float16",
              "--teacher.weights=w", "--cache.backend", "zarr"]  # fmt: skip
    assert cache_options(plain) == cache_options(dotted)
    assert distill_options(["--epochs", "3", "--heads", "lite"]) == distill_options(
        ["--train.epochs=3", "--scalekd.projector=lite"]
    )
    assert cache_options(["--teacher_weights", "w"]) == cache_options(["--teacher-weights", "w"])
    assert distill_options(["--train.views", "3", "--train.views", "null"]) == DistillConfig()


@pytest.mark.parametrize("name", sorted(PLAIN_NAMES))
def test_every_plain_name_is_an_option_and_a_variable_of_make(name):
    own = [option.name for config_class in SCALEKD.commands[name].config_classes for option in options_of(config_class)]
    assert set(PLAIN_NAMES[name].values()) <= set(own)
    without_dots = {option for option in own if "." not in option}
    assert without_dots - set(PLAIN_NAMES[name]) <= LESS_USED
    for plain in PLAIN_NAMES[name]:
        words = options(name, [*(["STUDENT=x"] if name == "distill" else []), f"{plain.upper()}=1"])
        assert f"--{plain.replace('_', '-')}" in words


LESS_USED = {"peer_timeout_minutes", "follow_timeout_minutes", "records", "seed", "views", "asked", "images",
             "image_size", "weights_dir"}  # fmt: skip
"""Options without dots that no plain name repeats."""


def test_a_switch_may_stand_alone():
    assert given_by("verify", ["--deep", "--json", "--cache", "x"]) == {"deep": "true", "json": "true", "cache": "x"}
    assert given_by("verify", ["--deep", "false"]) == {"deep": "false"}


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
    with pytest.raises(UserError, match=r"invalid value for views\.size") as error:
        cache_options(argv, recipe)
    assert "8 to 4096" in str(error.value)


@pytest.mark.parametrize("name", ["verify", "inspect", "report"])
def test_an_option_like_no_other_has_a_short_answer(name):
    """A command with few options does not list them all."""
    with pytest.raises(UserError) as error:
        given_by(name, ["--zzz", "3"])
    assert str(error.value) == "there is no option --zzz (--help lists all)"


def test_options_that_clash_keep_their_message():
    with pytest.raises(UserError, match="LAMB does not work with ZeRO"):
        distill_options(["--optim.name=lamb", "--train.zero=1"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epoch", "3"], "there is no option --epoch: did you mean --epochs"),
        (["--train.epoch=3"], "there is no option --train.epoch: did you mean --train.epochs"),
        (["resnet50"], "unexpected argument resnet50: put an option name before each value"),
        (
            ["--cache", "a", "b"],
            "unexpected argument b: put an option name before each value, and commas between the values",
        ),
        (["--lr", "3"], "there is no option --lr: did you mean --optim.lr? ("),
        (["--compile"], "there is no option --compile: did you mean --train.compile? ("),
        (["--batch-size", "3"], "there is no option --batch-size: did you mean --batch"),
        (["--epochs"], "Option '--epochs' requires an argument"),
        (["--cache", ""], "--cache has an empty value"),
    ],
)
def test_a_mistyped_command_line_is_one_line(words, text):
    with pytest.raises(UserError) as error:
        given_by("distill", words)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["./my_plugin.py", "my_plugin.py", ".x", "a..b", "", "nothing.here"])
def test_a_plugin_that_is_no_module(monkeypatch, name):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError, match=r"cannot import the plugin(.|\n)*a Python module \(not a path\)") as error:
        command.import_plugin(name)
    assert f"--plugin {name or repr(name)}" in str(error.value)


def test_a_cache_to_pull_is_given_once():
    assert given_by("pull", ["a"]) == given_by("pull", ["--url", "a"]) == {"url": "a"}
    with pytest.raises(UserError, match=r"given twice\n.*a and b"):
        given_by("pull", ["a", "--url", "b"])


@pytest.mark.parametrize(("typed", "text"), [("distil", "distill"), ("cache", "cache-teacher"), ("verfy", "verify")])
def test_a_mistyped_command_is_one_line(typed, text):
    output = execute(sys.executable, "-m", "pipelines", typed, "--student", "x", status=2)
    assert output.startswith(f"error: there is no command {typed}: did you mean {text}")
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "words", "text"),
    [
        ("distill", ["student=x"], "there is no variable student: did you mean STUDENT?"),
        ("distill", ["STUDENT=x", "EPOCH=1"], "there is no variable EPOCH: did you mean EPOCHS?"),
        ("verify", ["CASHE=x"], "there is no variable CASHE: did you mean CACHE?"),
        ("verify", ["VIEWS=3"], "there is no variable VIEWS"),
        ("distill", ["EPOCHS=1"], "set STUDENT, "),
        ("distill", ["STUDENT=x", "SET=lr"], 'SET="lr" has no value'),
        ("distill", ["STUDENT=x", "SET=cache=../c"], "set CACHE=... instead of SET=cache=..., because make"),
        ("distill", ["STUDENT=x", "SET=train.views=2 dry_run=1"], "set DRY_RUN=... instead of SET=dry-run=..."),
    ],
)
def test_mistyped_variables_of_make(target, words, text):
    with pytest.raises(UserError) as error:
        options(target, words)
    assert str(error.value).startswith(text)


def test_commands_for_make_survive_quotes(monkeypatch):
    """make escapes blanks in MAKEFLAGS, but no quotes."""
    monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("MAKEFLAGS", r"s -- RUN=runs/it's PYTHON=/my\ tools/python VENV=none")
    expected = ["make", "report", "RUN=runs/it's", "PYTHON=/my tools/python", "VENV=none"]
    assert shlex.split(typed_command("report", {"run": "runs/it's"})) == expected


def test_variables_of_make_become_options():
    assert options("distill", ["STUDENT=a b", "TEACHER=t", "EPOCHS=2", "DATA=", "SET=optim.lr=0.1 train.views=2"]) == [
        "--student", "a b", "--epochs", "2", "--optim.lr=0.1", "--train.views=2"]  # fmt: skip
    assert options("plan", ["SET=--views.size=64 cache.codec=int8"]) == ["--views.size=64", "--cache.codec=int8"]
    nested = options("cache-teacher", ["STUDENT=a", "EPOCHS=2"], level=1)  # make distill creates a missing cache
    assert nested == ["--student", "a"]
    assert options("distill", ["RESUME=1", "RUN=r"]) == ["--resume", "1", "--run", "r"]
    for target, word, text in (
        ("cache-teacher", "EPOCHS=2", "EPOCHS applies to make distill, not to make cache-teacher"),
        ("test", "FOO=1", "there is no variable FOO"),
        ("docs", "JOB=3", "did you mean JOBS"),
    ):
        with pytest.raises(UserError, match=text):
            options(target, [word])
    assert options("test", ["ARGS=-k x", "JOBS=3", "VENV=none"]) == []
    assert options("study", ["PLAN=1", "SUITE=cpu"]) == ["--plan", "--suite", "cpu"]


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
    def main(given):
        assert given == {"deep": "true"}
        if isinstance(raised, BaseException):
            raise raised
        return raised

    monkeypatch.setattr(SCALEKD.commands["verify"], "main_function", main)
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        command.run(SCALEKD, ["verify", "--deep"])
    assert (stopped.value.code or 0) == status
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_that_the_terminal_cannot_encode(monkeypatch, encoding):
    """LANG=C and a file name with other letters."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    def main(given):
        raise UserError("unknown names Größe, 大")

    monkeypatch.setattr(SCALEKD.commands["verify"], "main_function", main)
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "stderr", output)
    with pytest.raises(SystemExit) as stopped:
        command.run(SCALEKD, ["verify"])
    assert stopped.value.code == 2
    expected = "unknown names Größe, 大".encode(encoding, "backslashreplace")
    assert expected in output.buffer.getvalue()


@pytest.mark.parametrize("stop", [UserError("it broke"), RunInterrupted("SIGINT: checkpoint saved", 130)])
def test_ranks_print_the_same_message_once(monkeypatch, capsys, tmp_path, stop):
    def main(given):
        raise stop

    monkeypatch.setattr(SCALEKD.commands["verify"], "main_function", main)
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    monkeypatch.setenv(launcher.REPORTED, str(tmp_path))
    for _ in range(2):
        with pytest.raises(SystemExit):
            command.run(SCALEKD, ["verify"])
    assert capsys.readouterr().err.count(str(stop)) == 1
    stop.args = ("another",)
    with pytest.raises(SystemExit):
        command.run(SCALEKD, ["verify"])
    assert "another" in capsys.readouterr().err


def test_a_second_command_that_writes_a_cache_says_that_it_waits(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cache_teacher.tempfile, "gettempdir", lambda: str(tmp_path))
    given = {"cache.path": str(tmp_path / "cache")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cache_teacher.one_job_per_node(given))
        waits = threading.Thread(target=lambda: stack.enter_context(cache_teacher.one_job_per_node(given)))
        monkeypatch.setattr(cache_teacher, "lock", lambda *args, wait=True: wait or lock(*args, wait=False))
        waits.start()
        waits.join()
    assert capsys.readouterr().err == f"waiting for another command that is writing to {tmp_path / 'cache'}\n"


def test_without_a_command_help_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(command.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        command.run(SCALEKD, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("Usage: ")


def test_a_path_may_start_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert given_by("distill", ["--cache=~/caches/x", "--student", "a~/b"]) == {
        "cache": "/home/me/caches/x",
        "student.name": "a~/b",
    }


def test_debug_shows_where_it_broke():
    with pytest.raises(UserError, match="views"):
        command.run(SCALEKD, ["prove", "--debug", "--views", "1"])


def test_help_lists_every_option_the_first_ones_first():
    text = SCALEKD.commands["distill"].get_help(click.Context(SCALEKD.commands["distill"], info_name="scalekd distill"))
    for option in options_of(DistillConfig):
        assert f"--{option.name}" in text.replace("-", "_").replace("__", "--")
    assert "DeepSpeed ZeRO stage" in text
    first = text.partition("Options:")[2].partition("More options:")[0]
    assert first.count("\n  --") == command.FIRST
    for line in SCALEKD.commands["plan"].params:
        assert line.hidden or line.help, line.name
    assert first.index("--student") < first.index("--cache") < first.index("--dry-run")


def test_a_launcher_is_started_once(monkeypatch):
    """With several processes torchrun is started; the processes themselves, which have a rank, start none."""
    started, checked = [], []
    monkeypatch.setattr(launcher, "_torchrun", lambda options, nproc, words: started.append((nproc, words)) or 75)
    monkeypatch.delenv("RANK", raising=False)
    argv = ["scalekd", "cache-teacher", "--nproc", "2", "--views", "1"]
    monkeypatch.setattr(launcher.os, "environ", dict(launcher.os.environ))
    settings = build(launcher.LaunchConfig, {"nproc": "2"})
    assert launcher.launch(settings, "cache-teacher", {}, argv, lambda given, nproc: checked.append(given)) == 75
    assert started == [(2, ["pipelines.cache_teacher", "--nproc", "2", "--views", "1"])]
    words = ["cache_teacher.py", "--nproc", "2"]
    assert launcher.launch(settings, "cache-teacher", {}, words, lambda given, nproc: checked.append(given)) == 75
    assert started[1] == (2, ["pipelines.cache_teacher", "--nproc", "2"])
    launcher.os.environ["RANK"] = "1"
    assert launcher.launch(settings, "cache-teacher", {}, argv, lambda given, nproc: checked.append(given)) is None
    assert len(started) == len(checked) == 2


def test_a_node_of_several_needs_its_number():
    with pytest.raises(UserError, match="--nnodes 2 needs --node-rank on every node"):
        build(launcher.LaunchConfig, {"nnodes": "2"})


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
    assert cache_teacher_config(CacheTeacherConfig, {"data.source": data}).cache.path == cache
    given = {"data.source": data, "cache.path": "x"}
    assert cache_teacher_config(CacheTeacherConfig, given).cache.path == "x"


@pytest.mark.parametrize(("data", "name"), [(".", "here"), ("./", "here"), ("..", "above"), ("../../above", "above")])
def test_the_default_cache_of_a_relative_folder(tmp_path, monkeypatch, data, name):
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    assert default_cache(data) == f"caches/{name}"


@pytest.mark.parametrize("data", ["/sets/my pets", "/sets/x-{0..1}.tar", "/sets/it's", "..", "demo"])
def test_make_has_the_same_default(data):
    words = execute("make", "-n", "distill", "VENV=none", f"PYTHON={sys.executable}", f"DATA={data}", "STUDENT=x")
    assert f"ls {default_cache(data)}/manifest.json" in words
    assert shlex.join(["--data", data]) in words


def test_folders_of_runs_are_words_of_a_shell():
    folders = ["runs/a", "my runs/b", "it's"]
    assert run_folders(shlex.join(folders)) == [Path(folder) for folder in folders]
    with pytest.raises(UserError, match="cannot split --runs into folders"):
        run_folders("it's")


def test_folders_of_runs_are_separated_by_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    assert run_folders("runs/a,runs/b 'my runs/c'") == [Path("runs/a"), Path("runs/b"), Path("my runs/c")]
    assert run_folders("runs/a, runs/b") == [Path("runs/a"), Path("runs/b")]
    assert run_folders("a,b") == [Path("a,b")]
