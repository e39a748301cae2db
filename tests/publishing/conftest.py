"""Small caches to publish."""

import pytest
from publications import finished_cache

from scalekd_cache.store.base import BACKENDS


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache in each store; tests must not change them."""
    folder = tmp_path_factory.mktemp("caches")
    return {backend: finished_cache(folder / backend, backend) for backend in BACKENDS}


@pytest.fixture
def cache(caches):
    return caches["webdataset"]
