"""Pulls a published cache into a folder.

In: a URL or folder with a finished cache. Out: a local copy of the cache, or of its first views.
Invariant: every file's SHA-256 is checked before the file gets its final name. Files are transferred to a staging
folder, and manifest.json is written last, so a folder with a manifest holds a complete cache. Rerunning a killed pull
resumes it. If the publication has grown, a pull fetches only the new parts. An existing cache stays readable until the
new one is complete.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from scalekd_cache.config.pull import PullConfig
from scalekd_cache.errors import UserError
from scalekd_cache.progress import progress, size_text
from scalekd_cache.publishing.first_views import LISTS, number_of_views, with_first_views, with_payload, with_views
from scalekd_cache.publishing.local_cache import STAGING, finished_cache, install, staging_folder, undo_plan
from scalekd_cache.publishing.publication import ORIGINAL, TARGETS, Publication, read_publication
from scalekd_cache.publishing.ranges import other_files, tar_tasks
from scalekd_cache.publishing.remake_pixels import RemadePixels, open_images, pixel_maker, remake_unit
from scalekd_cache.publishing.transfers import PART, Task, Transfer, fetch_file, run_in_parallel
from scalekd_cache.store.base import damaged
from scalekd_cache.store.cache_folder import PUBLICATION, marker_at
from scalekd_cache.store.checked_files import JSON_BYTES, check_safetensors, is_there, read_file
from scalekd_cache.store.durable_files import (
    disk_errors,
    free_bytes,
    fsync_path,
    has_sha256,
    parent_folders,
    write_atomically,
)
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import (
    Manifest,
    ManifestFacts,
    UnitRow,
    codec_files,
    read_manifest,
    read_manifest_bytes,
)
from scalekd_cache.store.reader import read_listed_unit
from scalekd_cache.store.remote.remote_path import Pin, RemotePath, open_place
from scalekd_cache.store.remote.url_transfer import RemoteDeniedError
from scalekd_cache.store.sidecar import UNIT_BYTES, P, UnitInfo, read_unit, sidecar_text, unit_folder, wrong_sizes
from scalekd_cache.store.verify import CODEC_FILE, read_codec_choice

SOURCE = "source"
"""Subfolder of the staging folder for the manifest and the sidecars as published."""
TEACHER_BYTES = 1 << 36
"""Maximum size of a teacher or codec file (the length is not known in advance)."""


class Wanted(NamedTuple):
    """A unit to pull."""

    row: UnitRow
    published: UnitInfo
    info: UnitInfo
    """The sidecar for the unit with the requested views. If these are not all of its views, `payload_bytes` is known
    only after the shards have been transferred."""

    def folder(self, root: P) -> P:
        """The unit's folder in a cache."""
        return unit_folder(root, self.info.group, self.info.range_id)


class Bare(NamedTuple):
    """Shards without pixels, and the object that regenerates their pixels."""

    targets: Path | RemotePath
    """The folder that contains the shards."""
    sidecars: dict[tuple[int, int], str] | None
    """SHA-256 of each sidecar, keyed by (group, range). None if the published shards have pixels; in that case, only
    their other parts are fetched."""
    pixels: RemadePixels


class PullResult(NamedTuple):
    """The result of a pull."""

    manifest: Manifest
    """Manifest of the cache in the folder."""
    bytes: int
    """Total size of the fetched files in bytes."""
    complete: bool
    """Whether the cache already had all requested views."""


def pull_cache(config: PullConfig) -> PullResult:
    """Pull a published cache. Resumes an interrupted pull; does nothing if the folder already has all requested views.

    Raises:
        UserError: no cache is published there, the publication is unreadable or damaged, the folder holds a different
            cache, or the disk is too small. If the folder already contained a cache, it is unchanged.
    """
    place, root = open_place(config.url, config.remote), Path(config.folder)
    source, left_out = _cache_files(place)
    published, data = read_manifest_bytes(source)
    facts = with_first_views(published.facts, number_of_views(config.views, published, source))
    there = finished_cache(root, published, facts)
    done = PullResult(there, 0, True) if there is not None else None
    if done is None or (root / STAGING).exists():
        with staging_folder(root) as staging:
            there = finished_cache(root, published, facts)  # another pull may just have finished it
            if there is None:
                bare = _without_pixels(config, place, left_out, facts)
                with _unchanged(source, data):
                    done = PullResult(*_pull(config, source, published, data, facts, staging, bare), False)
            else:
                undo_plan(root, there)
                done = PullResult(there, 0, True)
            shutil.rmtree(staging)
    return done


def _cache_files(place: Path | RemotePath) -> tuple[Path | RemotePath, Publication | None]:
    """The location of the cache's files, and the description of a publication without pixels."""
    marker = marker_at(place)
    if marker == MANIFEST:
        return place, None
    if marker == PUBLICATION:
        publication = read_publication(place)
        if publication.targets:
            return place / ORIGINAL, publication
    raise UserError("no published cache found (no manifest.json)", where=place, fix="check the URL or path")


def _without_pixels(
    config: PullConfig, place: Path | RemotePath, left_out: Publication | None, facts: ManifestFacts
) -> Bare | None:
    """How to regenerate pixels that are not transferred; raises `UserError` if the images are not given."""
    stored = facts.view_recipe.get("pixels") == "baked" and not facts.pixels_from
    if not stored or (left_out is None and not config.without_pixels):
        return None
    pixels = pixel_maker(facts, open_images(facts, config.data, place))
    if left_out is None:
        return Bare(place, None, pixels)
    return Bare(place / TARGETS, {row[:2]: row.sha256 for row in left_out.targets}, pixels)


@contextlib.contextmanager
def _unchanged(source: Path | RemotePath, data: bytes) -> Iterator[None]:
    """Replace an error with a clearer one if the publication has changed since the pull started."""
    try:
        yield
    except UserError as error:
        now = data
        with contextlib.suppress(UserError):
            now = read_file(source / MANIFEST, "the manifest", JSON_BYTES)
        if now == data:
            raise
        raise UserError(
            "the published cache has changed since this pull started",
            where=source,
            fix="rerun: unchanged files are kept",
        ) from error


def _pull(
    config: PullConfig,
    source: Path | RemotePath,
    published: Manifest,
    data: bytes,
    facts: ManifestFacts,
    staging: Path,
    bare: Bare | None,
) -> tuple[Manifest, int]:
    """Fetch and install the missing files; return the manifest and the total size of the fetched files in bytes."""
    root = staging.parent
    with disk_errors(root, len(data)):
        _keep_manifest(staging, published, data)
        rows = [row for row in published.units if row.group < len(facts.groups)]
        missing = [row for row in rows if not _in_place(root, row, facts)]
        _fetch_sidecars(source, staging, missing, config.connections)
        if bare is not None and bare.sidecars is not None:
            _fetch_bare_sidecars(bare, staging, missing, config.connections)
    ranges, units = [], list[Wanted]()
    for row in rows:
        kept = _in_place(root, row, facts)
        info = read_listed_unit(root if kept else staging / SOURCE, published, row)
        ranges += [[info.start, info.stop]] if row.group == 0 else []
        unit = Wanted(row, info, with_views(info, facts.groups[row.group]))
        units += [] if kept or _is_cut_in_place(root, unit) else [unit]
    _remove_leftovers(staging, units)
    transfers = [*_teacher_files(source, staging, facts)]
    for unit in units:
        transfers += _missing_files(source, staging, unit) if bare is None else _bare_files(source, bare, staging, unit)
    sizes = [(_old_place(staging, transfer), transfer.pin.bytes or 0) for transfer in transfers]
    needed = sum(size for old, size in sizes if not old.is_file() or old.stat().st_size != size)
    _check_space(root, needed, facts.num_views)
    with disk_errors(root, needed):
        tasks: list[Task] = [partial(_keep_or_fetch, staging, one) for one in transfers]
        for unit in units:
            if bare is not None and bare.sidecars is None and any(_missing_files(source, staging, unit)):
                tasks += tar_tasks(unit.folder(source), unit.folder(staging / TARGETS), unit.info)
        received = _run(tasks, config.connections, "file")
        _fetch_codec_choice(source, staging, facts)
        remade = [unit for unit in units if bare is not None and any(_missing_files(source, staging, unit))]
        places = {unit.row[:2] for unit in remade}
        for unit in units:
            if unit.row[:2] not in places:
                _finish(staging, unit)
        if bare is not None and remade:
            _remake(bare, staging, remade, config.workers)
    whole = (published, data) if facts == published.facts else None
    return install(root, facts, ranges, whole), received


def _remake(bare: Bare, staging: Path, units: Sequence[Wanted], workers: int) -> None:
    """Regenerate the pixels in these units, with a progress bar."""
    with progress("pixels", sum(unit.info.count for unit in units), "image") as bar:
        for unit in units:
            folder, ranged = unit.folder(staging / TARGETS), bare.sidecars is None
            remake_unit(staging, unit.info, folder, bare.pixels, workers, partial=ranged, on_image=bar.update)
            shutil.rmtree(folder)
            _finish(staging, unit)


def _keep_manifest(staging: Path, published: Manifest, data: bytes) -> None:
    """Keep the manifest, which is needed to resume the pull; raises `UserError` if the folder has parts of a different
    cache."""
    place = staging / SOURCE / MANIFEST
    if place.exists() and (kept := read_manifest(place.parent).facts.fingerprint) != published.facts.fingerprint:
        raise UserError(
            "the folder contains an interrupted pull of a different cache",
            got=f"fingerprint {kept[:16]}",
            expected=f"fingerprint {published.facts.fingerprint[:16]}",
            where=staging.parent,
            fix=f"delete {staging}, or pull into a different folder (--cache ...)",
        )
    place.parent.mkdir(exist_ok=True)
    write_atomically(place, data)


def _in_place(root: Path, row: UnitRow, facts: ManifestFacts) -> bool:
    """Whether the cache has this unit as published, with all files at full length."""
    folder = unit_folder(root, row.group, row.range_id)
    if not has_sha256(folder / "unit.json", row.sha256):
        return False
    info, _ = read_unit(folder)
    return info.views == facts.groups[row.group] and not wrong_sizes(folder, info.files)


def _is_cut_in_place(root: Path, unit: Wanted) -> bool:
    """Whether the cache has exactly the requested views from this unit (a subset of its views), with all files at full
    length."""
    folder = unit.folder(root)
    if unit.info == unit.published or not (folder / "unit.json").is_file():
        return False
    with contextlib.suppress(UserError):
        there = read_unit(folder)[0]
        same = dataclasses.replace(there, payload_bytes=unit.info.payload_bytes) == unit.info
        return same and not wrong_sizes(folder, there.files)
    return False


def _fetch_sidecars(source: Path | RemotePath, staging: Path, rows: Sequence[UnitRow], threads: int) -> None:
    """Fetch sidecars. If a unit's sidecar has changed, files already transferred for that unit are removed."""
    tasks = []
    for row in rows:
        place = unit_folder(staging / SOURCE, row.group, row.range_id) / "unit.json"
        if not _is_file(place, Pin(row.sha256, None)):
            shutil.rmtree(unit_folder(staging, row.group, row.range_id), ignore_errors=True)
            published = unit_folder(source, row.group, row.range_id) / "unit.json"
            tasks.append(partial(fetch_file, Transfer(published, place, Pin(row.sha256, None), UNIT_BYTES)))
    _run(tasks, threads, "sidecar")


def _remove_leftovers(staging: Path, units: Sequence[Wanted]) -> None:
    """Remove what an interrupted pull of other views has transferred, which would be installed otherwise."""
    wanted = {unit.folder(staging): {"unit.json", *unit.info.files} for unit in units}
    for folder in (staging / "units").glob("*"):
        if folder not in wanted:
            shutil.rmtree(folder)
            continue
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix().removesuffix(PART) not in wanted[folder]:
                path.unlink()


def _run(tasks: Sequence[Task], threads: int, unit: str) -> int:
    """Run tasks with a progress bar; return the number of bytes fetched."""
    if not tasks:
        return 0
    received, bar = 0, progress("pull", len(tasks), unit)

    def show(size: int) -> None:
        nonlocal received
        received += size
        bar.set_postfix_str(size_text(received), refresh=False)
        bar.update()

    try:
        run_in_parallel(tasks, threads, show)
    finally:
        bar.close()
    return received


def _is_file(path: Path, pin: Pin) -> bool:
    """Whether this file exists and is intact."""
    whole = pin.bytes is None or (path.is_file() and path.stat().st_size == pin.bytes)
    return whole and has_sha256(path, pin.sha256)


def _teacher_files(source: Path | RemotePath, staging: Path, facts: ManifestFacts) -> Iterator[Transfer]:
    """The teacher and codec files that have not been transferred yet."""
    for name, digest in {**facts.teacher_files, **codec_files(facts.fingerprint_fields)}.items():
        if any(_is_file(folder / name, Pin(digest, None)) for folder in (staging, staging.parent)):
            continue
        place = source / name
        size = check_safetensors(place, "one of the published cache's files") if isinstance(place, Path) else None
        yield Transfer(place, staging / name, Pin(digest, size), TEACHER_BYTES)


def _missing_files(source: Path | RemotePath, staging: Path, unit: Wanted) -> Iterator[Transfer]:
    """The files in a unit that have not been transferred yet."""
    for name, fact in unit.info.files.items():
        target = unit.folder(staging) / name
        if not target.is_file() or target.stat().st_size != fact.bytes:
            yield Transfer(unit.folder(source) / name, target, Pin(fact.sha256, fact.bytes), fact.bytes)


def _fetch_bare_sidecars(bare: Bare, staging: Path, rows: Sequence[UnitRow], threads: int) -> None:
    """Fetch the sidecars for the shards without pixels."""
    tasks, sidecars = [], bare.sidecars or {}
    for row in rows:
        pin = Pin(sidecars.get((row.group, row.range_id), ""), None)
        place = unit_folder(staging / TARGETS, row.group, row.range_id) / "unit.json"
        if not _is_file(place, pin):
            shutil.rmtree(place.parent, ignore_errors=True)
            published = unit_folder(bare.targets, row.group, row.range_id) / "unit.json"
            tasks.append(partial(fetch_file, Transfer(published, place, pin, UNIT_BYTES)))
    _run(tasks, threads, "sidecar")


def _bare_files(source: Path | RemotePath, bare: Bare, staging: Path, unit: Wanted) -> Iterator[Transfer]:
    """The files not transferred yet for a unit without pixels: its lists, and its shards without pixels."""
    missing = list(_missing_files(source, staging, unit))
    if not missing:
        return
    yield from (transfer for transfer in missing if transfer.target.name in LISTS)
    if bare.sidecars is None:
        yield from other_files(unit.folder(bare.targets), unit.folder(staging / TARGETS), unit.info)
        return
    info = with_views(read_unit(unit.folder(staging / TARGETS))[0], unit.info.views)
    yield from _missing_files(bare.targets, staging / TARGETS, Wanted(unit.row, info, info))


def _old_place(staging: Path, transfer: Transfer) -> Path:
    """This file's path in a cache pulled with fewer views."""
    return staging.parent / transfer.target.relative_to(staging)


def _keep_or_fetch(staging: Path, transfer: Transfer, check_stop: Callable[[], None]) -> int:
    """Hard-link a file if the cache already has it; otherwise, fetch it."""
    old = _old_place(staging, transfer)
    if not _is_file(old, transfer.pin):
        return fetch_file(transfer, check_stop)
    transfer.target.parent.mkdir(parents=True, exist_ok=True)
    transfer.target.unlink(missing_ok=True)
    try:
        os.link(old, transfer.target)
    except OSError:  # a file system without hard links
        fetch_file(transfer._replace(source=old), check_stop)
    return 0


def _check_space(root: Path, needed: int, views: int) -> None:
    """Raise `UserError` if the missing files, of this number of views, do not fit on the disk."""
    free = free_bytes(root)
    if needed > free:
        fewer = f", or pull only the first few views (--views 0-{views // 2 - 1})" if views > 1 else ""
        raise UserError(
            "not enough free disk space for the cache",
            got=f"{size_text(free)} free",
            expected=f"{size_text(needed)} for the missing files",
            where=root,
            fix=f"free up space, or use a different disk (--cache ...){fewer}",
        )


def _fetch_codec_choice(source: Path | RemotePath, staging: Path, facts: ManifestFacts) -> None:
    """Fetch codec.json if it is published. Only stage 1 needs it; caches without a fitted codec have none."""
    try:
        if not is_there(source / CODEC_FILE):
            return
    except RemoteDeniedError:  # some servers return this for a missing file
        return
    write_atomically(staging / CODEC_FILE, read_file(source / CODEC_FILE, "the codec selection record", JSON_BYTES))
    if read_codec_choice(staging).codec != facts.codec:
        raise damaged(
            "codec.json specifies a different codec from the manifest", CODEC_FILE, "the cache's codec", source
        )


def _finish(staging: Path, unit: Wanted) -> None:
    """Write a unit's sidecar after all its files have been transferred, and flush its folders."""
    folder = unit.folder(staging)
    for part in folder.rglob(f"*{PART}"):
        part.unlink()
    if unit.info == unit.published:
        data = (unit.folder(staging / SOURCE) / "unit.json").read_bytes()
    else:
        data = sidecar_text(with_payload(unit.info, folder)).encode()
    write_atomically(folder / "unit.json", data)
    for inside in parent_folders(folder, unit.info.files):
        fsync_path(inside)
