"""Bytes of a cache that each rank reads, counted by the kernel: /proc/self/io has the bytes of all read calls."""

from pathlib import Path

import pytest
from small_cache import make, shared_weights

from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.store.base import BACKENDS
from scalekd_cache.store.reader import Cache

COUNTER = Path("/proc/self/io")
pytestmark = pytest.mark.skipif(not COUNTER.exists(), reason="needs Linux: /proc/self/io")


@pytest.fixture(scope="module", params=BACKENDS)
def root(request, tmp_path_factory):
    """Records of about 10 KB; those of a real cache are ten times as large, so its indexes matter even less."""
    folder = tmp_path_factory.mktemp("share") / "cache"
    make(folder, shared_weights(), cache={"codec": "float32", "backend": request.param, "samples_per_shard": 96})
    return folder


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in COUNTER.read_text().splitlines())
    return int(fields["rchar"])


def view_bytes(root, view):
    """Bytes of the shards of a view."""
    shards = [path for unit in (root / "units").iterdir() for path in unit.glob(f"v{view:04d}*")]
    files = [file for path in shards for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_rank_reads_its_share(root, world_size):
    """In an epoch, each of N ranks reads at most 1.1 / N of the view's bytes, including indexes and sidecars."""
    whole, seen = view_bytes(root, 0), []
    assert whole > 10**5
    for rank in range(world_size):
        cache = Cache.open(root)
        loader = CacheLoader(
            cache,
            Order(num_samples=len(cache), block=8, window=64, seed=1),
            epochs=1,
            global_batch=24,
            micro_batch=2,
            rank=rank,
            world_size=world_size,
        )
        before = bytes_read()
        ids = [int(position) for batch in loader for position in batch.ids]
        share = (bytes_read() - before) / whole
        assert len(ids) == len(cache) / world_size
        assert 0.9 / world_size < share <= 1.1 / world_size
        seen += ids
    assert sorted(seen) == list(range(len(cache)))
