"""A cache that stores features for one in four views of every image, and the same cache with all features."""

import functools
import tempfile
from pathlib import Path

from small_cache import make, shared_weights

from scalekd_cache.store.reader import Cache

IMAGES, EVERY, SHARD = 48, 4, 21
"""The last of three shards has six images."""


@functools.cache
def _holder():
    return tempfile.TemporaryDirectory(prefix="sparse-")


def make_sparse(root, share=1 / EVERY, cache=None, **changes):
    """Make or resume such a cache."""
    layout = {"num_views": EVERY, "views_per_group": EVERY, "samples_per_shard": SHARD, "stored_features": share}
    changes = {"data": {"max_samples": IMAGES}, **changes}
    return make(root, shared_weights(), cache={**layout, **(cache or {})}, **changes)


@functools.cache
def finished(share=1 / EVERY, backend="webdataset"):
    """A finished cache that tests must not change."""
    root = Path(_holder().name) / f"{backend}-{share}"
    make_sparse(root, share, cache={"backend": backend})
    return Cache.open(root)
