"""Fixtures of the conformance suite: a cache in each backend, without the waits of fsync."""

import shutil
from pathlib import Path

import pytest
from store_cases import write_cache

from scalekd_cache.store import durable_files
from scalekd_cache.store.base import BACKENDS


@pytest.fixture(scope="module")
def no_fsync():
    """Skip fsync: thousands of small ones take longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable_files, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", params=list(BACKENDS))
def whole(request, tmp_path_factory, no_fsync) -> Path:
    """A cache that tests must not change."""
    return write_cache(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A cache that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))
