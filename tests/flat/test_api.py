"""The Python functions: the same names, checks and results as the commands, in one process."""

import importlib
import json

import pytest
from commands import CACHE_OPTIONS, STUDENT, TRAIN_OPTIONS, read_json, run
from documented import call
from small_cache import shared_weights

import scalekd_cache.api
from pipelines import distill as command
from scalekd_cache import ScaleKDConfig, UserError
from scalekd_cache.caching.configure import cache_teacher_config
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.training.configure import distill_config, fitting_micro_batch
from scalekd_cache.training.run_files import options_of_run
from scalekd_cache.training.series import single_runs

OPTIONS = {**CACHE_OPTIONS, "device": "cpu"}
del OPTIONS["cache.num_views"]
TRAINING = {
    name: value for name, value in TRAIN_OPTIONS.items() if name not in ("train.epochs", "train.global_batch_size")
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("api") / "cache"
    return scalekd_cache.cache_teacher(cache=place, teacher_weights=shared_weights(), views=1, options=OPTIONS)


def test_a_cache_by_function(made, capsys):
    assert (made.images, made.views, made.teacher) == (96, 1, "demo_swin")
    assert made.bytes_per_view["total"] > made.bytes_per_view["features"] > 0
    assert made.fingerprint == read_manifest(made.path).facts.fingerprint
    assert made.fidelity["cosine"]["mean"] > 0.999
    again = scalekd_cache.cache_teacher(cache=made.path, teacher_weights=shared_weights(), options=OPTIONS)
    assert again == made  # without views=, it does not grow to the recipe's views
    assert "to add views, set --views (recipe demo: " in capsys.readouterr().out


def test_students_by_function_one_after_the_other(made, tmp_path):
    """Two runs in one process; the losses are those of the command."""
    logged = []
    runs = [
        scalekd_cache.distill(
            student=STUDENT,
            cache=made.path,
            run=tmp_path / name,
            targets=targets,
            epochs=1,
            batch=TRAIN_OPTIONS["train.global_batch_size"],
            device="cpu",
            zero=None,  # the default
            init=None,
            options=TRAINING,
            log=lambda step, values: logged.append((step, values)),
        )
        for name, targets in (("a", None), ("b", "none"))
    ]
    steps = runs[0]["steps"]
    assert [step for step, values in logged if "loss" in values] == [*range(1, steps + 1)] * 2
    assert [summary["targets"] for summary in runs] == ["cached", "none"]
    assert all((tmp_path / name / "report.html").exists() for name in ("a", "b"))
    assert runs[0] == {"run": str(tmp_path / "a"), **read_json(tmp_path / "a" / "summary.json")}
    given = {**TRAIN_OPTIONS, "train.epochs": 1, "device": "cpu"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    run("distill", "--cache", made.path, "--student", STUDENT, "--run", tmp_path / "c", *words)
    typed = read_json(tmp_path / "c" / "summary.json")
    assert {name: typed[name] for name in ("top1", "top5", "steps")} == {
        name: runs[0][name] for name in ("top1", "top5", "steps")
    }


def test_a_run_is_resumed_and_extended_with_its_own_options(made, tmp_path):
    """The folder is enough: student, cache, batch size and heads are in its config.yaml."""
    options = {**TRAINING, "optim.schedule": "constant"}
    given = {
        "student": STUDENT,
        "cache": made.path,
        "heads": "linear",
        "batch": 16,
        "device": "cpu",
        "options": options,
    }
    whole = scalekd_cache.distill(run=tmp_path / "whole", epochs=2, **given)
    run = tmp_path / "run"
    first = scalekd_cache.distill(run=run, epochs=1, **given)
    assert scalekd_cache.distill(run=run, resume=True) == first
    (run / "summary.json").unlink()
    assert scalekd_cache.distill(run=run, resume=True)["top1"] == first["top1"]
    longer = scalekd_cache.distill(run=run, extend=True, epochs=2)
    assert (longer["steps"], longer["top1"]) == (whole["steps"], whole["top1"])
    with pytest.raises(
        UserError, match=r"different options(.|\n)*projector=lite(.|\n)*projector=linear(.|\n)*--resume; for a new"
    ):
        scalekd_cache.distill(run=run, resume=True, heads="lite")
    for action in ("resume", "extend"):
        with pytest.raises(UserError, match=f"there is no run to {action} in .*runn: did you mean .*run"):
            scalekd_cache.distill(run=tmp_path / "runn", **{action: True})
    stored = options_of_run({"run": str(run), "resume": True})
    assert (stored["student.name"], stored["run"]) == (STUDENT, str(run))
    assert not {"device", "train.workers"} & stored.keys()  # they depend on the machine
    for series in ({"train.seeds": "0,1"}, {"student.name": f"{STUDENT},resnet18"}):
        assert options_of_run({"run": str(run), "resume": True, "student.name": STUDENT, **series}) == {}
    with pytest.raises(UserError, match="set the student"):
        scalekd_cache.distill(cache=made.path)
    with pytest.raises(UserError, match=rf"set the student(.|\n)*--run {run} --resume(.|\n)*--epochs N --extend"):
        scalekd_cache.distill(run=run, epochs=5)


def errors_of_both(function, arguments):
    """The messages of the function and of the command; the command writes names with dashes."""
    options = {**arguments, **arguments.get("options", {})}
    options.pop("options", None)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(UserError) as called:
        getattr(scalekd_cache, function)(**arguments)
    with pytest.raises(UserError) as typed:
        call(importlib.import_module(f"pipelines.{function}"), words)
    return str(called.value), str(typed.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"codec": "int9"}, "there is no feature codec int9: did you mean int8"),
        ({"codec": "auto"}, "needs a target"),
        ({"size": 5}, "invalid value for views.size"),
        ({"views": "many"}, "cache.num_views: many (expected a whole number; --views)"),
        ({"data": "no/such"}, "there is no dataset no/such"),
        ({"recipe": "nope"}, "there is no recipe nope"),
        ({"student": "resnet5"}, "there is no model resnet5: did you mean resnet50"),
        ({"teacher": "a", "teachers": "a,b"}, "set either --teacher or --teachers"),
        ({"device": "gpu"}, "unknown device"),
        ({"pixels_from": "no/such"}, "there is no cache no/such (--pixels-from; "),
        ({"data": ""}, "--data.source has an empty value"),
        ({"dry_run": True, "codec": "int9"}, "there is no feature codec int9"),
        ({"dry_run": "maybe"}, "invalid value for dry_run: maybe (expected true or false)"),
    ],
)
def test_stage_1_has_the_errors_of_the_command(tmp_path, arguments, text):
    given = {"cache": tmp_path / "cache", "teacher_weights": shared_weights(), **arguments}
    called, typed = errors_of_both("cache_teacher", given)
    assert called == typed
    assert text in called
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"cache": "no/such"}, "there is no cache no/such (--cache; create it with "),
        ({"cache": "{made}/manifest.json"}, "is a file, not a cache: set --cache "),
        ({"cache": "{made}/units"}, "is not a cache: it contains no plan.json or manifest.json"),
        ({"cache": "{made}/.."}, "is not a cache: did you mean "),
        ({"cache": "{made}2"}, "did you mean "),
        ({"cache": "{made},no/such"}, "there is no cache no/such"),
        ({"cache": "no/such", "epochs": "three"}, "train.epochs: three (expected a whole number; --epochs)"),
        ({"cache": "no/such", "student": "resnet1O"}, "there is no model resnet1O"),
        ({"cache": "no/such", "recipe": "nope"}, "there is no recipe nope"),
        ({"cache": ""}, "--cache has an empty value"),
        ({"student": "resnet1O"}, "there is no model resnet1O"),
        ({"student": f"{STUDENT},resnet1O"}, "there is no model resnet1O"),
        ({"epochs": 0}, "invalid value for train.epochs: 0"),
        ({"batch": -4}, "invalid value for train.global_batch_size: -4"),
        ({"seeds": "0,x"}, "invalid value for train.seeds: 0,x"),
        ({"options": {"optim.lr": "fast"}}, "invalid value for optim.lr: fast"),
        ({"options": {"train.views": 99}}, "99"),
        ({"recipe": "traditional"}, "differ from those of recipe traditional"),
        ({"resume": True, "student": None}, "there is no run to resume in"),
        ({"extend": True}, "there is no run to extend in"),
        ({"init": "no/such"}, "no/such"),
        ({"follow": "maybe"}, "invalid value for follow: maybe"),
        ({"dry_run": True, "student": "resnet1O"}, "there is no model resnet1O"),
    ],
)
def test_stage_2_has_the_errors_of_the_command(made, tmp_path, arguments, text):
    given = {"student": STUDENT, "cache": "{made}", "run": tmp_path / "run", "device": "cpu", **arguments}
    given = {name: value for name, value in given.items() if value is not None}
    given["cache"] = given["cache"].format(made=made.path)
    called, typed = errors_of_both("distill", given)
    assert called == typed
    assert text in called
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("function", "arguments", "nearest"),
    [
        ("cache_teacher", {"vews": 3}, "views"),
        ("cache_teacher", {"options": {"vews": 3}}, "views"),
        ("distill", {"epoch": 3}, "epochs"),
        ("distill", {"batch_size": 3}, "batch"),
        ("distill", {"dryrun": True}, "dry_run"),
        ("distill", {"options": {"train.zerro": 1}}, "train.zero"),
        ("distill", {"cache": "no/such", "options": {"optm.lr": 1}}, "optim.lr"),
        ("finetune", {"model": STUDENT, "epoch": 3}, "epochs"),
    ],
)
def test_a_mistyped_name_is_answered_as_on_the_command_line(function, arguments, nearest):
    called, typed = errors_of_both(function, arguments)
    assert f": did you mean {nearest}" in called
    plain = [text.partition(" (--help")[0].replace("--", "").replace("-", "_") for text in (called, typed)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"codec": "int8", "options": {"cache.codec": "raw"}}, "cache.codec is set twice"),
        ({"views": 2, "options": {"cache.num_views": 3}}, "cache.num_views is set twice"),
        ({"data": 5}, "invalid value for data.source: 5 (expected text; --data)"),
        ({"options": "views.seed=1"}, "invalid value for options: views.seed=1 (expected a dict"),
    ],
)
def test_arguments_that_a_command_line_cannot_have(arguments, text):
    with pytest.raises(UserError) as error:
        scalekd_cache.cache_teacher(**arguments)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"student": [STUDENT, "resnet81"]}, "resnet81"),  # a list is the same as text with commas
        ({"student": STUDENT, "seeds": [0, -1]}, "-1"),
        ({"student": STUDENT, "log": "yes"}, "invalid value for log: yes (expected a function"),
    ],
)
def test_lists_and_functions(made, arguments, text):
    with pytest.raises(UserError) as error:
        scalekd_cache.distill(cache=made.path, dry_run=True, **arguments)
    assert text in str(error.value)


@pytest.mark.parametrize("function", ["cache_teacher", "distill"])
@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("nproc", 2, "--nproc 2"),
        ("nnodes", 2, "--nnodes 2"),
        ("json", True, "--json"),
        ("master_addr", "host", "--master-addr host"),
        ("plugin", "my_teacher", "--plugin my_teacher"),
        ("help", True, "--help"),
        ("debug", True, "--debug"),
    ],
)
def test_options_of_the_command_line_name_the_command(function, name, value, typed):
    with pytest.raises(UserError, match=f"^{name} is available only on the command line") as error:
        getattr(scalekd_cache, function)(**{name: value})
    assert f"or run `scalekd {function.replace('_', '-')} {typed} ...`" in str(error.value)


@pytest.mark.parametrize(("command", "function"), [("cache-teacher", "cache_teacher"), ("distill", "distill")])
def test_any_option_of_the_command_with_a_wrong_value_is_a_user_error(tmp_path, command, function):
    given = {"cache": str(tmp_path / "none"), "student": STUDENT}
    for name in PLAIN_NAMES[command]:
        for value in ({"a"}, b"a"):
            with pytest.raises(UserError):
                getattr(scalekd_cache, function)(**{**given, name: value})


def test_dry_runs_print_write_nothing_and_return_nothing(made, tmp_path, capsys):
    given = {"dry_run": True, "nproc": 1, "json": False}
    options = {"cache": tmp_path / "cache", "teacher_weights": shared_weights(), "options": OPTIONS}
    assert scalekd_cache.cache_teacher(**given, **options) is None
    assert "dry run: nothing was written" in capsys.readouterr().out
    config = ScaleKDConfig(projector="linear")
    options = {"cache": made.path, "options": {**TRAINING, "scalekd": config}, "batch": 32}
    assert scalekd_cache.distill(student=STUDENT, run=tmp_path / "run", **given, **options) is None
    assert f"would start at step 1 in {tmp_path / 'run'}" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_worker_that_dies_is_a_user_error(monkeypatch):
    def fails(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(scalekd_cache.api, "distill_config", fails)
    with pytest.raises(UserError, match="a data loader worker died"):
        scalekd_cache.distill(student=STUDENT)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"train.global_batch_size": "8"}, (8, 8)),
        ({"train.global_batch_size": 64}, (64, 16)),
        ({"train.global_batch_size": "8", "train.micro_batch_size": "4"}, (8, 4)),
        ({"train.global_batch_size": "20"}, (20, 10)),
        ({"train.global_batch_size": "48"}, (48, 16)),
        ({}, (32, 16)),
    ],
)
def test_a_batch_is_split_into_equal_micro_batches(made, given, sizes):
    train = distill_config({"cache": str(made.path), "student.name": STUDENT, **given}).train
    assert (train.global_batch_size, train.micro_batch_size) == sizes


def test_the_default_run_folder_names_the_targets(made):
    given = {"cache": str(made.path), "student.name": STUDENT}
    assert single_runs(distill_config(given))[0].run == f"runs/{STUDENT}"
    assert single_runs(distill_config({**given, "train.targets": "none"}))[0].run == f"runs/{STUDENT}-none"


def test_a_batch_that_the_processes_cannot_share_is_refused_before_they_start(made):
    given = {"cache": str(made.path), "student.name": STUDENT, "train.global_batch_size": "16"}
    with pytest.raises(UserError, match=r"set --train\.micro_batch_size 8 or --nproc 1"):
        command.check(given, 2)
    command.check({**given, "train.micro_batch_size": "8"}, 2)


def test_a_batch_without_a_fitting_micro_batch_is_refused(made):
    with pytest.raises(UserError, match=r"expected a divisor of train\.global_batch_size=17"):
        distill_config({"cache": str(made.path), "student.name": STUDENT, "train.global_batch_size": "17"})


@pytest.mark.parametrize("micro", ["16", 16.0])
def test_a_micro_batch_of_a_recipe_may_be_text(micro):
    training = {"train": {"micro_batch_size": micro, "global_batch_size": 32}}
    assert fitting_micro_batch(training, {"train.global_batch_size": "24"}) == {"train.micro_batch_size": 12}


def test_an_existing_cache_keeps_its_teacher_and_names_its_recipe(made, tmp_path, capsys):
    stored = cache_teacher_config(CacheTeacherConfig, {"cache.path": str(made.path)})
    again = {"cache.path": str(made.path), "teacher.name": stored.teacher.name}
    assert cache_teacher_config(CacheTeacherConfig, again).teacher == stored.teacher
    other = cache_teacher_config(CacheTeacherConfig, {**again, "teacher.name": "vit_tiny_patch16_224"})
    assert other.teacher.weights is None
    recipe = tmp_path / "more.yaml"
    recipe.write_text("cache: {views: " + json.dumps(read_manifest(made.path).facts.view_recipe) + "}\n")
    capsys.readouterr()
    cache_teacher_config(CacheTeacherConfig, {**again, "recipe": str(recipe)})
    assert f"keeps the training options of its recipe demo; to use those of {recipe}: " in capsys.readouterr().out


def test_the_dataset_of_a_recipe_names_the_cache(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("cache: {data: {source: photos/}}\n")
    config = cache_teacher_config(CacheTeacherConfig, {"recipe": str(recipe)})
    assert (config.data.source, config.cache.path) == ("photos/", "caches/photos")
