"""publication.json: describes the files in a published cache that are not covered by its manifest.

In: facts about the publication, or the file. Out: the file's contents, or a checked `Publication`.
Invariant: file names cannot point outside the publication. The checksum in the file covers all of its content.
docs/FORMAT.md describes every field.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict

from scalekd_cache.errors import UserError
from scalekd_cache.store.base import damaged
from scalekd_cache.store.cache_folder import PUBLICATION
from scalekd_cache.store.checked_files import Sha256, checked_value, parse_json, read_file
from scalekd_cache.store.durable_files import FileHash
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.sealed_json import sealed, unsealed
from scalekd_cache.store.sidecar import Whole, is_inside, unit_folder

ORIGINAL, TARGETS = "original", "targets"
"""Folders in a publication without pixels: one for the cache's files other than shards, and one for the shards without
pixels."""
VERSION = 1
PUBLICATION_BYTES = 1 << 26
WHAT = "a published cache's description"


class Licenses(TypedDict):
    """License names, as given by the publisher."""

    data: Annotated[str, Field(min_length=1, max_length=200)]
    teacher: Annotated[str, Field(min_length=1, max_length=200)]


class TargetsRow(NamedTuple):
    """A unit of shards without pixels."""

    group: Whole
    range_id: Whole
    sha256: Sha256
    """Length and SHA-256 of the unit's unit.json."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """The fields of publication.json."""

    publication_version: int
    fingerprint: Sha256
    pixels: Literal["stored", "shared", "replayed", "left out"]
    """Same as in the cache, or "left out" if the shards are in `targets`, without pixels."""
    pixels_from: str
    """Where the cache that stores the shared pixels is published; empty unless pixels are shared."""
    licenses: Licenses
    files: dict[str, FileHash]
    """The cache's files outside units/, and README.md unless it was edited, keyed by path relative to the
    publication."""
    targets: Annotated[list[TargetsRow], Field(fail_fast=True)]
    """Units sorted by group and range; empty unless pixels are left out."""

    @property
    def cache_folder(self) -> str:
        """Subfolder with the cache's files; empty if they are at the top level."""
        return ORIGINAL if self.pixels == "left out" else ""


def publication_text(publication: Publication) -> bytes:
    """The contents of publication.json."""
    fields = {field.name: getattr(publication, field.name) for field in dataclasses.fields(publication)}
    fields["files"] = {name: fact._asdict() for name, fact in sorted(publication.files.items())}
    return sealed(fields)


def read_publication(place: StoredPath) -> Publication:
    """Read and check the publication.json of a published cache.

    Raises:
        UserError: it is missing or damaged, or has an unsupported version.
    """
    path = place / PUBLICATION
    return parse_publication(read_file(path, WHAT, PUBLICATION_BYTES), path)


def parse_publication(data: bytes, path: StoredPath | str) -> Publication:
    """Parse bytes read from `path`; raises `UserError` if they are damaged or have an unsupported version."""
    fields = parse_json(data, WHAT, path)
    if fields.get("publication_version") != VERSION:
        raise UserError(
            "this version of scalekd-cache does not support this publication format",
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
    """Folder for a unit's shards without pixels, relative to the publication."""
    return unit_folder(Path(TARGETS), group, range_id).as_posix()
