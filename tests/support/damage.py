"""Units rewritten with other records and valid checksums."""

import shutil

from scalekd_cache.store.manifest import build_manifest, read_manifest, write_manifest
from scalekd_cache.store.plan import read_plan
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter


def rewrite_unit(root, change, range_id=0):
    """Rewrite a unit and the manifest with changed records, so that every checksum is valid."""
    manifest, folder = read_manifest(root), unit_folder(root, 0, range_id)
    info, _ = read_unit(folder)
    cache = Cache.open(root)
    start = sum(row.count for row in manifest.units if row.range_id < range_id)
    records = {view: cache.read(range(start, start + info.count), view) for view in info.views}
    shutil.rmtree(folder)
    with UnitWriter(
        root,
        backend=info.backend,
        group=0,
        range_id=range_id,
        start=info.start,
        stop=info.stop,
        views=info.views,
        fingerprint=info.fingerprint,
    ) as writer:
        for view, rows in records.items():
            for record in rows:
                owned = {name: bytes(getattr(record, name)) for name in ("pixels", "features", "logits", "second")}
                writer.append(view, change(record._replace(**owned)))
        assert writer.commit(info.fidelity)
    plan = read_plan(root)
    write_manifest(root, build_manifest(root, plan.facts, plan.ranges))
