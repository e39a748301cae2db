"""A new user's first steps with a folder of photographs, and typical mistakes, each with a short error message.

All commands run in this process and folder. A command that fails leaves no file and no folder behind.
"""

import contextlib
import io
import shutil
import sys
import time

import pytest
from image_files import encoded, picture, write

from pipelines import command, launcher
from pipelines.__main__ import SCALEKD

CACHE = ("cache-teacher", "--data", "photos", "--teacher", "test_vit", "--pretrained", "false", "--size", "64")
SMALL = ("--views", "1", "--device", "cpu", "--workers", "0")
TRAIN = ("--student", "test_resnet", "--cache", "caches/photos", "--device", "cpu", "--workers", "0")
BATCH = ("--train.global_batch_size", "8", "--train.micro_batch_size", "4")
FIRST = ("distill", *TRAIN, *BATCH, "--run", "runs/first", "--epochs", "1")


def photographs(folder, names):
    for number, name in enumerate(names):
        write(folder / name, encoded(picture(number, (96, 72)), "JPEG"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Photographs in several layouts, two finished caches, a finished run, an interrupted run, and an empty folder."""
    home = tmp_path_factory.mktemp("home")
    classes = [f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(8)]
    photographs(home / "photos", [f"{split}/{name}" for split in ("train", "val") for name in classes])
    photographs(home / "noval", [f"train/{name}" for name in classes])
    (home / "empty").mkdir()
    photographs(home / "training", ["training/cat/0.jpg"])
    other = ("--cache", "caches/other", "--views.seed", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for words, text in (
            ((*CACHE, *SMALL), "next: scalekd distill --student resnet50 --cache caches/photos"),
            ((*CACHE, *SMALL, *other), "next: scalekd distill"),
            (FIRST, "(without predictions on validation images)\nnext: scalekd report --run runs/first\n"),
            (("distill", "--run", "runs/first", "--resume"), "runs/first is finished; nothing to do"),
            (("distill", "--run", "runs/first", "--resume"), "report: runs/first/report.html ("),
        ):
            status, output = typed(*words)
            assert status == 0, output
            assert text in output
    shutil.copytree(home / "runs" / "first", home / "runs" / "interrupted")
    (home / "runs" / "interrupted" / "summary.json").unlink()
    (home / "runs" / "started").mkdir(parents=True)
    return home


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def typed(*words):
    """Exit code and output of `scalekd WORDS`."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(command.os, "_exit", sys.exit)
        patch.setattr(sys, "argv", ["scalekd", *words])
        with pytest.raises(SystemExit) as stopped:
            command.run(SCALEKD, words)
    return int(stopped.value.code or 0), output.getvalue()


def everything(folder):
    """All files and folders, with the files' times."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.is_file() and path.stat().st_mtime_ns for path in paths}


MISTAKES = {
    "a mistyped command": ("distil --student resnet18", "did you mean distill?"),
    "a mistyped option": ("cache-teacher --dta photos", "did you mean --data"),
    "a mistyped student": ("distill --student resnet5 --cache caches/photos", "did you mean resnet50"),
    "a mistyped teacher": (
        "cache-teacher --data photos --teacher vit_smal_patch16_224",
        "did you mean vit_small_patch16",
    ),
    "a mistyped codec": (
        "cache-teacher --data photos --codec in8 --teacher test_vit --cache caches/b",
        "did you mean int8",
    ),
    "a mistyped recipe": ("cache-teacher --data photos --recipe traditonal", "did you mean traditional"),
    "a mistyped cache": ("distill --student resnet18 --cache caches/photo", "did you mean caches/"),
    "a mistyped dataset": ("cache-teacher --data photo", "did you mean photos?"),
    "a file as data": (
        "cache-teacher --data photos/train/cat/0.jpg",
        "is a file: pass a folder with train/<class>/*.jpg",
    ),
    "a folder without images": ("cache-teacher --data empty", "has no train/ and no images"),
    "a misnamed train/": ("cache-teacher --data training", "rename training/ to train/"),
    "a teacher of other classes": (
        "cache-teacher --data photos --teacher vit_small_patch16_224",
        "2 classes (cat, dog",
    ),
    "a repository in a folder": ("export --run runs/photos --push ann/pets/student", "such as user/name"),
    "no weights offline": (
        "cache-teacher --data photos --teacher vit_small_patch14_dinov2 --size 98 --cache caches/b",
        "scalekd fetch --teacher vit_small_patch14_dinov2",
    ),
    "fetch offline": ("fetch --teacher test_vit", "on a machine with network access"),
    "a word without an option": ("distill resnet50", "unexpected argument resnet50"),
    "an option without a value": ("distill --student resnet18 --epochs", "'--epochs' requires an argument"),
    "an empty value": ("distill --student resnet18 --cache=", "--cache has an empty value"),
    "no student": ("distill --cache caches/photos", "set the student, for example --student resnet50"),
    "no epochs": (f"distill {' '.join(TRAIN)} --epochs 0", "invalid value for train.epochs: 0"),
    "epochs in words": (
        f"distill {' '.join(TRAIN)} --epochs two",
        "invalid value for train.epochs: two",
    ),
    "no views": ("cache-teacher --data photos --views 0", "invalid value for cache.num_views: 0"),
    "too few photographs for a batch": (f"distill {' '.join(TRAIN)}", "use a smaller batch, for example --batch 16"),
    "another codec in the same cache": (" ".join((*CACHE, *SMALL, "--codec", "float16")), "int8"),
    "another size in the same cache": (
        " ".join((*CACHE, *SMALL, "--size", "96")),
        "views.size: 96 (requested) / 64 (cache)",
    ),
    "more epochs of a finished run": (f"{' '.join(FIRST)} --epochs 2", "to extend it, set --extend"),
    "the default number of epochs of a finished run": (
        f"{' '.join(FIRST[:-2])}",
        "not 100\n  what to do: to resume it: scalekd distill --run runs/first --resume; to extend it, set --extend",
    ),
    "images that do not exist for a student": (
        f"{' '.join(FIRST)} --run runs/new --data phots",
        "there is no dataset phots: did you mean photos",
    ),
    "images that do not exist, in a dry run": (
        f"{' '.join(FIRST)} --run runs/new --data phots --dry-run",
        "there is no dataset phots: did you mean photos",
    ),
    "to resume a run by its mistyped folder alone": (
        "distill --run runs/frst --resume",
        "there is no run to resume in runs/frst: did you mean runs/first",
    ),
    "to resume without a run": (
        f"{' '.join(FIRST)} --run runs/frst --resume",
        "there is no run to resume in runs/frst: did you mean runs/first",
    ),
    "to resume nothing": ("distill --resume", "set the run to resume, for example --run runs/resnet50"),
    "to extend nothing": ("distill --extend --epochs 4", "set the run to extend, for example --run runs/resnet50"),
    "to extend without a run": (
        f"{' '.join(FIRST)} --run runs/frst --epochs 4 --extend",
        "there is no run to extend in runs/frst: did you mean runs/first",
    ),
    "to extend without a run, in a dry run": (
        f"{' '.join(FIRST)} --run runs/new/run --extend --dry-run",
        "there is no run to extend in runs/new/run (remove --extend",
    ),
    "an option before the command": (
        "--student resnet18 distill",
        "put the command before its options: scalekd distill --student",
    ),
    "two kinds of targets": (f"{' '.join(FIRST)} --targets cached,none", "once for each value"),
    "a baseline in the same run": (
        f"{' '.join(FIRST)} --targets none",
        "for example --run runs/first-none",
    ),
    "another student in the same run": (f"{' '.join(FIRST)} --student resnet18", "choose a different --run"),
    "another cache in the same run": (
        f"{' '.join(FIRST)} --cache caches/other",
        "a run that uses a different cache",
    ),
    "evaluate without a run": ("evaluate --run runs/none", "there is no run runs/none"),
    "export without a run": ("export --run runs/none", "there is no run runs/none"),
    "report without a run": ("report --run runs/none", "there is no run runs/none"),
    "a report of nothing": ("report", "set exactly one of cache, run and runs"),
    "a report of a run that has not begun": ("report --run runs/started", "runs/started"),
    "to verify the photographs": ("verify --cache photos", "photos is not a cache"),
    "to verify the folder of caches": ("verify --cache caches", "did you mean caches/"),
    "to inspect the photographs": ("inspect --cache photos", "photos is not a cache"),
    "to repair the photographs": ("repair --cache photos", "photos is not a cache"),
    "the photographs as a new cache": (
        " ".join((*CACHE, *SMALL, "--cache", "photos")),
        "--cache photos is a dataset (it contains train/)",
    ),
    "a folder of photographs as a new cache": (
        " ".join((*CACHE, *SMALL, "--data", "photos/train/cat", "--cache", "photos/train/cat", "--dry-run")),
        "--cache photos/train/cat is the dataset: choose",
    ),
    "a run as a new cache": (
        " ".join((*CACHE, *SMALL, "--cache", "runs/first")),
        "--cache runs/first is a run: choose",
    ),
    "the photographs as a run": (f"{' '.join(FIRST)} --run photos", "--run photos is a dataset (it contains train/)"),
    "the photographs as a run, in a dry run": (
        f"{' '.join(FIRST)} --run photos --dry-run",
        "--run photos is a dataset",
    ),
    "to evaluate the folder of runs": ("evaluate --run runs", "there is no run runs: did you mean runs/first"),
    "to export an export": ("export --run runs/first/export", "did you mean runs/first?"),
    "a recipe file that does not exist": (f"{' '.join(FIRST)} --recipe my.yaml", "there is no recipe file my.yaml ("),
    "a recipe file that does not exist, for a cache": ("cache-teacher --recipe my.yml", "no recipe file my.yml ("),
    "initial weights from the photographs": (
        f"{' '.join(FIRST)} --run runs/new --init photos",
        "set --init to a finished run",
    ),
    "an extended run with another learning rate": (
        "distill --run runs/first --extend --epochs 2 --optim.lr 0.3",
        "  got: optim.lr=0.3\n",
    ),
    "a model without weights, offline": (
        "finetune --model resnet18 --data photos",
        "error: no weights for resnet18: HF_HUB_OFFLINE is set (unset it to download)",
    ),
    "to train on the photographs": ("distill --student resnet18 --cache photos", "photos is not a cache"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_a_short_answer_and_leaves_nothing(name, home):
    words, text = MISTAKES[name]
    before, start = everything(home), time.monotonic()
    status, output = typed(*words.split())
    assert status == 2, output
    assert text in output
    assert time.monotonic() - start < 60
    answer = output[output.index("error: ") :].splitlines()
    assert len(answer) <= (4 if any(line.startswith("  got:") for line in answer) else 3), output
    assert max(map(len, answer)) < 300, output
    assert everything(home) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("distill --cache caches/photos --student resnet5", "there is no model resnet5"),
        ("distill --cache caches/photos --student resnet18,resnet5", "there is no model resnet5"),
        (
            "distill --cache caches/photos --student resnet18 --targets cahced",
            "invalid value for train.targets: cahced",
        ),
        ("cache-teacher --codec in8", "there is no feature codec in8"),
        ("cache-teacher --teacher vit_smal", "there is no model vit_smal"),
        ("cache-teacher --student resnet5", "there is no model resnet5"),
    ],
)
def test_a_mistype_is_found_before_several_processes_start(monkeypatch, home, words, text):
    monkeypatch.setattr(launcher, "_torchrun", lambda *args: pytest.fail("torchrun was started"))
    monkeypatch.setattr(launcher.os, "environ", {k: v for k, v in launcher.os.environ.items() if k != "RANK"})
    before = everything(home)
    status, output = typed(*words.split(), "--nproc", "2")
    assert (status, output.count("\n")) == (2, 1), output
    assert output.startswith(f"error: {text}")
    assert everything(home) == before


STEPS = {
    "the run again": (FIRST, "runs/first is finished; nothing to do"),
    "evaluate": (("evaluate", "--run", "runs/first"), "runs/first: top-1 "),
    "the cache again": ((*CACHE, *SMALL), "nothing to do"),
    "a dry run of stage 1": ((*CACHE, *SMALL, "--cache", "caches/dry", "--dry-run"), "nothing was written"),
    "a dry run of stage 1 at 384 pixels": (
        (*CACHE, *SMALL, "--size", "384", "--cache", "caches/384", "--dry-run"),
        "nothing was written",
    ),
    "a dry run without val/": (
        (*CACHE, *SMALL, "--data", "noval", "--dry-run"),
        "accuracy is not measured:\nnoval has no val/\n  what to do: add val/<class>/ with",
    ),
    "a dry run of stage 2": (("distill", *TRAIN, *BATCH, "--dry-run"), "nothing was written"),
    "a student listed twice is trained once": (
        ("distill", *TRAIN, *BATCH, "--student", "test_resnet,test_resnet", "--run", "runs/once", "--dry-run"),
        "runs/once",
    ),
    "a forecast": (("plan", *CACHE[1:], *SMALL), "time on this machine"),
    "verify": (("verify", "--cache", "caches/photos"), "no problems"),
    "inspect": (("inspect", "--cache", "caches/photos"), "int8"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_writes_nothing(name, home):
    words, text = STEPS[name]
    before = everything(home)
    status, output = typed(*words)
    assert status == 0, output
    assert text in output
    assert everything(home) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("report", "--run", "runs/first"), "runs/first/report.html"),
        (("report", "--run", "runs/interrupted"), "runs/interrupted/report.html"),
        (("report", "--cache", "caches/photos"), "caches/photos.report.html"),
        (("export", "--run", "runs/first", "--out", "student"), "student"),
    ],
)
def test_a_step_that_writes_a_result(words, text, home):
    status, output = typed(*words)
    assert status == 0, output
    assert text in output
    assert (home / text).exists()
