"""The cache on disk: units of shards in one of two file formats, a manifest over them, readers and checks.

In: records. Out: the same records, or an error. Invariant: importing this package imports neither torch nor zarr.
"""

from scalekd_cache.store.background import CommitQueue
from scalekd_cache.store.base import BACKENDS, Record
from scalekd_cache.store.durable_files import Leftover, remove_stale
from scalekd_cache.store.manifest import (
    Manifest,
    ManifestFacts,
    UnitRow,
    build_manifest,
    read_manifest,
    write_manifest,
)
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.resume import Ledger, unit_committed
from scalekd_cache.store.sidecar import UnitInfo, read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.store.verify import verify_cache
from scalekd_cache.store.verify_unit import Problem

__all__ = [
    "BACKENDS",
    "Cache",
    "CommitQueue",
    "Ledger",
    "Leftover",
    "Manifest",
    "ManifestFacts",
    "Problem",
    "Record",
    "UnitInfo",
    "UnitRow",
    "UnitWriter",
    "build_manifest",
    "read_manifest",
    "read_unit",
    "remove_stale",
    "unit_committed",
    "unit_folder",
    "verify_cache",
    "write_manifest",
]
