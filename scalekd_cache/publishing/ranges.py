"""Fetches everything in a shard except the pixels, for `pull --without-pixels` from a publication that has pixels.

In: a unit's folder (local or remote) and its sidecar. Out: the shard's files in a local folder, without their
pixels: zarr shards without the `pixels` chunks, or tars with holes instead of pixels. Invariant: the index and arrays
are verified by SHA-256. Data read from a tar is verified once its unit is complete again (`remake_pixels.py`).
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from scalekd_cache.publishing.transfers import PART, Transfer, fetch_file
from scalekd_cache.store.base import ShardId
from scalekd_cache.store.checked_files import open_file, read_at
from scalekd_cache.store.durable_files import fsync_path
from scalekd_cache.store.formats.tar_index import load_index
from scalekd_cache.store.remote.remote_path import Pin, RemotePath
from scalekd_cache.store.remote.url_transfer import read_ranges
from scalekd_cache.store.sidecar import UnitInfo

PIXELS = ".zarr/pixels/c/"
BATCH = 64
"""Number of ranges per request."""
Span = tuple[int, int]


def other_files(source: Path | RemotePath, target: Path, info: UnitInfo) -> Iterator[Transfer]:
    """The files in a unit's zarr shards that have not been transferred yet, except the pixel files."""
    for name, fact in info.files.items():
        place = target / name
        there = place.is_file() and place.stat().st_size == fact.bytes
        if PIXELS not in name and name.partition("/")[0].endswith(".zarr") and not there:
            yield Transfer(source / name, place, Pin(fact.sha256, fact.bytes), fact.bytes)


def tar_tasks(source: Path | RemotePath, target: Path, info: UnitInfo) -> Iterator[Callable[[Callable[[], None]], int]]:
    """Tasks that fetch a unit's tars, without their pixels, if they have not been transferred yet."""
    for view in info.views:
        name = f"v{view:04d}.tar"
        if name in info.files and not (target / name).is_file():
            yield partial(_fetch_tar, source, target, info, view)


def _fetch_tar(
    source: Path | RemotePath, target: Path, info: UnitInfo, view: int, check_stop: Callable[[], None]
) -> int:
    stem = f"v{view:04d}"
    index, size = info.files[f"{stem}.idx"], info.files[f"{stem}.tar"].bytes
    pin = Pin(index.sha256, index.bytes)
    received = fetch_file(Transfer(source / f"{stem}.idx", target / f"{stem}.idx", pin, index.bytes), check_stop)
    rows = load_index(target / f"{stem}.idx", ShardId(info.group, info.range_id, view), info.count, size)
    spans, part = _spans(rows), target / f"{stem}.tar{PART}"
    with part.open("wb") as file:
        file.truncate(size)
        for at in range(0, len(spans), BATCH):
            check_stop()
            batch = (
                spans[at : at + BATCH] if at else spans[:1]
            )  # start with one range, because not all servers support range requests
            batches = [batch] if at else [batch, spans[1:BATCH]]
            for some in filter(None, batches):
                for (start, _), data in zip(some, _read(source / f"{stem}.tar", some), strict=True):
                    os.pwrite(file.fileno(), data, start)
                    received += len(data)
    fsync_path(part)
    part.replace(target / f"{stem}.tar")
    return received


def _spans(rows: Any) -> list[Span]:
    """Start and end of each stretch of a tar that does not hold pixels."""
    spans: list[Span] = []
    start = end = 0
    for at, (json_at, _, features_at, json_bytes, pixels_bytes, features_bytes, _) in enumerate(rows.tolist()):
        start = json_at if at == 0 else start
        if pixels_bytes:
            spans.append((start, json_at + json_bytes))
            start = features_at
        end = features_at + features_bytes
    return [*spans, (start, end)] if end > start else spans


def _read(path: Path | RemotePath, spans: list[Span]) -> list[bytes]:
    if isinstance(path, RemotePath):
        return read_ranges(path.url, spans, path.place.config)
    with open_file(path) as file:
        return [read_at(file.fileno(), end - start, start, path) for start, end in spans]
