"""manifest.json: the description of a finished cache. One process builds it from the sidecars of all units, after they
are committed.

In: the facts from the plan, and every unit.json. Out: a checked `Manifest`.
Invariant: in each group, the number of samples is the sum over its units; all groups hold the same images; and
`units_digest` covers every sidecar. Each sidecar contains the SHA-256 of each of its files, so the manifest covers the
whole cache; the manifest contains its own checksum.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired

from pydantic import Field, FiniteFloat
from typing_extensions import TypedDict

from scalekd_cache.config.base import fingerprint, flat
from scalekd_cache.config.recipes import KEPT, LOCAL
from scalekd_cache.config.stage1 import DataConfig, TeacherConfig, ViewConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.base import (
    BACKENDS,
    FORMAT_VERSION,
    MAX_UNIT_SAMPLES,
    MAX_VIEWS,
    check_backend,
    check_version,
    damaged,
)
from scalekd_cache.store.cache_folder import PUBLICATION, marker_at, without_pixels
from scalekd_cache.store.checked_files import Sha256, checked_value, is_hex, read_json
from scalekd_cache.store.durable_files import canonical_json, write_atomically
from scalekd_cache.store.fidelity_summary import merge_summaries
from scalekd_cache.store.image_digests import check_images
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import pin_files
from scalekd_cache.store.sealed_json import sealed, unsealed
from scalekd_cache.store.sidecar import Fidelity, UnitInfo, Whole, read_keys, read_unit, unit_folder, wrong_sizes

CARD = "README.md"
"""A file in a published cache that readers ignore, as they do `PUBLICATION` (`publishing/publication.py`)."""
NAME, TAIL, HELD_OUT = "manifest.json", "tail.safetensors", "heldout.safetensors"
Share = Annotated[float, Field(ge=0, le=1)]
STATE, CLASSIFIER = "codec.safetensors", "classifier.safetensors"


class UnitRow(NamedTuple):
    """A unit in the manifest."""

    group: Whole
    range_id: Whole
    count: Annotated[int, Field(ge=0, le=MAX_UNIT_SAMPLES)]  # type: ignore[assignment]  # hides tuple.count, which is not used
    """Number of records in each shard of the unit."""
    sha256: Sha256
    """SHA-256 of unit.json."""


class TeacherFacts(TypedDict):
    """A cache's teacher."""

    spec: dict[str, Any]
    """A `TeacherSpec`, which is checked when it is parsed."""
    config: dict[str, Any]
    """The `TeacherConfig` used to create the cache."""
    top1: FiniteFloat | None
    """Accuracy on the dataset in percent; None if it was not measured."""
    held_out_sha256: NotRequired[Sha256]
    """SHA-256 of heldout.safetensors, which only unlabeled caches have."""


class DataFacts(TypedDict):
    """The fields in `data` that are not in `DataConfig`."""

    listing: Sha256
    samples: Whole
    class_names: Sha256
    class_likeness: NotRequired[tuple[Share, Share]]


@dataclass(frozen=True, kw_only=True)
class ManifestFacts:
    """The facts known before the first unit is written, stored in both plan.json and manifest.json."""

    fingerprint: Sha256
    fingerprint_fields: dict[str, Any]
    """Everything that affects the bytes of a record."""
    recipe: str
    """Name or path of the recipe, for messages."""
    distill: dict[str, dict[str, Any]]
    """Training options from the recipe; `distill` uses them if no recipe is given."""
    backend: str
    samples_per_shard: Annotated[int, Field(gt=0, le=MAX_UNIT_SAMPLES)]
    """Maximum number of images in a range, as set when the cache was created."""
    groups: list[list[Whole]]
    """View numbers in each group; all groups together hold 0, 1, ... num_views - 1."""
    class_names: list[str]
    teacher: TeacherFacts
    tail_sha256: Sha256 | Literal[""]
    """SHA-256 of tail.safetensors; empty for a cache without a tail."""
    view_recipe: dict[str, Any]
    codec: dict[str, Any]
    logit_codec: dict[str, Any]
    second_codec: dict[str, Any]
    """Codec for a second feature target; empty if no record holds one."""
    data: dict[str, Any]
    pixels_from: dict[str, str]
    """For a cache that shares another cache's baked pixels: that cache's `identity` and `path`; otherwise empty."""
    versions: dict[str, str]

    @property
    def num_views(self) -> int:
        """Number of views of each image, across all groups."""
        return sum(len(views) for views in self.groups)

    @property
    def teacher_files(self) -> dict[str, str]:
        """The files that hold parts or outputs of the teacher, with their SHA-256."""
        digests = {TAIL: self.tail_sha256, HELD_OUT: self.teacher.get("held_out_sha256", "")}
        return {name: digest for name, digest in digests.items() if digest}

    @property
    def labeled(self) -> bool:
        """Whether records have labels."""
        return bool(self.class_names)

    @property
    def num_classes(self) -> int:
        """A student's number of classes: that of the dataset or, without labels, of the stored logits (0: none)."""
        return len(self.class_names) or int(self.logit_codec.get("num_classes", 0))

    @property
    def features_every(self) -> int:
        """One in this many records in a shard has features (`base.stores_features`); 1 means all."""
        return int(self.fingerprint_fields.get(FEATURES_EVERY, 1))


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole cache. On disk, the facts are fields of the same JSON object; docs/FORMAT.md describes every field."""

    format_version: int
    facts: ManifestFacts
    num_samples: Whole
    """Number of images, the same in every view."""
    num_views: Whole
    units: Annotated[list[UnitRow], Field(fail_fast=True)]
    """Sorted by group, then range: the canonical order of each group."""
    units_digest: Sha256
    """SHA-256 hex digest of the rows in `units`."""
    bytes_per_view: dict[str, FiniteFloat]
    """Mean bytes on disk for pixels, features, target and index (everything else: headers, padding, sidecars), plus the
    total."""
    fidelity: Fidelity

    @property
    def view_range(self) -> str:
        """The view numbers as text, such as "0 to 3"."""
        return f"0 to {self.num_views - 1}" if self.num_views > 1 else "0"


FIELDS = (
    *("format_version", "fingerprint", "fingerprint_fields", "recipe", "distill", "backend", "samples_per_shard"),
    *(
        "num_samples",
        "num_views",
        "groups",
        "units",
        "units_digest",
        "class_names",
        "teacher",
        "tail_sha256",
        "view_recipe",
        "codec",
    ),
    *("logit_codec", "second_codec", "data", "pixels_from", "bytes_per_view", "fidelity", "versions"),
)
"""The fields of manifest.json, in the order they are written."""
FEATURES_EVERY = "features_every"
"""The field of `fingerprint_fields` that only sparse caches have."""
FACTS = tuple(one.name for one in dataclasses.fields(ManifestFacts))


def plain_facts(facts: ManifestFacts) -> dict[str, Any]:
    """The facts as JSON values, keyed by name."""
    return {name: getattr(facts, name) for name in FACTS}


def joint_fingerprint(caches: Iterable[ManifestFacts]) -> str:
    """A run's fingerprint: that of its only cache, or the SHA-256 hex digest of all its caches' fingerprints in
    order."""
    found = [facts.fingerprint for facts in caches]
    return found[0] if len(found) == 1 else fingerprint({"caches": found})


def units_digest(units: Sequence[UnitRow]) -> str:
    """SHA-256 hex digest of the canonical JSON of [[group, range_id, count, sha256], ...]."""
    return hashlib.sha256(canonical_json([list(row) for row in units]).encode()).hexdigest()


def build_manifest(root: Path, facts: ManifestFacts, ranges: Sequence[Sequence[int]]) -> Manifest:
    """Build the manifest from the sidecars of all units.

    Args:
        root: the cache's folder.
        facts: the facts from the plan.
        ranges: [start, stop] of every range of images; every view group has the same ranges.

    Raises:
        UserError: a unit is missing, is truncated or belongs to a different cache, or groups do not hold the same
            images.
    """
    check_backend(facts.backend)
    rows: list[UnitRow] = []
    infos: list[UnitInfo] = []
    contents: list[tuple[int, int]] = []
    for group in range(len(facts.groups)):
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
        facts=facts,
        num_samples=contents[0][0],
        num_views=facts.num_views,
        units=rows,
        units_digest=units_digest(rows),
        bytes_per_view=_bytes_per_view(root, infos),
        fidelity=merge_summaries(info.fidelity for info in infos),
    )


def _check_belongs(info: UnitInfo, facts: ManifestFacts, bounds: tuple[int, int], folder: Path) -> None:
    got = (info.fingerprint, info.backend, info.views, (info.start, info.stop))
    expected = (facts.fingerprint, facts.backend, facts.groups[info.group], bounds)
    if got != expected:
        raise UserError(
            "a unit belongs to a different cache: its fingerprint, store, views or image range is different",
            got="fingerprint {}, store {}, views {}, images {}".format(*got),
            expected="fingerprint {}, store {}, views {}, images {}".format(*expected),
            where=folder,
            fix="use the options the cache was made with, or a different folder (--cache ...)",
        )
    wrong = wrong_sizes(folder, info.files)
    if wrong:
        raise damaged(
            "a file in a unit is truncated or missing", wrong[0][1], "the complete file", folder / wrong[0][0]
        )


def _key_number(key: str) -> int:
    """A 128-bit hash of a key. The sum over keys does not depend on their order and differs for different sets."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")


def _check_same_images(contents: list[tuple[int, int]], root: Path) -> None:
    for group, content in enumerate(contents):
        if content != contents[0]:
            raise UserError(
                "two view groups do not contain the same images",
                got=f"group {group}: {counted(content[0], 'image')}",
                expected=f"group 0: {counted(contents[0][0], 'image')}, with the same keys",
                where=root / "units",
                fix="rerun `scalekd cache-teacher`, which lists the units that differ and rebuilds them",
            )
    if not contents or contents[0][0] == 0:
        raise UserError(
            "the cache contains no images",
            got="all images were skipped",
            where=root / "units",
            fix="check the dataset's image files",
        )


def _bytes_per_view(root: Path, infos: list[UnitInfo]) -> dict[str, float]:
    views = sum(info.count * len(info.views) for info in infos)
    parts = {name: sum(info.payload_bytes[name] for info in infos) for name in ("pixels", "features", "target")}
    total = sum(fact.bytes for info in infos for fact in info.files.values())
    total += sum((unit_folder(root, info.group, info.range_id) / "unit.json").stat().st_size for info in infos)
    parts |= {"index": total - sum(parts.values()), "total": total}
    return {name: round(number / views, 1) for name, number in parts.items()}


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    parts = {
        **plain_facts(manifest.facts),
        **{one.name: getattr(manifest, one.name) for one in dataclasses.fields(manifest)},
    }
    data = sealed({name: parts[name] for name in FIELDS})
    _parse(json.loads(data), data, root / NAME)  # never write a manifest that cannot be read back
    write_atomically(root / NAME, data)


def read_manifest(root: StoredPath) -> Manifest:
    """A cache's manifest, strictly checked.

    Raises:
        UserError: there is no manifest (the cache is not finished), or it has a different format version, wrong types
            or contradictory fields.
    """
    return read_manifest_bytes(root)[0]


def read_manifest_bytes(root: StoredPath) -> tuple[Manifest, bytes]:
    """A cache's manifest and the bytes of its file; raises the same errors as `read_manifest`."""
    path, marker = root / NAME, marker_at(root)
    if marker == PUBLICATION:
        raise without_pixels(root)
    if marker is None:
        raise UserError(
            "no manifest: this is not a finished cache",
            where=path,
            fix="check the path (--cache ...), rerun `scalekd cache-teacher` to finish the cache, or run "
            "`scalekd distill ... --follow` to train while it is being written",
        )
    fields, data = read_json(path, "the manifest")
    manifest = _parse(fields, data, path)
    sidecars = {unit_folder(Path("."), row.group, row.range_id).as_posix(): row.sha256 for row in manifest.units}
    pin_files(root, {f"{folder}/unit.json": (None, sha256) for folder, sha256 in sidecars.items()})
    pin_files(root, {name: (None, sha256) for name, sha256 in manifest.facts.teacher_files.items()})
    pin_files(root, {name: (None, sha256) for name, sha256 in codec_files(manifest.facts.fingerprint_fields).items()})
    return manifest, data


def _parse(fields: dict[str, Any], data: bytes, path: StoredPath) -> Manifest:
    check_version(fields, path)
    fields = unsealed(fields, data, path)
    facts = {name: fields.pop(name) for name in FACTS if name in fields}
    checked_value(facts, ManifestFacts, "the manifest", path)  # first, because its errors name a field in the file
    manifest = checked_value({**fields, "facts": facts}, Manifest, "the manifest", path)
    wrong = [name for name, right in _checks(manifest).items() if not right] + contradictions(manifest.facts, path)
    if wrong:
        raise damaged("the manifest is inconsistent", "; ".join(wrong), "consistent values", path)
    return manifest


def _checks(manifest: Manifest) -> dict[str, bool]:
    """Consistency checks for the units, keyed by message; num_samples is bounded by the listed units."""
    groups, units = manifest.facts.groups, manifest.units
    views = [view for group in groups for view in group]
    order = [(row.group, row.range_id) for row in units]
    sums, ranges = dict.fromkeys(range(len(groups)), 0), Counter[int]()
    in_turn = True
    for row in units:
        in_turn = in_turn and row.range_id == ranges[row.group]
        ranges[row.group] += 1
        sums[row.group] = sums.get(row.group, 0) + row.count
    return {
        "groups do not hold views 0 to num_views - 1": len(views) == manifest.num_views <= MAX_VIEWS,
        "units are not sorted by group and range": order == sorted(set(order)),
        "ranges in a group are not 0, 1, ...": in_turn,
        "units in unknown groups": len(sums) == len(groups),
        f"num_samples {manifest.num_samples} is not the sum over each group's units": bool(sums)
        and set(sums.values()) == {manifest.num_samples}
        and manifest.num_samples > 0,
        "units_digest does not match the units": manifest.units_digest == units_digest(units),
        "bytes_per_view has unexpected parts": manifest.bytes_per_view.keys()
        == {"pixels", "features", "target", "index", "total"},
    }


def contradictions(facts: ManifestFacts, path: StoredPath) -> list[str]:
    """The facts in a manifest or plan that contradict each other.

    `fingerprint_fields` contains everything that affects the bytes of records, and `fingerprint` is its hash; readers
    use the separate fields, which must have the same values.

    Raises:
        UserError: the view recipe, dataset or teacher is not a valid configuration.
    """
    fields, spec = facts.fingerprint_fields, facts.teacher["spec"]
    checked_value(facts.view_recipe, ViewConfig, "the view recipe", path)
    checked_value(facts.teacher["config"], TeacherConfig, "the teacher's options", path)
    own = {"listing", "samples", "class_names", "class_likeness"}
    checked_value({name: value for name, value in facts.data.items() if name not in own}, DataConfig, "data", path)
    checked_value({name: value for name, value in facts.data.items() if name in own}, DataFacts, "data", path)
    views = [view for group in facts.groups for view in group]
    listed = fields.get("data")
    agreements = {
        "fingerprint is not the hash of fingerprint_fields": facts.fingerprint == fingerprint(fields),
        "codec": facts.codec == fields.get("codec"),
        "logit_codec": facts.logit_codec == fields.get("logit_codec"),
        "second_codec": facts.second_codec == fields.get("second_codec", {}),
        "shape of second_codec and teacher": _fits_pooled(facts.second_codec, spec.get("pooled", 0)),
        "view_recipe": facts.view_recipe == fields.get("views"),
        "teacher": without_arguments(spec) == without_arguments(fields.get("teacher")),
        "precision": fields.get("precision") in ("float32", "bfloat16", "float16"),
        "data": isinstance(listed, dict)
        and {"listing", "samples", "class_names"} <= listed.keys()
        and all(name in facts.data and facts.data[name] == value for name, value in listed.items()),
        "class_names": isinstance(listed, dict) and listed.get("class_names") == classes_digest(facts.class_names),
        "shape of codec and teacher": facts.codec.get("shape") == spec.get("feature_shape"),
        "classes of logit_codec and teacher": facts.logit_codec.get("num_classes") == spec.get("num_classes"),
        "pixels and pixels_from": fields.get("pixels", "own") == ("shared" if facts.pixels_from else "own"),
        "pixels_from": facts.pixels_from.keys() in (set(), {"identity", "path"}),
        "groups": 0 < len(facts.groups) <= len(views) <= MAX_VIEWS and all(facts.groups),
        "views of groups": views == list(range(len(views))),
        "features_every": _divides_groups(fields.get(FEATURES_EVERY), facts),
        "backend": facts.backend in BACKENDS,
        "distill": facts.distill.keys() <= set(KEPT) and not any(name in flat(facts.distill) for name in LOCAL),
    }
    return [name for name, right in agreements.items() if not right]


def _fits_pooled(codec: Mapping[str, Any], width: object) -> bool:
    """Whether the pooled-embedding codec has this width, or is absent if the teacher has no pooled embedding."""
    if not codec:
        return width == 0
    return codec.get("shape") == [width, 1, 1] and codec.get("id") != "transform"  # a fitted codec has a file


def stored_share(every: int) -> str:
    """A phrase that states which views have features; empty if all do."""
    return f"stored for one in {every} views of each image" if every > 1 else ""


def _divides_groups(every: object, facts: ManifestFacts) -> bool:
    """Whether features are stored for the same number of views of each image, and logits are stored."""
    if FEATURES_EVERY not in facts.fingerprint_fields:
        return True
    sparse = type(every) is int and every > 1 and all(len(group) % every == 0 for group in facts.groups)
    return sparse and facts.logit_codec.get("id") != "logits-recomputed"


def without_arguments(spec: object) -> object:
    """A teacher's specification without `model_args`, which are compared with the tail file before use and in `scalekd
    verify`."""
    return {name: value for name, value in spec.items() if name != "model_args"} if isinstance(spec, dict) else spec


def classes_digest(names: Sequence[str]) -> str:
    """SHA-256 hex digest of the class names as canonical JSON, in label order."""
    return hashlib.sha256(canonical_json(list(names)).encode()).hexdigest()


def codec_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """Files other than the manifest and tail that are needed to decode records, with their SHA-256."""
    found = {}
    for name, codec, entry in ((STATE, "codec", "state_sha256"), (CLASSIFIER, "logit_codec", "sha256")):
        config = fields.get(codec)
        digest = config.get(entry) if isinstance(config, dict) else None
        if is_hex(digest, 64):
            found[name] = str(digest)
    return found
