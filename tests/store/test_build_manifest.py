"""Building and reading a manifest, for both backends."""

import json
import shutil
from pathlib import Path

import pytest
from store_cases import (
    GROUPS,
    NUM_SAMPLES,
    RANGES,
    facts,
    make_record,
    open_unit,
)

from scalekd_cache.errors import UserError
from scalekd_cache.store.manifest import build_manifest, read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.sealed_json import SEAL, sealed
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.store.verify import verify_cache


def test_manifest(whole):
    manifest = read_manifest(whole)
    assert (manifest.num_samples, manifest.num_views, len(manifest.units)) == (NUM_SAMPLES, 3, 4)
    sizes = manifest.bytes_per_view
    parts = sizes["pixels"] + sizes["features"] + sizes["target"] + sizes["index"]
    assert sizes["total"] == pytest.approx(parts, abs=0.3)
    on_disk = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file() and path.name != "manifest.json")
    assert sizes["total"] * 3 * NUM_SAMPLES == pytest.approx(on_disk, abs=10)
    assert manifest.fidelity["cosine"] == {"mean": 1.0, "p1": 0.25, "count": 40}


def test_an_incomplete_cache_gets_no_manifest(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished cache"):
        Cache.open(copy)
    backend = read_unit(unit_folder(copy, 0, 0))[0].backend
    with pytest.raises(UserError, match="a different cache"):
        build_manifest(copy, facts(backend, fingerprint="0" * 64), RANGES)
    shutil.rmtree(unit_folder(copy, 1, 1))
    with pytest.raises(UserError, match="g001-r00001"):
        build_manifest(copy, facts(backend), RANGES)


def test_groups_must_hold_the_same_images(tmp_path):
    for group in (0, 1):
        with open_unit(tmp_path, "webdataset", group, start=0, stop=2) as writer:
            for position in (0, group + 1):
                for view in GROUPS[group]:
                    writer.append(view, make_record(position, view))
            writer.commit({})
    with pytest.raises(UserError, match="same images"):
        build_manifest(tmp_path, facts("webdataset"), [[0, 2]])


def change_manifest(root: Path, change) -> None:
    """Change the manifest and update its checksum."""
    path = root / "manifest.json"
    fields = json.loads(path.read_text())
    del fields[SEAL]
    change(fields)
    path.write_bytes(sealed(fields))


MANIFEST_CHANGES = {
    "num_samples": lambda f: f.update(num_samples=2**60),
    "unit count": lambda f: f["units"][0].__setitem__(2, 2**60),
    "all counts": lambda f: (f.update(num_samples=2**60), [row.__setitem__(2, 2**59) for row in f["units"]]),
    "small lie": lambda f: f.update(num_samples=39),
    "views": lambda f: f.update(num_views=2**60),
    "bool": lambda f: f.update(num_samples=True),
    "float": lambda f: f.update(num_samples=40.0),
    "negative": lambda f: f["units"][0].__setitem__(0, -1),
    "missing unit": lambda f: f["units"].pop(),
    "other sha": lambda f: f["units"][0].__setitem__(3, "0" * 64),
    "missing field": lambda f: f.pop("codec"),
    "unknown field": lambda f: f.update(extra=1),
    "version": lambda f: f.update(format_version=1),
    "backend": lambda f: f.update(backend="../../x"),
    "groups": lambda f: f.update(groups=[[0, 1], "2"]),
    "nested": lambda f: f.update(units={}),
}


@pytest.mark.parametrize("change", MANIFEST_CHANGES)
def test_a_manifest_that_lies_is_refused(copy, change):
    change_manifest(copy, MANIFEST_CHANGES[change])
    with pytest.raises(UserError):
        Cache.open(copy)
    assert [problem.where for problem in verify_cache(copy)] == ["manifest.json", "plan.json"]


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"format_version": NaN}', "[" * 100_000])
def test_a_manifest_that_is_not_json_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        Cache.open(copy)
