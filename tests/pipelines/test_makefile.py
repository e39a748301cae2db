"""`make distill`: which cache it uses, when it creates one, and what it says about variables that it does not use."""

import json
import shutil
import subprocess
import sys

import pytest
from commands import ENV, ROOT, execute

STAND_IN = f"""#!/bin/sh
test "$2" != pipelines.make_options || exec env PYTHONPATH={ROOT} {sys.executable} "$@"
echo "$*" >> calls
case "$*" in *--check-values*) ;; *--json*) echo '{{}}' ;; *) echo "text" ;; esac
case "$*" in *--dry?run*) ;; *cache-teacher*) mkdir -p caches/demo && touch caches/demo/manifest.json ;; esac
"""
"""Instead of Python: only records the commands, and makes a cache."""


@pytest.fixture
def make_in(tmp_path):
    """Run `make -s distill NAME=value...` in a folder; its standard output, standard error and commands."""
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run_make(*words, **environment):
        command = ["make", "-s", "distill", "VENV=none", f"PYTHON={stand_in}", *words]
        done = subprocess.run(command, cwd=tmp_path, env={**ENV, **environment}, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        calls = (tmp_path / "calls").read_text().replace("-m pipelines ", "").splitlines()
        (tmp_path / "calls").unlink()
        return done.stdout, done.stderr, calls

    return run_make


@pytest.mark.parametrize("words", [["STUDENT="], ["STUDENT=", "RESUME=", "EXTEND=", "EPOCHS=2"]])
def test_an_empty_student_is_refused_before_an_environment_exists(tmp_path, words):
    output = execute("make", "distill", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}", *words, status=2)
    assert "error: set STUDENT, " in output
    assert output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_variables_that_an_existing_cache_does_not_use(make_in):
    given = ("STUDENT=x", "TEACHER=t", "SIZE=384", "VIEWS=16", "CODEC=float16", "STORE=", "RECIPE=demo", "WORKERS=0")
    _, stderr, calls = make_in(*given)
    assert stderr == ""  # stage 1 used them
    assert [call.split()[0] for call in calls] == ["distill", "cache-teacher", "distill"]
    for more, cache in ([], "caches/demo"), (["CACHE=a b"], "a b"):
        _, stderr, calls = make_in(*given, *more)
        assert stderr.startswith(
            f"note: the cache {cache} is not changed; ignored: TEACHER, VIEWS, SIZE, CODEC (to add views, run "
            "make cache-teacher; "
        )
        assert stderr.count("\n") == len(calls) == 1
    assert make_in("STUDENT=x", "RECIPE=demo", "WORKERS=0", "DATA=demo", "SET=views.size=3")[1] == ""


def test_variables_with_the_values_of_the_cache_are_not_reported(make_in, tmp_path):
    cache = tmp_path / "caches/demo"
    cache.mkdir(parents=True)
    kept = {"num_views": 4, "backend": "zarr", "view_recipe": {"size": 64}, "codec": {"id": "int8"}}
    (cache / "manifest.json").write_text(json.dumps({**kept, "teacher": {"config": {"name": "t", "weights": None}}}))
    same = ("STUDENT=x", "SIZE=64", "VIEWS=4", "STORE=zarr", "CODEC=int8", "TEACHER=t")
    assert make_in(*same)[1] == ""
    assert "; ignored: VIEWS, SIZE (" in make_in(*same, "SIZE=96", "VIEWS=8")[1]
    for damaged in ("{}", "[]", "{", '{"view_recipe": 1, "teacher": {"config": 1}, "codec": {"id": 1}}'):
        (cache / "manifest.json").write_text(damaged)
        assert "; ignored: TEACHER, VIEWS, SIZE, CODEC, STORE (" in make_in(*same)[1]


def test_the_demo_is_not_made_beside_another_cache_by_mistake(tmp_path):
    other = tmp_path / "caches/photos"
    other.mkdir(parents=True)
    (other / "manifest.json").touch()
    shutil.copyfile(ROOT / "Makefile", tmp_path / "Makefile")
    output = execute(
        "make", "-s", "-C", tmp_path, "distill", "VENV=none", f"PYTHON={sys.executable}", "STUDENT=x", status=2
    )
    assert "set CACHE, for example CACHE=caches/photos, or DATA=demo" in output


def test_json_is_the_only_standard_output(make_in):
    stdout, stderr, calls = make_in("STUDENT=x", "JSON=1", "DRY_RUN=1")  # a dry run ends with the missing cache
    assert (stdout, stderr, len(calls)) == ("{}\n", "", 2)
    stdout, stderr, calls = make_in("STUDENT=x", "JSON=1")
    assert (stdout, stderr) == ("{}\n", "text\n")
    assert ["--json 1" in call for call in calls] == [True, False, True]
    assert [call.split()[0] for call in calls] == ["distill", "cache-teacher", "distill"]
    assert make_in("STUDENT=x", "JSON=1")[:2] == ("{}\n", "")


NAMES = ("CACHE", "DATA", "TEACHERS", "FOLLOW", "RESUME", "EXTEND", "DRY_RUN", "JSON", "SIZE")


def test_the_environment_sets_no_options(make_in):
    environment = dict.fromkeys(NAMES, "1")
    plain = ["distill --student x --check-values", "cache-teacher --student x", "distill --student x"]
    assert make_in("STUDENT=x", **environment) == ("text\ntext\n", "", plain)
    assert make_in("STUDENT=x", **environment) == ("text\n", "", plain[-1:])
