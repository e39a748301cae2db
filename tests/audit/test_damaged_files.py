"""Every file of a cache, damaged in every way: commands report findings or one error, never a traceback or a hang."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented import call
from small_cache import make, shared_weights
from unlabeled_cache import unlabeled_cache

from pipelines import inspect_cache, report, verify
from scalekd_cache.errors import UserError
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.training.custom_loop import CachedTargets

FILES = {
    "webdataset": [
        "manifest.json",
        "plan.json",
        "codec.json",
        "tail.safetensors",
        "codec.safetensors",
        "classifier.safetensors",
        "units/g000-r00001/unit.json",
        "units/g000-r00001/keys.txt",
        "units/g000-r00001/v0000.tar",
        "units/g000-r00001/v0000.idx",
    ],
    "zarr": [
        f"units/g000-r00001/v0000.zarr/{name}"
        for name in ("zarr.json", "features/zarr.json", "features/c/0", "labels/c/0")
    ],
}
PLACES = [(backend, name) for backend, names in FILES.items() for name in names]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One cache per store; the tar cache has every kind of file."""
    root = tmp_path_factory.mktemp("caches")
    layout = {"num_views": 2, "views_per_group": 2, "samples_per_shard": 12}
    small = {"data": {"max_samples": 24}}
    fitted = {"codec": "transform", "logits": "recomputed"}
    make(root / "webdataset", shared_weights(), cache={**layout, **fitted}, **small)
    make(root / "zarr", shared_weights(), cache={**layout, "backend": "zarr"}, **small)
    return {backend: root / backend for backend in FILES}


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.touch(),
    "directory": lambda path: path.mkdir(),
    "loop of links": lambda path: path.symlink_to(path.name),
    "FIFO": lambda path: os.mkfifo(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "too large": _large,
}


def commands(root: Path, out: Path) -> dict[str, Callable[[], Any]]:
    few = ["--views", "4", "--images", "1", "--asked", "0"]
    return {
        "verify": lambda: call(verify, ["--cache", str(root)]),
        "verify DEEP": lambda: call(verify, ["--cache", str(root), "--deep", "--records", "0"]),
        "inspect": lambda: call(inspect_cache, ["--cache", str(root), "--index", "13"]),
        "report": lambda: call(report, ["--cache", str(root), "--out", str(out), *few]),
        "read": lambda: Cache.open(root).read(np.arange(24), 0),
        "train": lambda: list(CachedTargets(root, batch_size=12)),
    }


def outcomes(root: Path, out: Path) -> dict[str, int]:
    """Exit code of each use of a cache: 0, 1, or 2 for a `UserError`; other exceptions are raised."""
    found = {}
    for name, use in commands(root, out).items():
        try:
            status = use()
        except UserError:
            status = 2
        except SystemExit as error:
            status = error.code
        found[name] = status if isinstance(status, int) else 0
    return found


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("backend", "name"), PLACES)
def test_a_damaged_file_is_a_finding(
    caches: dict[str, Path], tmp_path: Path, backend: str, name: str, damage: str
) -> None:
    if "/" not in name and damage not in ("directory", "FIFO", "too large"):
        return  # the others differ only in the error of `open`
    root = Path(shutil.copytree(caches[backend], tmp_path / "cache"))
    (root / name).unlink()
    DAMAGE[damage](root / name)
    found = outcomes(root, tmp_path / "r.html")
    assert set(found.values()) <= {0, 1, 2}, found
    assert found["verify DEEP"] in (1, 2), found
    fast = name.startswith("units/") or name.endswith(".safetensors") or damage in ("directory", "FIFO")
    assert not fast or found["verify"] in (1, 2), found


@pytest.mark.parametrize("name", ["tail.safetensors", "heldout.safetensors", "classifier.safetensors"])
@pytest.mark.parametrize("size", [0, 9, -1, 1, 1 << 40])
def test_verify_compares_the_length_of_tensors_with_their_header(
    caches: dict[str, Path], tmp_path: Path, name: str, size: int
) -> None:
    """Without --deep, which reads them."""
    source = caches["webdataset"] if name.startswith("classifier") else unlabeled_cache().root
    root = Path(shutil.copytree(source, tmp_path / "cache"))
    assert verify_cache(root) == []
    os.truncate(root / name, size if size in (0, 9) else (root / name).stat().st_size + size)
    assert [problem.where for problem in verify_cache(root)] == [name]


@pytest.mark.parametrize(("backend", "name"), PLACES)
def test_a_bad_sector_is_a_finding(
    caches: dict[str, Path], tmp_path: Path, backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise EIO when Python reads this file; libraries that mmap a file are not affected."""
    bad, pread = str(caches[backend] / name), os.pread

    def fail(descriptor: int, *place: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}") == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, *place)

    class Failing:
        """A file whose reads fail."""

        def __init__(self, descriptor: int) -> None:
            self.descriptor = descriptor

        def __enter__(self) -> "Failing":
            return self

        def __exit__(self, *_: object) -> None:
            os.close(self.descriptor)

        def fileno(self) -> int:
            return self.descriptor

        def readable(self) -> bool:
            return True

        def read(self, *_: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        readinto = read

    def fdopen(descriptor: int, *arguments: Any, **options: Any) -> Any:
        is_bad = os.readlink(f"/proc/self/fd/{descriptor}") == bad
        return Failing(descriptor) if is_bad else opened(descriptor, *arguments, **options)

    opened = os.fdopen
    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "fdopen", fdopen)
    found = outcomes(caches[backend], tmp_path / "r.html")
    assert set(found.values()) <= {0, 1, 2}, found
    assert found["verify DEEP"] in (1, 2), found
