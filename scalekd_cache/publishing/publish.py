"""Publishes a finished cache to the model hub, a bucket or a folder.

In: a cache's folder and a destination. Out: the published cache, complete or without pixels, with a data card.
Invariant: plan.json is sent first, so that an unfinished publication identifies its cache. Within a unit, unit.json is
sent last; the file that makes the cache readable is sent after all units. Existing files are not sent again. A
destination that holds a different cache is never changed. docs/FORMAT.md describes the layout.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.errors import counted
from scalekd_cache.progress import progress
from scalekd_cache.publishing.data_card import Card, commands, data_card
from scalekd_cache.publishing.destination import Destination, Found, Sending
from scalekd_cache.publishing.places import open_destination
from scalekd_cache.publishing.publication import (
    ORIGINAL,
    VERSION,
    Licenses,
    Publication,
    TargetsRow,
    parse_publication,
    publication_text,
    targets_folder,
)
from scalekd_cache.publishing.state import check_apart, check_place, checked_cache, local_paths, pixels_of
from scalekd_cache.publishing.without_pixels import write_without_pixels
from scalekd_cache.store.cache_folder import PUBLICATION, check_cache_path
from scalekd_cache.store.checked_files import JSON_BYTES, checked, is_there, read_file
from scalekd_cache.store.durable_files import FileHash, hash_file
from scalekd_cache.store.manifest import CARD, Manifest, UnitRow, codec_files
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.sidecar import UnitInfo, read_unit, unit_folder
from scalekd_cache.store.verify import CODEC_FILE

SIDECAR = "unit.json"


@dataclass
class _Job:
    """One publication."""

    root: Path
    manifest: Manifest
    manifest_data: bytes
    """manifest.json as it was when the publication started; another job may be adding views to the cache."""
    place: Destination
    found: Mapping[str, Found]
    """Files that already existed at the destination."""
    temp: Path
    without_pixels: bool
    listed: Mapping[str, FileHash]
    """The files in the destination's publication.json; empty if there is none."""
    targets: dict[tuple[int, int], FileHash] = field(default_factory=dict)
    """Length and SHA-256 of unit.json for each unit without pixels."""
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    """Size in bytes of each published unit."""

    @property
    def start(self) -> str:
        """Subfolder of the destination that holds the cache's files."""
        return f"{ORIGINAL}/" if self.without_pixels else ""

    def is_there(self, row: UnitRow) -> bool:
        """Whether a unit is already published; if so, its size is recorded."""
        folder, unit = unit_folder(self.root, *row[:2]), unit_folder(Path(), *row[:2]).as_posix()
        info, data = read_unit(folder)
        files = {f"{self.start}{unit}/{name}": fact for name, fact in self.kept(info).items()}
        if not self.has(f"{self.start}{unit}/{SIDECAR}", data):
            return False
        if self.without_pixels:
            stripped = f"{targets_folder(*row[:2])}/{SIDECAR}"
            sidecar = self.place.read(stripped) if stripped in self.found else None
            if sidecar is None:
                return False
            inside = checked(sidecar, UnitInfo, "a published unit's sidecar", f"{self.place.shown}/{stripped}").files
            files |= {f"{targets_folder(*row[:2])}/{name}": fact for name, fact in inside.items()}
            self.targets[row[:2]] = FileHash(len(sidecar), hashlib.sha256(sidecar).hexdigest())
            files[stripped] = self.targets[row[:2]]
        for name, fact in files.items():
            there = self.found.get(name)
            if there is None or not there.fits(fact):
                return False
        self.sizes[row[:2]] = sum(fact.bytes for fact in files.values()) + len(data)
        return True

    def has_file(self, file: Sending) -> bool:
        """Whether the destination has a file with this length and SHA-256, which it or publication.json reports."""
        there = self.found.get(file.name)
        if there is None or not there.fits(file.fact):
            return False
        return there.sha256 is not None or self.listed.get(file.name) == file.fact

    def has(self, name: str, data: bytes) -> bool:
        """Whether the destination has a file with these bytes."""
        there = self.found.get(name)
        same = False if there is None else there.same_as(data)
        return self.place.read(name) == data if same is None else same

    def kept(self, info: UnitInfo) -> dict[str, FileHash]:
        """The files in a unit that are published unchanged, except its sidecar."""
        shards = tuple(f"v{view:04d}." for view in info.views) if self.without_pixels else ()
        return {name: fact for name, fact in info.files.items() if not (shards and name.startswith(shards))}

    @contextlib.contextmanager
    def parcel(self, row: UnitRow) -> Iterator[list[Sending]]:
        """A unit's files; the sidecar comes last."""
        folder, unit = unit_folder(self.root, *row[:2]), unit_folder(Path(), *row[:2]).as_posix()
        info, _ = read_unit(folder)
        files: list[Sending] = []
        with contextlib.ExitStack() as made:
            if self.without_pixels:
                temp = Path(made.enter_context(tempfile.TemporaryDirectory(dir=self.temp, ignore_cleanup_errors=True)))
                stripped = write_without_pixels(self.root, self.manifest, row, temp)
                there, target = unit_folder(temp, *row[:2]), targets_folder(*row[:2])
                files += [Sending(f"{target}/{name}", there / name, fact) for name, fact in stripped.files.items()]
                self.targets[row[:2]] = hash_file(there / SIDECAR)
                files.append(Sending(f"{target}/{SIDECAR}", there / SIDECAR, self.targets[row[:2]]))
            files += [
                Sending(f"{self.start}{unit}/{name}", folder / name, fact) for name, fact in self.kept(info).items()
            ]
            sidecar = FileHash((folder / SIDECAR).stat().st_size, row.sha256)
            files.append(Sending(f"{self.start}{unit}/{SIDECAR}", folder / SIDECAR, sidecar))
            self.sizes[row[:2]] = sum(file.fact.bytes for file in files)
            yield files

    def written(self, name: str, data: bytes) -> Sending:
        """A small file with these bytes; a file in the cache might change before it is sent."""
        path = self.temp / name.replace("/", "-")
        path.write_bytes(data)
        return Sending(name, path, FileHash(len(data), hashlib.sha256(data).hexdigest()))

    def root_files(self) -> list[Sending]:
        """The cache's files outside units, except the manifest; plan.json comes first."""
        known = {**self.manifest.facts.teacher_files, **codec_files(self.manifest.facts.fingerprint_fields)}
        plan, *choice = [
            self.written(f"{self.start}{name}", read_file(self.root / name, name, JSON_BYTES))
            for name in (PLAN, *([CODEC_FILE] if is_there(self.root / CODEC_FILE) else []))
        ]
        facts = {name: hash_file(self.root / name)._replace(sha256=digest) for name, digest in known.items()}
        return [plan, *(Sending(f"{self.start}{name}", self.root / name, facts[name]) for name in known), *choice]


def publish(config: PublishConfig) -> dict[str, Any]:
    """Publish a cache.

    Args:
        config: the options.

    Returns:
        A dict with the destination (`to`), `fingerprint`, `pixels`, `pixels_from`, the numbers of units in total
        (`units`) and sent by this call (`units_sent`), the same for bytes (`bytes`, `bytes_sent`), the local paths in
        manifest.json (`local_paths`), and commands for using the publication (`next`).

    Raises:
        UserError: the cache is unfinished or damaged, the destination holds something else, or permissions or network
            access are missing.
    """
    check_cache_path(config.cache)
    root = Path(config.cache)
    place = open_destination(config.to, private=config.private, connections=config.connections)
    check_apart(root, config.to)
    manifest, data = checked_cache(root)
    pixels, pixels_from = pixels_of(config, manifest)
    with place.locked():
        found = place.listing()
        check_place(place, found, manifest, without_pixels=config.without_pixels)
        # After an error, other threads may still be writing to this folder.
        with tempfile.TemporaryDirectory(prefix="scalekd-publish-", ignore_cleanup_errors=True) as temp:
            old = place.read(PUBLICATION) if PUBLICATION in found else None
            listed = {} if old is None else parse_publication(old, f"{place.shown}/{PUBLICATION}").files
            job = _Job(root, manifest, data, place, found, Path(temp), config.without_pixels, listed)
            files = job.root_files()
            plan = [file for file in files[:1] if not job.has(file.name, file.path.read_bytes())]
            place.send(plan)
            sent = _send_units(job, config.connections)
            others = [file for file in files[1:] if not job.has_file(file)]
            place.send(others)
            publication = Publication(
                publication_version=VERSION,
                fingerprint=manifest.facts.fingerprint,
                pixels=pixels,
                pixels_from=pixels_from,
                licenses=Licenses(data=config.data_license.strip(), teacher=config.teacher_license.strip()),
                files={file.name: file.fact for file in files},
                targets=[TargetsRow(*at, fact.sha256) for at, fact in sorted(job.targets.items())],
            )
            last = _last_files(job, publication)
            new = [file for file in last if not job.has(file.name, file.path.read_bytes())]
            place.send(new)
    return {
        "to": place.shown,
        "fingerprint": publication.fingerprint,
        "pixels": pixels,
        "units": len(manifest.units),
        "units_sent": len(sent),
        "bytes": sum(job.sizes.values()) + sum(file.fact.bytes for file in [*files, *last]),
        "bytes_sent": sum(job.sizes[at] for at in sent) + sum(file.fact.bytes for file in [*plan, *others, *new]),
        "pixels_from": pixels_from,
        "local_paths": local_paths(manifest),
        "next": commands(publication, place.shown),
    }


def _send_units(job: "_Job", connections: int) -> list[tuple[int, int]]:
    """Send the missing units; return their (group, range)."""
    rows = job.manifest.units
    with ThreadPoolExecutor(connections) as pool:
        missing = [row for row, there in zip(rows, pool.map(job.is_there, rows), strict=True) if not there]
    if len(missing) < len(rows):
        units = counted(len(rows), "unit")
        print(f"{job.place.shown}: {len(rows) - len(missing)} of {units} already published", flush=True)
    if missing:
        with progress("publish", len(missing), "unit") as bar:

            def done(_: int) -> None:
                bar.update()

            job.place.send_units([partial(job.parcel, row) for row in missing], done)
    return [row[:2] for row in missing]


def _last_files(job: "_Job", publication: Publication) -> list[Sending]:
    """README.md, publication.json and manifest.json, in the order they are sent."""
    manifest = job.written(f"{job.start}{MANIFEST}", job.manifest_data)
    size = sum(job.sizes.values()) + sum(fact.bytes for fact in publication.files.values()) + manifest.fact.bytes
    cards, files = [], dict(publication.files)
    if not _edited_card(job):
        card = data_card(Card(job.manifest, publication, job.place.shown, size))
        cards = [job.written(CARD, card.encode())]
        files[CARD] = cards[0].fact
    if job.without_pixels:
        files[manifest.name] = manifest.fact
    described = job.written(PUBLICATION, publication_text(replace(publication, files=files)))
    return [*cards, manifest, described] if job.without_pixels else [*cards, described, manifest]


def _edited_card(job: "_Job") -> bool:
    """Whether README.md was edited after an earlier publication; if so, it is kept."""
    card = job.place.read(CARD) if job.listed and CARD in job.found else None
    if card is None:
        return False
    written = job.listed.get(CARD)
    if written is not None and written.sha256 == hashlib.sha256(card).hexdigest():
        return False
    print(
        f"{job.place.shown}/{CARD} was edited, so it was not replaced (to regenerate it, delete it and rerun)",
        flush=True,
    )
    return True
