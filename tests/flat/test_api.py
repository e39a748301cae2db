"""The Python functions: the same names, checks and results as the commands, in one process."""

import pytest
from commands import CACHE_OPTIONS, STUDENT, TRAIN_OPTIONS, read_json, run
from small_cache import shared_weights

import scalekd_cache
from pipelines import distill as command
from scalekd_cache import UserError
from scalekd_cache.api import distill_config
from scalekd_cache.store.manifest import read_manifest
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


def test_a_cache_by_function(made):
    assert (made.images, made.views, made.teacher) == (96, 1, "demo_swin")
    assert made.bytes_per_view["total"] > made.bytes_per_view["features"] > 0
    assert made.fingerprint == read_manifest(made.path).facts.fingerprint
    assert made.fidelity["cosine"]["mean"] > 0.999
    again = scalekd_cache.cache_teacher(cache=made.path, teacher_weights=shared_weights(), views=1, options=OPTIONS)
    assert again == made


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


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        ("cache_teacher", {"codec": "int9"}, "there is no feature codec int9: did you mean int8"),
        ("cache_teacher", {"options": {"vews": 3}}, "there is no option vews: did you mean views"),
        ("cache_teacher", {"vews": 3}, "there is no option vews: did you mean views"),
        ("cache_teacher", {"codec": "int8", "options": {"cache.codec": "raw"}}, "cache.codec is set twice"),
        (
            "cache_teacher",
            {"views": 2, "options": {"cache.num_views": 3}},
            "cache.num_views is set twice",
        ),
        ("cache_teacher", {"size": 5}, "invalid value for views.size"),
        ("distill", {"student": STUDENT, "cache": "no/such"}, "no/such"),
        ("distill", {"student": "resnet1O", "cache": None}, "there is no model resnet1O"),
        (
            "distill",
            {"student": STUDENT, "cache": None, "options": {"optim.lr": "fast"}},
            "invalid value for optim.lr: fast",
        ),
    ],
)
def test_errors_are_those_of_the_command(made, tmp_path, function, arguments, text):
    if function == "distill":
        arguments = {**arguments, "run": tmp_path / "run", "cache": arguments["cache"] or made.path}
    else:
        arguments = {"cache": tmp_path / "cache", "teacher_weights": shared_weights(), **arguments}
    with pytest.raises(UserError, match=text.replace(".", r"\.")):
        getattr(scalekd_cache, function)(**arguments)
    assert not list(tmp_path.iterdir())


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
