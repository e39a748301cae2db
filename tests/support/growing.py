"""A finished cache of two view groups, and the same cache as written by a slow writer: plan and tail, then units."""

import functools
import shutil
import tempfile
import threading
from pathlib import Path

from small_cache import make, shared_weights

from scalekd_cache.store.reader import Cache

IMAGES = 24


@functools.cache
def _holder():
    return tempfile.TemporaryDirectory(prefix="growing-")


@functools.cache
def two_groups(backend="webdataset"):
    """A finished cache of 24 images x 2 views, one view per group, three units per group; tests must not change it."""
    root = Path(_holder().name) / backend
    make_growing(root, cache={"backend": backend})
    return Cache.open(root)


def make_growing(root, cache=None, **changes):
    """Make or resume such a cache."""
    layout = {"samples_per_shard": IMAGES // 3, "views_per_group": 1, **(cache or {})}
    return make(root, shared_weights(), data={"max_samples": IMAGES}, cache=layout, **changes)


class Writer:
    """Moves the units of a finished cache into a folder with one rename each, as a writer commits them."""

    def __init__(self, root, whole):
        self.root, self.whole = root, whole.root
        (root / "units").mkdir(parents=True)
        for name in ("plan.json", "tail.safetensors"):
            shutil.copy(self.whole / name, root / name)

    def commit(self, *groups):
        for group in groups:
            for source in sorted((self.whole / "units").glob(f"g{group:03d}-*")):
                temp = self.root / "units" / f".tmp-{source.name}"
                shutil.copytree(source, temp)
                temp.rename(self.root / "units" / source.name)

    def finish(self):
        shutil.copy(self.whole / "manifest.json", self.root / "manifest.json")

    def later(self, seconds, group):
        """Commit a group after some seconds, in parallel to the test."""
        timer = threading.Timer(seconds, self.commit, (group,))
        timer.start()
        return timer
