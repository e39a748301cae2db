"""The shards of a unit without their pixels.

In: a unit of a cache that stores pixels. Out: a unit of tars with the same records, their pixels empty.
Invariant: every record was verified by its checksum when it was read; equal units give equal bytes, so that a resumed
publication can go on.
"""

from pathlib import Path

import numpy as np

from scalekd_cache.store.manifest import Manifest, UnitRow
from scalekd_cache.store.reader import open_shard
from scalekd_cache.store.sidecar import UnitInfo, read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

BARE_BACKEND = "webdataset"
"""The store of shards without pixels, whatever that of the cache."""
BATCH_RECORDS = 64


def write_without_pixels(root: Path, manifest: Manifest, row: UnitRow, folder: Path) -> UnitInfo:
    """Write the unit below `folder`, where `unit_folder` names it.

    Args:
        root: the cache.
        manifest: its manifest.
        row: the unit.
        folder: where the unit is written.

    Returns:
        The sidecar of the new unit.

    Raises:
        UserError: a damaged record, or a full disk.
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
