"""Imports run only downwards between rooms: setup.cfg lists the layers once, and every room is in the list."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from commands import ROOT

LINT = Path(sys.executable).parent / "lint-imports"


def lint(folder):
    return subprocess.run(
        [LINT, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_imports_run_downwards_and_in_no_circle():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def copy_of_the_code(folder):
    for name in ("scalekd_cache", "pipelines", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "setup.cfg", folder)
    return folder


def test_an_upward_import_is_found(tmp_path):
    copy = copy_of_the_code(tmp_path)
    with (copy / "scalekd_cache" / "store" / "base.py").open("a") as file:
        file.write("\n\ndef _up() -> None:\n    import scalekd_cache.training.trainer  # noqa: F401\n")
    done = lint(copy)
    assert done.returncode == 1
    assert "scalekd_cache.store is not allowed to import scalekd_cache.training" in done.stdout


def test_a_room_without_a_place_is_found(tmp_path):
    copy = copy_of_the_code(tmp_path)
    (copy / "scalekd_cache" / "attic").mkdir()
    (copy / "scalekd_cache" / "attic" / "__init__.py").write_text('"""Things."""\n')
    done = lint(copy)
    assert done.returncode == 1
    assert "attic" in done.stdout


def test_at_most_six_modules_are_outside_the_rooms():
    assert len(list((ROOT / "scalekd_cache").glob("*.py"))) <= 6
