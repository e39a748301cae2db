"""publication.json: what a place with a published cache holds besides the files that the manifest covers.

In: facts of the publication, or the file. Out: its bytes, or a checked `Publication`.
Invariant: file names stay inside the place; the checksum inside the file covers all of it. docs/FORMAT.md describes
every field.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import damaged
from scalekd_cache.store.checked_files import Sha256, checked_value, parse_json, read_file
from scalekd_cache.store.durable_files import FileHash
from scalekd_cache.store.manifest import PUBLICATION
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.sealed_json import sealed, unsealed
from scalekd_cache.store.sidecar import Whole, is_inside, unit_folder

ORIGINAL, TARGETS = "original", "targets"
"""Folders of a place without pixels: the cache's files except shards, and the shards without pixels."""
VERSION = 1
PUBLICATION_BYTES = 1 << 26
WHAT = "the description of a published cache"


class Licenses(TypedDict):
    """Names of the licenses, as given by the publisher."""

    data: Annotated[str, Field(min_length=1, max_length=200)]
    teacher: Annotated[str, Field(min_length=1, max_length=200)]


class TargetsRow(NamedTuple):
    """A unit of shards without pixels."""

    group: Whole
    range_id: Whole
    sha256: Sha256
    """Of its unit.json."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The fields of publication.json."""

    publication_version: int
    fingerprint: Sha256
    pixels: Literal["stored", "shared", "replayed", "left out"]
    """As in the cache; left out: shards are in `targets`, without pixels."""
    pixels_from: str
    """Where the cache with the shared pixels is published; empty unless pixels are shared."""
    licenses: Licenses
    files: dict[str, FileHash]
    """The files of the cache that are not in units/, and README.md unless somebody has edited it, by their path in the
    place."""
    targets: Annotated[list[TargetsRow], Field(fail_fast=True)]
    """Sorted by group and range; empty unless pixels are left out."""

    @property
    def cache_folder(self) -> str:
        """The folder of the place with the files of the cache; empty: the place itself."""
        return ORIGINAL if self.pixels == "left out" else ""


def publication_text(publication: Publication) -> bytes:
    """The bytes of publication.json."""
    fields = {field.name: getattr(publication, field.name) for field in dataclasses.fields(publication)}
    fields["files"] = {name: fact._asdict() for name, fact in sorted(publication.files.items())}
    return sealed(fields)


def read_publication(place: StoredPath) -> Publication:
    """publication.json of a place, checked.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    path = place / PUBLICATION
    return parse_publication(read_file(path, WHAT, PUBLICATION_BYTES), path)


def parse_publication(data: bytes, path: StoredPath | str) -> Publication:
    """The publication in these bytes, which were read from `path`; UserError when damaged, or of another version."""
    fields = parse_json(data, WHAT, path)
    if fields.get("publication_version") != VERSION:
        raise UserError(
            "the publication has a version that this version of scalekd-cache does not read",
            got=repr(fields.get("publication_version"))[:100],
            expected=VERSION,
            where=path,
            fix="use a newer version of scalekd-cache",
        )
    publication = checked_value(unsealed(fields, data, path), Publication, WHAT, path)
    places = [row[:2] for row in publication.targets]
    right = {
        "files": all(map(is_inside, publication.files)),
        "targets": places == sorted(set(places)) and bool(places) == (publication.pixels == "left out"),
        "pixels_from": bool(publication.pixels_from) == (publication.pixels == "shared"),
    }
    wrong = [name for name, fine in right.items() if not fine]
    if wrong:
        raise damaged(f"invalid values in {WHAT}", ", ".join(wrong), "consistent values", path)
    return publication


def targets_folder(group: int, range_id: int) -> str:
    """The folder of a unit's shards without pixels, relative to the place."""
    return unit_folder(Path(TARGETS), group, range_id).as_posix()
