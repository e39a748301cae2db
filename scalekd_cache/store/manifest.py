"""manifest.json: what a cache is, built last by one process from the sidecars of all its units.

In: facts of the run, and every unit.json. Out: a checked `Manifest`.
Invariant: the number of samples is the sum over the units of every group, all groups hold the same images, and
`units_digest` covers every sidecar, which in turn holds the sha256 of every file: the manifest pins the whole cache,
and its own seal pins the manifest.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.codec.fidelity import merge_summaries
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import BACKENDS, FORMAT_VERSION, MAX_UNIT_SAMPLES, check_backend, damaged
from scalekd_cache.store.checked_files import read_json
from scalekd_cache.store.files import canonical_json, write_atomically
from scalekd_cache.store.image_digests import check_images
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote import pin_files
from scalekd_cache.store.sealed import check_version, sealed, unsealed
from scalekd_cache.store.sidecar import (
    HEX64,
    UnitInfo,
    check_fields,
    read_keys,
    read_unit,
    sizes_differ,
    unit_folder,
)

NAME, TAIL = "manifest.json", "tail.safetensors"
STATE, CLASSIFIER = "codec.safetensors", "classifier.safetensors"


class UnitRow(NamedTuple):
    """A unit, as the manifest lists it."""

    group: int
    range_id: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    """Records in each shard of the unit."""
    sha256: str
    """Of unit.json."""


@dataclass(frozen=True, kw_only=True)
class ManifestFacts:
    """What the run knows; the rest of a manifest comes from the sidecars."""

    fingerprint: str
    fingerprint_fields: dict[str, Any]
    recipe: str
    backend: str
    samples_per_shard: int
    """Most images in a range: what the writer was asked for."""
    groups: list[list[int]]
    """View numbers of each group; together 0, 1, ... num_views - 1."""
    ranges: list[list[list[int]]]
    """[start, stop] of every range of every group: ranges[group][range_id]."""
    class_names: list[str]
    teacher: dict[str, Any]
    tail_sha256: str
    """Of tail.safetensors; empty for a cache without a tail."""
    view_recipe: dict[str, Any]
    codec: dict[str, Any]
    logit_codec: dict[str, Any]
    second_codec: dict[str, Any] = field(default_factory=dict)
    """Codec of a second feature target; empty when no record holds one."""
    data: dict[str, Any]
    pixels_from: dict[str, str] = field(default_factory=dict)
    """Of a cache that shares the baked pixels of another: `identity` and `path` of that one; else empty."""
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole cache. See docs/FORMAT.md for every field."""

    format_version: int
    fingerprint: str
    fingerprint_fields: dict[str, Any]
    recipe: str
    backend: str
    samples_per_shard: int
    num_samples: int
    """Images, the same in every view."""
    num_views: int
    groups: list[list[int]]
    units: list[UnitRow]
    """Sorted by group, then range: the canonical order of each group."""
    units_digest: str
    """sha256 hex over the rows of `units`."""
    class_names: list[str]
    teacher: dict[str, Any]
    tail_sha256: str
    view_recipe: dict[str, Any]
    codec: dict[str, Any]
    logit_codec: dict[str, Any]
    second_codec: dict[str, Any]
    data: dict[str, Any]
    pixels_from: dict[str, str]
    bytes_per_view: dict[str, float]
    """Mean bytes on disk: pixels, features, target, index (all that is left: headers, padding, sidecars), total."""
    fidelity: dict[str, Any]
    versions: dict[str, str]


def units_digest(units: Sequence[UnitRow]) -> str:
    """The sha256 (hex) of the canonical JSON of [[group, range_id, count, sha256], ...]."""
    return hashlib.sha256(canonical_json([list(row) for row in units]).encode()).hexdigest()


def build_manifest(root: Path, facts: ManifestFacts) -> Manifest:
    """Read every sidecar and add up.

    Raises:
        UserError: a unit is missing, short, from another run, or groups do not hold the same images.
    """
    check_backend(facts.backend)
    assert len(facts.groups) == len(facts.ranges), (len(facts.groups), len(facts.ranges))
    rows: list[UnitRow] = []
    infos: list[UnitInfo] = []
    contents: list[tuple[int, int]] = []
    for group, ranges in enumerate(facts.ranges):
        key_sum = 0
        for range_id, (start, stop) in enumerate(ranges):
            folder = unit_folder(root, group, range_id)
            info, data = read_unit(folder)
            _check_belongs(info, facts, (start, stop), folder)
            rows.append(UnitRow(group, range_id, info.count, hashlib.sha256(data).hexdigest()))
            infos.append(info)
            key_sum += sum(_key_number(key) for key in read_keys(folder, info))
        contents.append((sum(row.count for row in rows if row.group == group), key_sum))
    _check_same_images(contents, root)
    check_images(root, [[info for info in infos if info.group == group] for group in range(len(facts.groups))])
    return Manifest(
        format_version=FORMAT_VERSION,
        num_samples=contents[0][0],
        num_views=sum(len(views) for views in facts.groups),
        units=rows,
        units_digest=units_digest(rows),
        bytes_per_view=_bytes_per_view(root, infos),
        fidelity=merge_summaries(info.fidelity for info in infos),
        **{one.name: getattr(facts, one.name) for one in dataclasses.fields(facts) if one.name != "ranges"},
    )


def _check_belongs(info: UnitInfo, facts: ManifestFacts, bounds: tuple[int, int], folder: Path) -> None:
    got = (info.fingerprint, info.backend, info.views, (info.start, info.stop))
    expected = (facts.fingerprint, facts.backend, facts.groups[info.group], bounds)
    if got != expected:
        raise UserError(
            "a unit belongs to another cache (fingerprint, backend, views, range)",
            got=got,
            expected=expected,
            where=folder,
            fix="use the options the cache was made with, or another folder (CACHE=...)",
        )
    wrong = sizes_differ(folder, info.files)
    if wrong:
        raise damaged("a file of a unit is short or gone", wrong[0][1], "its length", folder / wrong[0][0])


def _key_number(key: str) -> int:
    """128 bits of a key; their sum does not depend on the order, and tells two sets of keys apart."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")


def _check_same_images(contents: list[tuple[int, int]], root: Path) -> None:
    for group, content in enumerate(contents):
        if content != contents[0]:
            raise UserError(
                "two groups of views do not hold the same images",
                got=f"group {group}: {content[0]} images",
                expected=f"group 0: {contents[0][0]} images, with the same keys",
                where=root / "units",
                fix="rerun `make cache-teacher`: it names the units that differ and makes them again",
            )
    if not contents or contents[0][0] == 0:
        raise UserError("the cache holds no images", where=root / "units", fix="check the data set: all were skipped")


def _bytes_per_view(root: Path, infos: list[UnitInfo]) -> dict[str, float]:
    views = sum(info.count * len(info.views) for info in infos)
    parts = {name: sum(info.payload_bytes[name] for info in infos) for name in ("pixels", "features", "target")}
    total = sum(fact.bytes for info in infos for fact in info.files.values())
    total += sum((unit_folder(root, info.group, info.range_id) / "unit.json").stat().st_size for info in infos)
    parts |= {"index": total - sum(parts.values()), "total": total}
    return {name: round(number / views, 1) for name, number in parts.items()}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write it in one step: a reader sees the old one or the new one."""
    fields = {one.name: getattr(manifest, one.name) for one in dataclasses.fields(manifest)}
    data = sealed(fields)
    _parse(json.loads(data), data, root / NAME)  # what cannot be read back must not be written
    write_atomically(root / NAME, data)


def read_manifest(root: StoredPath) -> Manifest:
    """The manifest of a cache, strictly checked.

    Raises:
        UserError: no manifest (the cache is not finished), another format version, wrong types, or numbers that do not
            agree with each other.
    """
    path = root / NAME
    if not path.exists():
        raise UserError(
            "no manifest: this is not a finished cache",
            where=path,
            fix="check the path (CACHE=...), run `make cache-teacher` until it ends (it continues), or train while it "
            "grows with `make distill ... FOLLOW=1`",
        )
    fields, data = read_json(path, "the manifest")
    manifest = _parse(fields, data, path)
    sidecars = {unit_folder(Path("."), row.group, row.range_id).as_posix(): row.sha256 for row in manifest.units}
    pin_files(root, {f"{folder}/unit.json": (None, sha256) for folder, sha256 in sidecars.items()})
    pin_files(root, {TAIL: (None, manifest.tail_sha256)})
    pin_files(root, {name: (None, sha256) for name, sha256 in kept_files(manifest.fingerprint_fields).items()})
    return manifest


def _parse(fields: dict[str, Any], data: bytes, path: StoredPath) -> Manifest:
    check_version(fields, path)
    fields = unsealed(fields, data, path)
    check_fields(fields, Manifest, path)
    units = [_unit_row(row, path) for row in fields["units"]]
    manifest = Manifest(**{**fields, "units": units})
    wrong = [name for name, right in _checks(manifest).items() if not right]
    if wrong:
        raise damaged("the manifest contradicts itself", "; ".join(wrong), "numbers that agree", path)
    return manifest


def _unit_row(row: Any, path: StoredPath) -> UnitRow:
    good = isinstance(row, list) and [type(value) for value in row] == [int, int, int, str]
    if not good or not (0 <= row[2] <= MAX_UNIT_SAMPLES and HEX64.fullmatch(row[3])):
        raise damaged("a bad unit in the manifest", row, f"[group, range, count <= {MAX_UNIT_SAMPLES}, sha256]", path)
    return UnitRow(*row)


def _checks(manifest: Manifest) -> dict[str, bool]:
    """Every agreement that needs the manifest alone; num_samples is bounded by the listed units."""
    groups, units = manifest.groups, manifest.units
    views = [view for group in groups if isinstance(group, list) for view in group]
    order = [(row.group, row.range_id) for row in units]
    sums, ranges = dict.fromkeys(range(len(groups)), 0), Counter[int]()
    in_turn = True
    for row in units:
        in_turn = in_turn and row.range_id == ranges[row.group]
        ranges[row.group] += 1
        sums[row.group] = sums.get(row.group, 0) + row.count
    return {
        "backend is unknown": manifest.backend in BACKENDS,
        "groups do not hold views 0 to num_views - 1": 0 < len(groups) <= len(views) == manifest.num_views <= 10_000
        and all(type(view) is int for view in views)
        and sorted(views) == list(range(len(views))),
        "units are not sorted by group and range": order == sorted(set(order)),
        "ranges of a group are not 0, 1, ...": in_turn,
        "units of unknown groups": len(sums) == len(groups),
        f"num_samples {manifest.num_samples} is not the sum over the units of each group": bool(sums)
        and set(sums.values()) == {manifest.num_samples}
        and manifest.num_samples > 0,
        "units_digest does not match the units": manifest.units_digest == units_digest(units),
        "fingerprint is not a sha256": HEX64.fullmatch(manifest.fingerprint) is not None,
        "tail_sha256 is not a sha256": manifest.tail_sha256 == "" or HEX64.fullmatch(manifest.tail_sha256) is not None,
        "class_names are not texts": all(isinstance(name, str) for name in manifest.class_names),
        "pixels_from has other parts": names_pixels(manifest.pixels_from),
        "bytes_per_view has other parts": manifest.bytes_per_view.keys()
        == {"pixels", "features", "target", "index", "total"}
        and all(type(number) in (int, float) for number in manifest.bytes_per_view.values()),
    }


def kept_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """Files beside manifest and tail that records cannot be decoded without, with their sha256."""
    found = {}
    for name, codec, entry in ((STATE, "codec", "state_sha256"), (CLASSIFIER, "logit_codec", "sha256")):
        config = fields.get(codec)
        digest = config.get(entry) if isinstance(config, dict) else None
        if isinstance(digest, str) and HEX64.fullmatch(digest):
            found[name] = digest
    return found


def names_pixels(value: dict[str, Any]) -> bool:
    """Whether this can be the `pixels_from` of a manifest or plan."""
    return set(value) in (set(), {"identity", "path"}) and all(isinstance(part, str) for part in value.values())
