"""Checks the cache, its pixels and the destination before publishing.

In: the cache and the destination. Out: facts, or an error with a suggested fix.
Invariant: nothing is written here. A destination that contains anything but an earlier state of this cache is rejected.
"""

import os
import posixpath
from collections.abc import Mapping
from operator import ne
from pathlib import Path
from typing import Any, Literal

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.errors import UserError, counted, shell_command, some_of
from scalekd_cache.publishing.destination import Destination, Found
from scalekd_cache.publishing.places import local_folder
from scalekd_cache.publishing.publication import ORIGINAL
from scalekd_cache.store.cache_folder import PUBLICATION, marker_at
from scalekd_cache.store.checked_files import is_there, parse_json
from scalekd_cache.store.manifest import CARD, Manifest, read_manifest, read_manifest_bytes
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.plan import check_output_folder
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.sealed_json import unsealed
from scalekd_cache.store.shared_pixels import pixel_difference, pixel_identity
from scalekd_cache.store.verify import check_cache
from scalekd_cache.store.verify_unit import Part

Pixels = Literal["stored", "shared", "replayed", "left out"]
ACCEPTED = {CARD, ".gitattributes"}
"""Files that a new hub repository may contain."""
OTHER = "choose a different destination, or remove its contents"


def checked_cache(root: Path) -> tuple[Manifest, bytes]:
    """The manifest of a finished cache whose files all exist at full length, and the bytes of manifest.json.

    Raises:
        UserError: the cache is unfinished or damaged, or has no plan.
    """
    if "://" in str(root) or ":/" in str(root):
        raise UserError("--cache must be a local folder: run `scalekd pull` first")
    found, repair = read_manifest_bytes(root), shell_command("repair", cache=root)
    # Files that do not belong to the cache are not published.
    wrong = [problem for problem in check_cache(root).problems if problem.part is not Part.UNKNOWN_FILE]
    if wrong:
        some = "; ".join(f"{problem.where}: {problem.what}".splitlines()[0] for problem in wrong[:3])
        more = f"; and {counted(len(wrong) - 3, 'more problem')}" if len(wrong) > 3 else ""
        raise UserError(
            "the cache is damaged: nothing was published",
            got=some + more,
            where=root,
            fix=f"run `{repair}`, then rerun",
        )
    if not is_there(root / PLAN):
        raise UserError("the cache has no plan.json", where=root, fix=f"run `{repair}`, which rewrites it")
    return found


def check_apart(root: Path, to: str) -> None:
    """Raise `UserError` if the destination folder is the cache itself, or if one contains the other."""
    folder = local_folder(to)
    if "://" in folder:
        return
    cache, place = Path(os.path.realpath(root)), Path(os.path.realpath(folder))
    if cache == place:
        raise UserError(f"--to {to} is the cache itself: choose a different folder")
    if cache in place.parents or place in cache.parents:
        raise UserError(f"--to {to} and --cache {root} must not contain each other: choose a different folder")
    check_output_folder(Path(folder), "--to", may_be_cache=True)


def pixels_of(config: PublishConfig, manifest: Manifest) -> tuple[Pixels, str]:
    """How the pixels are published, and where shared pixels are published (empty if pixels are not shared).

    Raises:
        UserError: the options do not match the cache, or the shared pixels are not published.
    """
    facts = manifest.facts
    if facts.pixels_from:
        if config.without_pixels:
            raise UserError(
                f"this cache shares the pixels of {facts.pixels_from['path']}: remove --without-pixels here, and "
                "use it when you publish that cache"
            )
        return "shared", _place_of_pixels(config, manifest)
    if config.pixels_from is not None:
        raise UserError("this cache does not share the pixels of another cache: remove --pixels-from")
    if facts.view_recipe.get("pixels") != "baked":
        if config.without_pixels:
            raise UserError("this cache stores no pixels (its views are replayed): remove --without-pixels")
        return "replayed", ""
    return ("left out" if config.without_pixels else "stored"), ""


def local_paths(manifest: Manifest) -> list[str]:
    """The local paths in manifest.json: images, class list and weights."""
    facts = manifest.facts
    given = [facts.recipe, *(facts.data.get(name) for name in ("source", "devkit", "classes", "download_dir"))]
    given += [facts.teacher["config"].get(name) for name in ("weights", "weights_dir")]
    return [path for path in given if isinstance(path, str) and Path(path).is_absolute()]


def _place_of_pixels(config: PublishConfig, manifest: Manifest) -> str:
    """Where a cache's shared pixels are published; by default, next to the cache under the same name."""
    reference = manifest.facts.pixels_from
    place = config.pixels_from or _sibling(config.to, reference["path"])
    try:
        pixels = _published_manifest(place)
    except UserError as error:
        raise UserError(
            "this cache shares the pixels of another cache, which is not published at the expected location",
            got=str(error).splitlines()[0],
            expected=f"a published copy of {reference['path']} (path relative to this cache)",
            where=place,
            fix="publish that cache first, then set --pixels-from to its URL or folder",
        ) from error
    found = pixel_identity(pixels.facts.fingerprint_fields), pixels.num_samples
    if found != (reference["identity"], manifest.num_samples) or pixels.num_views < manifest.num_views:
        raise UserError(
            "the published cache that should provide the shared pixels "
            + pixel_difference(found, (reference["identity"], manifest.num_samples)),
            got=f"identity {found[0][:16]}, {counted(found[1], 'image')}, {counted(pixels.num_views, 'view')}",
            expected=f"identity {reference['identity'][:16]} (hash of dataset and view recipe), "
            f"{counted(manifest.num_samples, 'image')}, at least {counted(manifest.num_views, 'view')}",
            where=place,
            fix=f"publish the complete cache {reference['path']}, then set --pixels-from to its URL or folder",
        )
    return place


def _sibling(to: str, path: str) -> str:
    scheme, mark, rest = to.rpartition("://")
    return scheme + mark + posixpath.normpath(posixpath.join(rest, path))


def _published_manifest(place: str) -> Manifest:
    """The manifest of a published cache, complete or without pixels."""
    root: StoredPath = open_place(place)
    return read_manifest(root / ORIGINAL if marker_at(root) == PUBLICATION else root)


def check_place(place: Destination, found: Mapping[str, Found], manifest: Manifest, *, without_pixels: bool) -> None:
    """Raise `UserError` unless the destination is empty or holds an earlier state of this cache in the same layout."""
    start, other = (f"{ORIGINAL}/", "") if without_pixels else ("", f"{ORIGINAL}/")
    if f"{other}{PLAN}" in found:
        raise UserError(
            f"the destination contains a cache {'with' if without_pixels else 'without'} pixels",
            where=place.shown,
            fix=f"{'remove' if without_pixels else 'add'} --without-pixels, or choose a different destination",
        )
    marks = {name: _fields(place, start + name) for name in (PLAN, MANIFEST) if start + name in found}
    if not marks and found.keys() - ACCEPTED:
        raise UserError(
            "the destination is not empty and does not contain a cache",
            got=some_of(sorted(found.keys() - ACCEPTED)),
            where=place.shown,
            fix=OTHER,
        )
    for name, fields in marks.items():
        if fields.get("fingerprint") != manifest.facts.fingerprint:
            raise UserError(
                "the destination contains a different cache (different fingerprint)",
                got=f"{str(fields.get('fingerprint'))[:64]} in {name}",
                expected=manifest.facts.fingerprint,
                where=place.shown,
                fix=OTHER,
            )
    there = marks.get(MANIFEST, {}).get("units", [])
    here = [list(row) for row in manifest.units]
    if there[: len(here)] != here[: len(there)] or len(there) > len(here):
        views = sum(len(group) for group in marks[MANIFEST].get("groups", []))
        larger = there[: len(here)] == here
        raise UserError(
            "the destination contains this cache with more views"
            if larger
            else "the destination contains different units of this cache",
            got=f"{counted(len(there), 'unit')}, {counted(views, 'view')}"
            + ("" if larger else f"; {counted(sum(map(ne, there, here)), 'unit')} with different contents"),
            expected=f"only units of this cache ({counted(len(here), 'unit')}, {counted(manifest.num_views, 'view')})",
            where=place.shown,
            fix="publish the copy of this cache that has more views"
            if larger
            else f"the cache was repaired or rebuilt: {OTHER}",
        )


def _fields(place: Destination, name: str) -> dict[str, Any]:
    """The object in a sealed JSON file at the destination."""
    data = place.read(name)
    where = f"{place.shown}/{name}"
    return {} if data is None else unsealed(parse_json(data, name, where), data, where)
