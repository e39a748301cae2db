"""The operator that DeepSpeed compiles: every build failure is one message, never a hang or a traceback."""

import importlib.util
import os
import shutil
import time

import pytest
import torch
from torch.utils import cpp_extension

from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.training import compiled_op
from scalekd_cache.training.compiled_op import NAME, prepare_build

CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / NAME).mkdir()
    return tmp_path / NAME


@pytest.mark.parametrize("variable", ["TORCH_EXTENSIONS_DIR", "HOME"])
@pytest.mark.parametrize("place", ["nowhere", "file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, variable, place):
    places = {"nowhere": "/proc/nohome", "file": str(tmp_path / "file"), "read-only": str(tmp_path)}
    (tmp_path / "file").write_text("")
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, places[place])
    if place == "read-only":
        monkeypatch.setattr(compiled_op.shutil, "which", lambda _: "g++")
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="cannot write to the build folder") as error:
        prepare_build(CPU, lambda: None)
    assert "TORCH_EXTENSIONS_DIR" in str(error.value)


def test_a_compiler_that_fails_is_explained(folder):
    def fail():
        raise RuntimeError("Error building extension\nfatal error: no space left")

    with pytest.raises(UserError, match="failed to compile\n  got: fatal error"):
        prepare_build(CPU, fail)


@pytest.fixture
def baton(monkeypatch):
    """torch up to 2.13: the existence of the lock file is the lock."""
    monkeypatch.setattr(compiled_op, "LOCK_IS_A_FILE", True)


def test_the_lock_file_of_newer_versions_of_torch_is_ignored(folder, monkeypatch, capsys):
    monkeypatch.setattr(compiled_op, "LOCK_IS_A_FILE", False)
    (folder / "lock").touch()
    prepare_build(CPU, lambda: None)
    assert (folder / "lock").exists()
    assert "waiting" not in capsys.readouterr().out


def test_the_kind_of_lock_of_the_installed_torch():
    assert hasattr(cpp_extension, "FileLock") != compiled_op.LOCK_IS_A_FILE


@pytest.mark.usefixtures("baton")
def test_a_stale_lock_of_our_own_build_is_removed_at_once(folder):
    (folder / "lock").touch()
    (folder / ".scalekd.lock").write_bytes(b"building")
    there = []
    prepare_build(CPU, lambda: there.append((folder / "lock").exists()))
    assert there == [False]
    assert (folder / ".scalekd.lock").read_bytes() == b""


def test_without_a_compiler(monkeypatch, folder):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        prepare_build(CPU, lambda: None)


@pytest.mark.usefixtures("baton")
def test_a_stale_lock_of_another_build_is_removed(folder, capsys):
    (folder / "lock").touch()
    os.utime(folder / "lock", (time.time() - 2 * compiled_op.STALE_S,) * 2)
    prepare_build(CPU, lambda: None)
    assert not (folder / "lock").exists()
    assert "killed" in capsys.readouterr().out


@pytest.mark.usefixtures("baton")
def test_a_running_build_is_waited_for(folder, capsys, monkeypatch):
    (folder / "lock").touch()
    monkeypatch.setattr(compiled_op.time, "sleep", lambda _: (folder / "lock").unlink())
    prepare_build(CPU, lambda: None)
    assert "for another program's build" in capsys.readouterr().out


def build_folder(monkeypatch, home):
    """Where torch would compile the operator, as it is told while the operator is loaded."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    seen = []
    prepare_build(CPU, lambda: seen.append(cpp_extension._get_build_directory(NAME, verbose=False)))
    return seen[0]


@pytest.mark.parametrize("part", ["torch", "deepspeed", "ninja", "processor"])
def test_environments_do_not_share_a_folder(tmp_path, monkeypatch, part):
    """Used in turn, each would find the other's operator and compile it again."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    first = build_folder(monkeypatch, tmp_path)
    assert build_folder(monkeypatch, tmp_path) == first
    assert first.startswith(str(tmp_path))
    assert "TORCH_EXTENSIONS_DIR" not in os.environ
    which, spec = shutil.which, importlib.util.find_spec("pytest")
    if part == "torch":
        monkeypatch.setattr(torch, "__file__", "/other/torch/__init__.py")
    elif part == "deepspeed":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    elif part == "ninja":
        monkeypatch.setattr(shutil, "which", lambda name: "/other/ninja" if name == "ninja" else which(name))
    else:
        monkeypatch.setattr(compiled_op, "_processor", lambda: "flags : sse2")
    assert build_folder(monkeypatch, tmp_path) != first


def test_the_users_folder_is_kept(folder, monkeypatch, tmp_path):
    assert build_folder(monkeypatch, "/proc/nohome") == str(folder)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)


def test_a_build_is_announced_and_a_start_without_one_is_not(folder, capsys):
    prepare_build(CPU, lambda: (folder / f"{NAME}.so").touch())
    assert "compiling a small DeepSpeed operator" in capsys.readouterr().out
    prepare_build(CPU, lambda: None)
    assert capsys.readouterr().out == ""
