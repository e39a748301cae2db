"""The byte-offset index of a tar shard: `v0000.idx`.

In: offsets and lengths of each record's members. Out: a 48-byte header followed by 40 bytes per record, little-endian.
Invariant: a loaded index matches the length of its tar, the number of keys and its own name; members lie inside the tar
in record order and do not overlap.
"""

import struct

import numpy as np
from numpy.typing import NDArray

from scalekd_cache.store.base import MAX_RECORD_BYTES, MAX_UNIT_SAMPLES, ShardId, damaged, repair_fix
from scalekd_cache.store.checked_files import read_file
from scalekd_cache.store.path import StoredPath

MAGIC = b"SKDCIDX2"
HEADER = struct.Struct("<8sIIIIIIQQ")
"""Magic, header size, index row size, group, range, view, zero, number of rows, tar size (sizes in bytes)."""
ROW = np.dtype(
    [
        ("json_offset", "<u8"),
        ("pixels_offset", "<u8"),
        ("features_offset", "<u8"),
        ("json_bytes", "<u4"),
        ("pixels_bytes", "<u4"),
        ("features_bytes", "<u4"),
        ("crc32c", "<u4"),
    ]
)
PLACES = struct.Struct("<QQQIII")
"""A row without its checksum."""
MEMBERS = ("json", "pixels", "features")


def pack_index(rows: NDArray[np.void], shard: ShardId, tar_bytes: int) -> bytes:
    """The bytes of the index file; `rows` has dtype ROW."""
    assert rows.dtype == ROW, rows.dtype
    head = HEADER.pack(MAGIC, HEADER.size, ROW.itemsize, *shard, 0, len(rows), tar_bytes)
    return head + rows.tobytes()


def load_index(path: StoredPath, shard: ShardId, count: int, tar_bytes: int) -> NDArray[np.void]:
    """Read the index of this shard, which has `count` records in a tar that is `tar_bytes` long.

    Raises:
        UserError: it is missing, belongs to a different shard, has the wrong length, or points outside the tar.
    """
    assert 0 <= count <= MAX_UNIT_SAMPLES, count
    expected_bytes = HEADER.size + count * ROW.itemsize
    data = read_file(path, "a shard's index", expected_bytes, fix=repair_fix(path))
    if len(data) != expected_bytes:
        raise damaged("a shard's index has the wrong length", len(data), f"{expected_bytes} bytes", path)
    header = HEADER.unpack_from(data)
    expected = (MAGIC, HEADER.size, ROW.itemsize, *shard, 0, count, tar_bytes)
    if header != expected:
        raise damaged("the index belongs to a different shard", header, expected, path)
    rows = np.frombuffer(data, ROW, count, HEADER.size)
    for member in MEMBERS:
        offset, size = rows[f"{member}_offset"], rows[f"{member}_bytes"].astype(np.uint64)
        outside = (offset > tar_bytes) | (size > tar_bytes - np.minimum(offset, tar_bytes))
        if outside.any():
            raise damaged(
                f"the index points outside the tar ({member})", int(outside.argmax()), "offsets inside the tar", path
            )
    _check_order(rows, path)
    return rows


def _check_order(rows: NDArray[np.void], path: StoredPath) -> None:
    """Check that members are in order, so that one read covers a record or a run of adjacent records."""
    json_end, pixels_end = (rows[f"{member}_offset"] + rows[f"{member}_bytes"] for member in ("json", "pixels"))
    pixels_end = np.where(rows["pixels_bytes"] > 0, pixels_end, json_end)
    features_end = rows["features_offset"] + rows["features_bytes"]
    wrong = (rows["pixels_bytes"] > 0) & (rows["pixels_offset"] < json_end)
    wrong |= rows["features_offset"] < pixels_end
    wrong[1:] |= rows["json_offset"][1:] < features_end[:-1]
    if wrong.any():
        raise damaged("index entries are not in order", f"row {int(wrong.argmax())}", "ascending offsets", path)
    stretches = features_end - rows["json_offset"]
    if len(rows) and stretches.max() > MAX_RECORD_BYTES:
        got = f"row {int(stretches.argmax())}: {int(stretches.max()):,} bytes"
        raise damaged("a record in the index is too large", got, f"at most {MAX_RECORD_BYTES:,} bytes", path)
