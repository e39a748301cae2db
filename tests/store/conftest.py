"""Fixtures of the conformance suite: a cache in each backend."""

import shutil
from pathlib import Path

import pytest
from store_cases import write_cache

from scalekd_cache.store.base import BACKENDS


@pytest.fixture(scope="module", params=list(BACKENDS))
def whole(request, tmp_path_factory) -> Path:
    """A cache that tests must not change."""
    return write_cache(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A cache that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))
