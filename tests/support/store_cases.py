"""Records, caches and kinds of damage shared by the store tests."""

from pathlib import Path

import numpy as np
import pytest
from cache_facts import FINGERPRINT, cache_facts

from scalekd_cache.store.base import BACKENDS, Record
from scalekd_cache.store.durable_files import canonical_json
from scalekd_cache.store.manifest import ManifestFacts, build_manifest, write_manifest
from scalekd_cache.store.unit import UnitWriter

GROUPS = [[0, 1], [2]]
RANGES = [(0, 21), (21, 40)]
NUM_SAMPLES = 40
FEATURE_BYTES = 700
backends = pytest.mark.parametrize("backend", BACKENDS)


def make_record(position: int, view: int, *, replayed: bool = False) -> Record:
    rng = np.random.default_rng((position, view))
    pixels = b"" if replayed else b"\xff\xd8" + rng.bytes(900 + 37 * (position % 5))
    text = canonical_json({"number": view, "crop": [position, 1, 20, 30], "size": 0.1 + position, "name": "é"})
    logits = bytes([position % 3]) + rng.bytes(9)
    return Record(f"class {view}".replace(f" {view}", "/") + f"image{position:03d}", position % 7, text,
                  rng.bytes(8).hex(), pixels, rng.bytes(FEATURE_BYTES), logits)  # fmt: skip


def order(group: int) -> np.ndarray:
    """The canonical order of a group; different for each group."""
    return np.random.default_rng(group).permutation(NUM_SAMPLES)


def open_unit(root: Path, backend: str, group: int = 0, range_id: int = 0, **changes) -> UnitWriter:
    start, stop = RANGES[range_id]
    arguments = {
        "backend": backend,
        "group": group,
        "range_id": range_id,
        "start": start,
        "stop": stop,
        "views": GROUPS[group],
        "fingerprint": FINGERPRINT,
        "versions": {"zarr": "3"},
    }
    return UnitWriter(root, **{**arguments, **changes})


def fill(writer: UnitWriter, *, replayed: bool = False) -> None:
    for position in order(writer.info.group)[writer.info.start : writer.info.stop].tolist():
        for view in writer.info.views:
            writer.append(view, make_record(position, view, replayed=replayed))


def write_unit(root: Path, backend: str, group: int = 0, range_id: int = 0, *, replayed: bool = False) -> bool:
    with open_unit(root, backend, group, range_id) as writer:
        fill(writer, replayed=replayed)
        return writer.commit({"cosine": {"mean": 0.5 + range_id, "p1": 0.25, "count": 10}})


def facts(backend: str, **changes) -> ManifestFacts:
    return cache_facts(**{"backend": backend, "groups": GROUPS, **changes})


def write_cache(root: Path, backend: str, *, replayed: bool = False) -> Path:
    for group in range(len(GROUPS)):
        for range_id in range(len(RANGES)):
            assert write_unit(root, backend, group, range_id, replayed=replayed)
    write_manifest(root, build_manifest(root, facts(backend), RANGES))
    return root


def expected(view: int) -> list[Record]:
    group = next(number for number, views in enumerate(GROUPS) if view in views)
    return [make_record(position, view) for position in order(group).tolist()]


def tree(root: Path) -> dict[str, bytes]:
    """The files under a folder, by relative path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def payload_file(root: Path, unit: str = "g000-r00001", view: int = 1) -> Path:
    """The file of a shard that holds features."""
    stem = root / "units" / unit / f"v{view:04d}"
    tar = stem.with_suffix(".tar")
    return tar if tar.exists() else stem.with_suffix(".zarr") / "features/c/0"


def flip_byte(path: Path, offset: int) -> None:
    """Flip all bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)
