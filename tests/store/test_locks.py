"""Locks between processes, and the same commands on a file system without locks."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading

import pytest
from commands import ENV, LIMIT_S, ROOT

from pipelines.cache_teacher import one_job_per_node
from scalekd_cache.data.builtin import _download
from scalekd_cache.errors import UserError
from scalekd_cache.store import locks
from scalekd_cache.store.durable_files import temp_path_for
from scalekd_cache.store.remote.local_copies import LocalCopies
from scalekd_cache.training.run_folder import RunFolder, is_locked

DATA = bytes(range(256)) * 64
SHA256 = hashlib.sha256(DATA).hexdigest()
WITHOUT = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


@pytest.fixture(params=WITHOUT, ids=errno.errorcode.get)
def no_flock(request, monkeypatch):
    def flock(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_warned", set())


def test_a_run_folder_without_locks(tmp_path, no_flock, capsys):
    folder = RunFolder(tmp_path, {"a": 1})
    assert not is_locked(tmp_path)
    assert RunFolder(tmp_path, {"a": 1}).path == folder.path  # the second process cannot detect the first
    assert capsys.readouterr().err.count("warning: the file system that holds ") == 1


def test_a_download_without_locks(tmp_path, no_flock, capsys):
    with _download("cifar10", tmp_path / "data", allowed=True):
        pass
    assert "not support file locks" in capsys.readouterr().err


def fetch_copy(folder, start, results):
    start.wait(LIMIT_S)
    descriptor = LocalCopies(folder, 3 * len(DATA)).open(SHA256, len(DATA), lambda target: target.write_bytes(DATA))
    results.put(os.read(descriptor, 2 * len(DATA)) == DATA)


def test_local_copies_without_locks(tmp_path, no_flock, capsys):
    """Several processes fetch one file: each gets the right bytes, one copy stays, files of killed ones are removed."""
    folder = tmp_path / "copies"
    (folder / "incoming").mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait(LIMIT_S)
    left = temp_path_for(folder / "incoming" / "left.data")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    left.write_bytes(DATA)
    fork = multiprocessing.get_context("fork")
    start, results = fork.Event(), fork.Queue()
    processes = [fork.Process(target=fetch_copy, args=(folder, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get(timeout=LIMIT_S) for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [".lock", SHA256]
    LocalCopies(folder, 3 * len(DATA)).open("0" * 64, None, lambda target: target.write_bytes(DATA))
    assert (
        capsys.readouterr().err.count("not support file locks") == 2
    )  # the folder's lock and the incoming file's lock


def test_other_failures_of_a_lock_are_not_hidden(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locks.open_lock(tmp_path / ".lock") as file, pytest.raises(OSError, match="Input/output"):
        locks.lock(file, tmp_path / ".lock")


def _loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, _loop], ids=["FIFO", "folder", "loop"])
def test_something_else_in_the_place_of_a_lock(tmp_path, put):
    """Opening a FIFO would block forever."""
    put(tmp_path / ".lock")
    for call in (lambda: RunFolder(tmp_path, {}), lambda: is_locked(tmp_path)):
        with pytest.raises(UserError, match="a lock file is not a regular file"):
            call()


def waiting_make(folder, place, recipe, path=None):
    """Run a recipe under the Makefile's lock of an environment."""
    file = folder / "probe.mk"
    file.write_text(f"include Makefile\nwaiting-probe:\n\t@$(waiting) {recipe}\n")
    words = ["make", "-f", file, "waiting-probe", f"VENV={place}", f"PYTHON={sys.executable}"]
    environment = {**ENV, "PATH": f"{path}:{ENV['PATH']}"} if path else ENV
    return subprocess.Popen(
        list(map(str, words)), cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_makes_wait_for_each_other(tmp_path):
    log = tmp_path / "log"
    recipe = f"{{ echo begins >>{log}; sleep 0.5; echo ends >>{log}; }}"
    for process in [waiting_make(tmp_path, tmp_path / "venv", recipe) for _ in range(2)]:
        assert process.communicate(timeout=LIMIT_S)[0] == ""
    assert log.read_text().split() == ["begins", "ends"] * 2


@pytest.mark.parametrize("trouble", ["no locks", "a file in the way"])
def test_make_goes_on_without_a_lock(tmp_path, trouble):
    """The exit code of the recipe is preserved."""
    (tmp_path / "flock").write_text("#!/bin/sh\nexit 71\n")
    (tmp_path / "flock").chmod(0o755)
    place = tmp_path / ("venv" if trouble == "no locks" else "flock/venv")
    process = waiting_make(tmp_path, place, "exit 3", tmp_path if trouble == "no locks" else None)
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 2
    assert f"warning: no file lock next to {place}" in output
    assert "Error 3" in output


def test_two_commands_that_write_one_cache_on_one_node_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    steps, given = [], {"cache.path": str(tmp_path / "new" / "cache")}

    def second():
        with one_job_per_node(given):
            steps.append("second")

    node = {**given, "nnodes": "2", "node_rank": "1"}
    with one_job_per_node(given), one_job_per_node(node), one_job_per_node({**given, "nnodes": "1:4"}):
        thread = threading.Thread(target=second)
        thread.start()
        with one_job_per_node({"cache.path": "another"}), one_job_per_node({**given, "dry_run": "true"}):
            thread.join(0.3)
        steps.append("first")
    thread.join(LIMIT_S)
    assert steps == ["first", "second"]
    assert not (tmp_path / "new").exists()
