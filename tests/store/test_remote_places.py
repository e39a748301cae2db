"""A cache may be moved, linked and mounted read-only: reading never writes to it."""

import shutil
import subprocess
import sys

import pytest
from commands import ENV, LIMIT_S, ROOT, snapshot
from store_cases import NUM_SAMPLES, expected, write_cache

from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache

READER = """
import os, sys
root = sys.argv[1]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {f"os.{name}" for name in "mkdir rename remove rmdir utime chmod link symlink truncate".split()}

def watch(event, args):
    inside = any(str(arg).startswith(root) for arg in args)
    if inside and (event in CHANGES or event == "open" and args[2] & WRITING):
        print("writes:", event, args, flush=True)
        os._exit(3)

sys.addaudithook(watch)
from scalekd_cache.store.reader import Cache; from scalekd_cache.store.verify import verify_cache
cache = Cache.open(root)
print(sum(len(cache.read(range(len(cache)), view)) for view in range(3)), verify_cache(root, deep=True))
if sys.argv[2:]:
    open(root + "/new", "w")
"""


@pytest.fixture(scope="module", params=list(BACKENDS))
def whole(request, tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp(request.param), request.param)


def watched(folder, *words):
    return subprocess.run(
        [sys.executable, "-c", READER, str(folder), *words],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def test_a_moved_or_linked_cache_is_the_same(whole, tmp_path):
    (tmp_path / "copies").mkdir()
    copied = shutil.copytree(whole, tmp_path / "copies" / "moved")
    linked = tmp_path / "linked"
    linked.symlink_to(copied)
    inside = tmp_path / "links inside"  # each unit on another disk, as for a large cache
    (inside / "units").mkdir(parents=True)
    shutil.copy(whole / "manifest.json", inside)
    for unit in (whole / "units").iterdir():
        (inside / "units" / unit.name).symlink_to(unit)
    for place in (copied, linked, inside):
        cache = Cache.open(place)
        for view in range(3):
            assert cache.read(range(NUM_SAMPLES), view) == expected(view)
        assert verify_cache(place, deep=True) == []


def test_reading_and_checking_write_nothing(whole):
    """Like a read-only mount: no write permission; because root ignores permissions, any write attempt is an error."""
    before = snapshot(whole)
    paths = [whole, *whole.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        done = watched(whole)
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)
    assert (done.returncode, done.stdout) == (0, f"{3 * NUM_SAMPLES} []\n"), done.stderr
    assert snapshot(whole) == before


def test_the_watch_sees_a_write(whole):
    done = watched(whole, "and write")
    assert done.returncode == 3
    assert "writes: open" in done.stdout
    assert not (whole / "new").exists()
