"""Our two stores, for the reading benchmark: writes a cache without a teacher and reads it as the loader does.

In: samples. Out: their records, checked (crc32c over a whole record), in the order of training.
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import ROOT
from benchmarks.peers.samples import CLASSES, SIZE, Passes, Sample
from scalekd_cache.config.base import fingerprint, to_plain
from scalekd_cache.config.stage1 import DataConfig, ViewConfig
from scalekd_cache.loader.order import Order, epoch_ids
from scalekd_cache.store.base import Record
from scalekd_cache.store.durable_files import canonical_json
from scalekd_cache.store.manifest import build_manifest, classes_digest, write_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.unit import UnitWriter

BATCH, BLOCK, WINDOW, RANGE = 32, 64, 32, 512
"""Micro-batch; block and window of the order; images of a shard. `distill` uses the same block."""


def write_cache(folder: Path, samples: list[Sample], backend: str) -> None:
    """A finished cache of one view, with the public writer."""
    sys.path.append(str(ROOT / "tests" / "support"))
    from cache_facts import FIELDS, cache_facts

    names = [f"class {number}" for number in range(CLASSES)]
    views = to_plain(ViewConfig(size=SIZE))
    data = {"listing": "0" * 64, "samples": len(samples), "class_names": classes_digest(names)}
    fields = {**FIELDS, "views": views, "data": data}
    facts = cache_facts(
        backend=backend, groups=[[0]], class_names=names, samples_per_shard=RANGE, view_recipe=views,
        fingerprint_fields=fields, fingerprint=fingerprint(fields), data={**to_plain(DataConfig()), **data},
    )  # fmt: skip
    ranges = [(start, min(start + RANGE, len(samples))) for start in range(0, len(samples), RANGE)]
    for range_id, (start, stop) in enumerate(ranges):
        with UnitWriter(folder, backend=backend, group=0, range_id=range_id, start=start, stop=stop, views=[0],
                        fingerprint=facts.fingerprint) as unit:  # fmt: skip
            for sample in samples[start:stop]:
                unit.append(0, record_of(sample))
            assert unit.commit({})
    write_manifest(folder, build_manifest(folder, facts, ranges))


def record_of(sample: Sample) -> Record:
    """A record with a view description of the usual length."""
    view = canonical_json({
        "area": [12, 34, 200, 210], "flip": True, "image_size": [500, 375], "number": 0, "size": SIZE,
        "operations": [], "erase": None, "noise": 0,
    })  # fmt: skip
    key = f"n{sample.label:08d}/ILSVRC2012_{sample.number:08d}"
    return Record(key, sample.label, view, "0" * 16, sample.pixels, sample.features, sample.logits)


def read_cache(folder: Path) -> Passes:
    """Passes over a cache in the order of training, one micro-batch per call, as the loader reads."""
    cache = Cache.open(folder)
    order, epochs = Order(num_samples=len(cache), block=BLOCK, window=WINDOW, seed=0), itertools.count()

    def samples() -> Iterator[Sample]:
        epoch = next(epochs)
        for start in range(0, len(cache), BATCH):
            for record in cache.read(epoch_ids(order, epoch, start, min(start + BATCH, len(cache))), 0):
                number = int(record.key.rpartition("_")[2])
                yield Sample(number, record.label, record.pixels, record.features, record.logits)

    return samples
