"""Writes a unit's shards without pixels.

In: a unit from a cache that stores pixels. Out: a unit of tars with the same records and empty pixels.
Invariant: every record's checksum is verified when the record is read. Equal units give equal bytes, so that an
interrupted publication can be resumed.
"""

from pathlib import Path

import numpy as np

from scalekd_cache.store.manifest import Manifest, UnitRow
from scalekd_cache.store.reader import open_shard
from scalekd_cache.store.sidecar import UnitInfo, read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

BARE_BACKEND = "webdataset"
"""The file format for shards without pixels, regardless of the cache's format."""
BATCH_RECORDS = 64


def write_without_pixels(root: Path, manifest: Manifest, row: UnitRow, folder: Path) -> UnitInfo:
    """Write the unit under `folder`, at the path given by `unit_folder`.

    Args:
        root: the cache.
        manifest: its manifest.
        row: the unit.
        folder: output folder.

    Returns:
        The new unit's sidecar.

    Raises:
        UserError: a record is damaged, or the disk is full.
    """
    info, _ = read_unit(unit_folder(root, row.group, row.range_id))
    with UnitWriter.of_unit(folder, info, BARE_BACKEND) as writer:
        for view in info.views:
            reader = open_shard(root, manifest, row, view)
            for start in range(0, row.count, BATCH_RECORDS):
                for record in reader.read(np.arange(start, min(start + BATCH_RECORDS, row.count))):
                    writer.append(view, record._replace(pixels=b""))
            reader.close()
        writer.commit(info.fidelity)
    return read_unit(unit_folder(folder, row.group, row.range_id))[0]
