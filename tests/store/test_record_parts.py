"""Parts of a record are optional in both stores; unknown parts are rejected with an error that names them."""

from pathlib import Path

import format_reader
import pytest
from store_cases import backends, facts, make_record, open_unit, write_cache

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import NO_LABEL, Record, target_json
from scalekd_cache.store.manifest import build_manifest, write_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sidecar import unit_folder
from scalekd_cache.store.verify import verify_cache

PARTIAL = {
    "no label": {"label": NO_LABEL},
    "no features": {"features": b""},
    "no logits": {"logits": b""},
    "a second target": {"second": b"pooled"},
    "only a second target": {"label": NO_LABEL, "features": b"", "logits": b"", "second": b"pooled"},
    "nothing but the view": {"label": NO_LABEL, "features": b"", "logits": b""},
}


def write_partial(root: Path, backend: str) -> list[Record]:
    """A cache of one unit in which each record has different parts; the first one has all but the second target."""
    records = [make_record(position, 0) for position in range(len(PARTIAL) + 1)]
    records[1:] = [record._replace(**change) for record, change in zip(records[1:], PARTIAL.values(), strict=True)]
    count = len(records)
    with open_unit(root, backend, start=0, stop=count, views=[0]) as writer:
        for record in records:
            writer.append(0, record)
        writer.commit({})
    write_manifest(root, build_manifest(root, facts(backend, groups=[[0]]), [[0, count]]))
    return records


@backends
def test_parts_of_a_record_may_be_absent(tmp_path, backend):
    records = write_partial(tmp_path, backend)
    found = Cache.open(tmp_path).read(range(len(records)), 0)
    assert found == records
    assert [int(record.parts) for record in found] == [7, 6, 5, 3, 15, 8, 0]
    assert verify_cache(tmp_path, deep=True) == []
    read = format_reader.read_tar if backend == "webdataset" else format_reader.read_zarr
    unit = unit_folder(tmp_path, 0, 0)
    others = list(read(unit / "v0000", (0, 0, 0), [record.key for record in records]))
    assert [(label, features, second, logits) for _, label, _, _, _, features, second, logits in others] == [
        (None if r.label == NO_LABEL else r.label, r.features, r.second, r.logits) for r in records
    ]


@backends
def test_flags_that_are_not_known_are_refused_by_name(tmp_path, backend, monkeypatch):
    """A later version may store more parts; this version must not accept such a record as complete."""
    later = lambda record, places: target_json(record, places=places).replace(b'"flags":7', b'"flags":23')  # noqa: E731
    monkeypatch.setattr(f"scalekd_cache.store.formats.{backend}.target_json", later)
    with pytest.raises(UserError, match="parts that this version does not support\n  got: flags 23"):
        write_cache(tmp_path, backend)


@backends
@pytest.mark.parametrize("flags", [0, 3, 5, 6, 15])
def test_flags_that_are_not_what_a_record_holds(tmp_path, backend, flags, monkeypatch):
    wrong = lambda record, places: target_json(record, places=places).replace(  # noqa: E731
        b'"flags":7', f'"flags":{flags}'.encode()
    )
    monkeypatch.setattr(f"scalekd_cache.store.formats.{backend}.target_json", wrong)
    with pytest.raises(UserError, match="damaged cache"):
        write_cache(tmp_path, backend)
