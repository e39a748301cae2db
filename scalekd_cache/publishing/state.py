"""What must be true before a cache is published: of the cache, of its pixels, of the place.

In: the cache and the place. Out: facts, or an error that says what to do.
Invariant: nothing is written here. A place that holds anything else than an earlier state of this cache is rejected.
"""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.publishing.destination import Destination, Found
from scalekd_cache.publishing.publication import ORIGINAL
from scalekd_cache.store.checked_files import is_there, parse_json
from scalekd_cache.store.manifest import CARD, Manifest, read_manifest
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.plan import NAME as PLAN
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.store.sealed_json import unsealed
from scalekd_cache.store.shared_pixels import pixel_identity
from scalekd_cache.store.verify import check_cache
from scalekd_cache.store.verify_unit import Part

Pixels = Literal["stored", "shared", "replayed", "left out"]
ACCEPTED = {CARD, ".gitattributes"}
"""Files that a new repository of the hub may have."""
OTHER = "choose another place, or remove what is there"


def checked_cache(root: Path) -> Manifest:
    """The manifest of a finished cache whose files are all there with their full length.

    Raises:
        UserError: not finished, damaged, or without a plan.
    """
    if "://" in str(root) or ":/" in str(root):
        raise UserError("--cache must be a local folder: run `scalekd pull` first")
    manifest = read_manifest(root)
    # A file that does not belong to the cache is not published.
    wrong = [problem for problem in check_cache(root).problems if problem.part is not Part.UNKNOWN_FILE]
    if wrong:
        some = "; ".join(f"{problem.where}: {problem.what}".splitlines()[0] for problem in wrong[:3])
        more = f"; and {counted(len(wrong) - 3, 'more problem')}" if len(wrong) > 3 else ""
        raise UserError(
            "the cache is damaged: nothing was published",
            got=some + more,
            where=root,
            fix=f"run `scalekd repair --cache {root}`, then rerun",
        )
    if not is_there(root / PLAN):
        raise UserError("the cache has no plan.json", where=root, fix=f"`scalekd repair --cache {root}` rewrites it")
    return manifest


def check_apart(root: Path, to: str) -> None:
    """`UserError` if a folder to publish to is the cache, or one lies within the other."""
    if "://" in to:
        return
    cache, place = root.resolve(), Path(to).resolve()
    if cache == place:
        raise UserError(f"--to {to} is the cache itself: choose another folder")
    if cache in place.parents or place in cache.parents:
        raise UserError(f"--to {to} and --cache {root} lie within each other: choose another folder")


def pixels_of(config: PublishConfig, manifest: Manifest) -> tuple[Pixels, str]:
    """What is published of the pixels, and where shared pixels are published (otherwise empty).

    Raises:
        UserError: options that do not fit the cache, or shared pixels that are not published.
    """
    facts = manifest.facts
    if facts.pixels_from:
        if config.without_pixels:
            raise UserError(
                f"this cache has no pixels of its own, it shares those of {facts.pixels_from['path']}: remove "
                "--without-pixels here, and publish that cache with it"
            )
        return "shared", _place_of_pixels(config, manifest)
    if config.pixels_from is not None:
        raise UserError("this cache has pixels of its own: remove --pixels-from")
    if facts.view_recipe.get("pixels") != "baked":
        if config.without_pixels:
            raise UserError("this cache stores no pixels, its views are replayed: remove --without-pixels")
        return "replayed", ""
    return ("left out" if config.without_pixels else "stored"), ""


def local_paths(manifest: Manifest) -> list[str]:
    """The paths of this machine that manifest.json names: of the images, the class list and the weights."""
    facts = manifest.facts
    given = [facts.recipe, *(facts.data.get(name) for name in ("source", "devkit", "classes", "download_dir"))]
    given += [facts.teacher["config"].get(name) for name in ("weights", "weights_dir")]
    return [path for path in given if isinstance(path, str) and Path(path).is_absolute()]


def _place_of_pixels(config: PublishConfig, manifest: Manifest) -> str:
    """Where the pixels that a cache shares are published; without an option, next to it under the same name."""
    reference = manifest.facts.pixels_from
    place = config.pixels_from or _sibling(config.to, reference["path"])
    try:
        pixels = _published_manifest(place)
    except UserError as error:
        raise UserError(
            "the pixels of this cache are in another cache, which is not published there",
            got=str(error).splitlines()[0],
            expected=f"the cache {reference['path']} (relative to this one), published",
            where=place,
            fix="publish that cache first, then set --pixels-from to its place",
        ) from error
    found = pixel_identity(pixels.facts.fingerprint_fields), pixels.num_samples
    if found != (reference["identity"], manifest.num_samples) or pixels.num_views < manifest.num_views:
        raise UserError(
            "the cache published there has other pixels (identity of data set and view recipe, images, views)",
            got=f"{found[0][:16]}, {counted(found[1], 'image')}, {counted(pixels.num_views, 'view')}",
            expected=f"{reference['identity'][:16]}, {counted(manifest.num_samples, 'image')}, at least "
            f"{counted(manifest.num_views, 'view')}",
            where=place,
            fix=f"publish the cache {reference['path']}, then set --pixels-from to its place",
        )
    return place


def _sibling(to: str, path: str) -> str:
    scheme, mark, rest = to.rpartition("://")
    return scheme + mark + posixpath.normpath(posixpath.join(rest, path))


def _published_manifest(place: str) -> Manifest:
    """The manifest of a published cache, whole or without pixels."""
    root: StoredPath = open_place(place)
    return read_manifest(root if is_there(root / MANIFEST) else root / ORIGINAL)


def check_place(place: Destination, found: Mapping[str, Found], manifest: Manifest, *, without_pixels: bool) -> None:
    """`UserError` unless the place is empty or holds an earlier state of this cache in the same layout."""
    start, other = (f"{ORIGINAL}/", "") if without_pixels else ("", f"{ORIGINAL}/")
    if f"{other}{PLAN}" in found:
        raise UserError(
            f"the place holds a cache {'with its' if without_pixels else 'without'} pixels",
            where=place.shown,
            fix=f"{'remove' if without_pixels else 'add'} --without-pixels, or choose another place",
        )
    marks = {name: _fields(place, start + name) for name in (PLAN, MANIFEST) if start + name in found}
    if not marks and found.keys() - ACCEPTED:
        raise UserError(
            "the place is not empty, and holds no cache",
            got=f"{counted(len(found), 'file')}, such as {min(found.keys() - ACCEPTED)}",
            where=place.shown,
            fix=OTHER,
        )
    for name, fields in marks.items():
        if fields.get("fingerprint") != manifest.facts.fingerprint:
            raise UserError(
                "the place holds another cache (fingerprint)",
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
            "the place holds a later state of this cache" if larger else "the place holds other units of this cache",
            got=f"{counted(len(there), 'unit')}, {counted(views, 'view')}",
            expected=f"the first of {counted(len(here), 'unit')}, {counted(manifest.num_views, 'view')}",
            where=place.shown,
            fix="publish the cache that has grown" if larger else f"the cache was repaired or rebuilt: {OTHER}",
        )


def _fields(place: Destination, name: str) -> dict[str, Any]:
    """The object in a sealed JSON file of the place."""
    data = place.read(name)
    where = f"{place.shown}/{name}"
    return {} if data is None else unsealed(parse_json(data, name, where), data, where)
