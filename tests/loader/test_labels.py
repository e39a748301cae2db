"""A label outside the classes never reaches a loss: the error names key and shard."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_cache import copy_of_cache, reseal, shared_cache

from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import NO_LABEL, Record
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import UnitRow, units_digest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.training.custom_loop import CachedTargets


def with_label(root: Path, label: int) -> Cache:
    """A cache with valid checksums in which record 3 of view 0 has this label."""
    copy_of_cache(root)
    cache, folder = Cache.open(root), root / "units/g000-r00000"
    unit = json.loads((folder / "unit.json").read_text())
    records: dict[int, list[Record]] = {view: cache.read(np.arange(unit["count"]), view) for view in unit["views"]}
    records[0][3] = records[0][3]._replace(label=label)
    shutil.rmtree(folder)
    place = {name: unit[name] for name in ("backend", "group", "range_id", "start", "stop", "views", "fingerprint")}
    with UnitWriter(root, **place) as writer:
        for view, rows in records.items():
            for record in rows:
                writer.append(view, record)
        writer.commit(unit["fidelity"])
    digest = hash_file(folder / "unit.json").sha256

    def change(fields: dict) -> None:
        fields["units"][0][3] = digest
        fields["units_digest"] = units_digest([UnitRow(*row) for row in fields["units"]])

    reseal(root / "manifest.json", change)
    return Cache.open(root)


@pytest.mark.parametrize("label", [-100, -2, 10, 2**40])
def test_labels_outside_the_classes(tmp_path: Path, label: int) -> None:
    cache = with_label(tmp_path / "cache", label)
    key = shared_cache().read([3], 0)[0].key
    for use in (lambda: cache.read(np.arange(8), 0), lambda: list(CachedTargets(cache.root, batch_size=16))):
        with pytest.raises(UserError, match=f"a record's label is outside the class range\n  got: {label}\n") as caught:
            use()
        assert key in str(caught.value)
        assert "units/g000-r00000/v0000" in str(caught.value)
    problems = verify_deep(cache.root, records=0).findings.problems
    assert [(problem.where, problem.key) for problem in problems] == [("units/g000-r00000/v0000", key)]


def test_a_record_without_a_label_can_be_read_and_not_trained_from(tmp_path: Path) -> None:
    cache = with_label(tmp_path / "cache", NO_LABEL)
    assert cache.read([3], 0)[0].label == NO_LABEL
    assert [problem.what for problem in verify_deep(cache.root, records=0).findings.problems] == [
        "label -1 is out of range for 10 classes"
    ]
    with pytest.raises(UserError, match="has no label"):
        list(CachedTargets(cache.root, batch_size=16))
