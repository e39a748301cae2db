"""Every user error ends with exit code 2, one message and no traceback."""

import fcntl
import sys

import pytest
from commands import cache_flags, distill_flags, execute, run

from pipelines.distill import check_before_cache
from scalekd_cache.errors import UserError


def answer(name, *words):
    output = run(name, *words, status=2)
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    return output


def refused(name, *words):
    output = answer(name, *words)
    assert "what to do: " in output
    return output


def one_line(name, *words):
    """The error for a typo, which has a single line, the last one."""
    *before, last = answer(name, *words).splitlines()
    assert last.startswith("error: "), before
    return last


def test_unknown_option_names_the_nearest(tmp_path):
    output = one_line("cache_teacher", "--cache.num_veiws", 3)
    assert "did you mean --cache.num_views" in output


def test_unknown_option_of_distill_names_the_nearest(cache, tmp_path):
    output = one_line("distill", *distill_flags(cache, tmp_path / "run"), "--train.zerro", 1)
    assert "did you mean --train.zero" in output
    assert not (tmp_path / "run").exists()


def test_value_of_another_type_names_the_option(tmp_path):
    assert "num_views: many (expected a whole number" in one_line("cache_teacher", "--cache.num_views", "many")


def test_unknown_recipe_names_the_nearest(tmp_path):
    assert "did you mean traditional, " in one_line("cache_teacher", "--recipe", "traditonal")


def test_unknown_student_names_the_nearest(cache, tmp_path):
    output = one_line("distill", *distill_flags(cache, tmp_path / "run", **{"student.name": "resnet5"}))
    assert "there is no model resnet5: did you mean resnet50" in output


def test_unknown_codec_names_the_nearest(tmp_path):
    output = one_line("cache_teacher", "--cache.codec", "in8", "--cache.path", tmp_path / "cache")
    assert "there is no feature codec in8: did you mean int8" in output
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("command", ["verify", "inspect_cache", "prove"])
def test_cache_that_is_a_file_names_the_folder(command, cache):
    output = one_line(command, "--cache", cache / "manifest.json")
    assert output == f"error: {cache / 'manifest.json'} is a file, not a cache: set --cache {cache}"


NO_CACHE = ["distill", "VENV=none", f"PYTHON={sys.executable}", "DATA=none"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["distil", "STUDENT=resnet18"], "there is no target distil: did you mean distill or install?"),
        (["distill", "STUDENT=resnet18", "EPOCH=3"], "there is no variable EPOCH: did you mean EPOCHS?"),
        (["cache-teacher", "LR=0.1"], "there is no variable LR (make cache-teacher; `make help` lists"),
        (["distill"], "set STUDENT, for example `make distill STUDENT=resnet50`"),
        (
            ["distill", "VENV=none", f"PYTHON={sys.executable}", "DATA=none", "STUDENT=resnet18", "SET=optm.lr=3"],
            "there is no option --optm.lr: did you mean --optim.lr",  # not: there is no dataset none
        ),
        ([*NO_CACHE, "STUDENT=resnet18", "EPOCHS=abc"], "epochs"),
        ([*NO_CACHE, "STUDENT=resnet51"], "there is no model resnet51: did you mean"),
        ([*NO_CACHE, "STUDENT=resnet18", "SET=train.tracker=none2"], "tracker"),
    ],
)
def test_words_that_make_does_not_know(words, answer):
    output = execute("make", *words, status=2)
    assert sum("error: " in line for line in output.splitlines()) == 1, output
    assert answer in output


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ("20", "cannot be divided evenly among 3 processes"),
        ("9999", "use a smaller batch, for example --batch 99"),
    ],
)
def test_a_batch_is_checked_before_make_creates_the_cache(batch, text):
    given = {"student.name": "test_resnet", "data": "demo", "train.global_batch_size": batch, "nproc": "3"}
    with pytest.raises(UserError, match=text):
        check_before_cache(given)
    check_before_cache({**given, "train.global_batch_size": "30", "train.micro_batch_size": "10"})


def test_no_cache_says_how_to_make_one(tmp_path):
    output = one_line("distill", *distill_flags(tmp_path / "nothing", tmp_path / "run"))
    assert "create it with `scalekd cache-teacher --data DATASET --cache" in output
    assert not (tmp_path / "run").exists()


def test_lamb_with_zero_says_why(cache, tmp_path):
    options = {"optim.name": "lamb", "train.zero": 1}
    assert "LAMB" in refused("distill", *distill_flags(cache, tmp_path / "run", **options))


def test_recipe_with_other_views_names_the_field(cache, tmp_path):
    output = refused("distill", *distill_flags(cache, tmp_path / "run", recipe="traditional"))
    assert "views.size=224" in output
    assert "views.size=64" in output


def test_cache_of_other_options_names_the_field(cache, weights):
    output = refused("cache_teacher", *cache_flags(cache, weights, **{"views.jpeg_quality": 80}))
    assert "views.jpeg_quality: 80 (requested) / 90 (cache)" in output


def test_cache_of_another_teacher_names_the_field(cache, weights):
    words = cache_flags(cache, weights)
    at = words.index("--teacher.weights")
    output = refused("cache_teacher", *words[:at], *words[at + 2 :], "--teacher.pretrained", "false")
    assert "teacher.weights_sha256" in output


@pytest.fixture
def copy_of_run(finished, tmp_path):
    """A run folder with only the options of a finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    text = (finished / "config.yaml").read_text().replace(str(finished), str(folder))
    (folder / "config.yaml").write_text(text)
    return folder


def test_run_of_other_options_names_the_field(copy_of_run, cache):
    output = refused("distill", *distill_flags(cache, copy_of_run, **{"optim.lr": 0.5, "train.seed": 3}))
    assert "optim.lr=0.5" in output
    assert "train.seed=3" in output
    assert "train.epochs" not in output


def test_run_in_a_folder_in_use_is_refused(copy_of_run, cache):
    with open(copy_of_run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        output = one_line("distill", *distill_flags(cache, copy_of_run))
    assert f"another process is training in {copy_of_run}" in output


def test_no_whole_global_batch_is_refused(cache, tmp_path):
    options = {"train.global_batch_size": 128}
    assert "global batch" in refused("distill", *distill_flags(cache, tmp_path / "run", **options))
