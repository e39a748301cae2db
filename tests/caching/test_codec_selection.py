"""A fitted codec: fitted once per cache, reused by resumed jobs and by readers, in both backends."""

import json

import numpy as np
import pytest
import torch
from small_cache import CPU, SAMPLES, make, options, shared_weights, unit_files

from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order


@pytest.mark.parametrize("backend", ["webdataset", "zarr"])
def test_a_fitted_cache_is_read_by_the_loader(tmp_path, backend):
    cache = make(tmp_path / "cache", shared_weights(), cache={"codec": "transform", "backend": backend})
    cosine = cache.manifest.fidelity["cosine_mean_removed"]
    assert cosine["p1"] >= 0.998
    assert cosine["count"] == SAMPLES * 2
    lengths = {len(record.features) for record in cache.read(np.arange(SAMPLES), 0)}
    assert len(lengths) > 1  # entropy-coded
    loader = CacheLoader(
        cache, Order(num_samples=SAMPLES, block=16, window=32, seed=0), epochs=1, global_batch=32, micro_batch=16
    )
    batch = next(iter(loader))
    codec, codes = loader.codecs[0].features, batch.stored[0].codes
    assert codes.shape == (16, codec.bytes_per_view)
    decoded = codec.decode(codes)
    records = cache.read(batch.ids.numpy(), batch.view)
    again = codec.decode(torch.from_numpy(codec.unpack([record.features for record in records])))
    assert torch.equal(decoded.features, again.features)
    assert bool(decoded.features.isfinite().all())


def test_a_fit_is_made_once(tmp_path):
    root = tmp_path / "cache"
    make(root, shared_weights(), cache={"codec": "transform", "num_views": 1})
    before, state = unit_files(root), (root / "codec.safetensors").read_bytes()
    stamp = (root / "codec.safetensors").stat().st_mtime_ns
    make(root, shared_weights(), cache={"codec": "transform", "num_views": 2, "views_per_group": 1})
    assert (root / "codec.safetensors").stat().st_mtime_ns == stamp
    assert before.items() <= unit_files(root).items()
    with pytest.raises(UserError, match="fitted with different options"):
        cache_teacher(options(root, shared_weights(), cache={"codec": "transform-economy"}), CPU)
    with pytest.raises(UserError, match="fitted with different options"):
        cache_teacher(options(root, shared_weights(), cache={"codec": "transform", "codec_noise": 0.01}), CPU)
    with pytest.raises(UserError, match="invalid codec noise"):
        cache_teacher(options(root, shared_weights(), cache={"codec": "int8", "codec_noise": 0.01}), CPU)
    again = tmp_path / "again"
    make(again, shared_weights(), cache={"codec": "transform", "num_views": 1})
    assert (again / "codec.safetensors").read_bytes() == state  # the same machine, the same fit
    assert unit_files(again) == before


def test_a_damaged_state_is_refused(tmp_path):
    root = tmp_path / "cache"
    cache = make(root, shared_weights(), cache={"codec": "transform", "num_views": 1})
    state = root / "codec.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    order = Order(num_samples=SAMPLES, block=16, window=32, seed=0)
    with pytest.raises(UserError, match="does not match the cache"):
        CacheLoader(cache, order, epochs=1, global_batch=32, micro_batch=16)
    (root / "codec.json").write_text(json.dumps({"preset": 1}))
    with pytest.raises(UserError, match="damaged"):
        cache_teacher(options(root, shared_weights(), cache={"codec": "transform"}), CPU)
