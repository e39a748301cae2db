"""Whether a folder holds a cache, and the error if it does not.

In: a path. Out: nothing, or a `UserError` that says what the place is instead and how to correct it.
Invariant: commands, Python functions and readers report a wrong place in the same words.
"""

import os
from pathlib import Path

from scalekd_cache.config.places import cache_places, default_cache
from scalekd_cache.errors import UserError, join_or, shell_command, unknown_name
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.url_transfer import RemoteDeniedError

DEMO_DATA = "demo"
PUBLICATION = "publication.json"
"""A file of a published cache. Without a manifest next to it, the cache was published without pixels."""


def check_cache_path(place: str, option: str = "--cache", data: str | None = None) -> None:
    """Raise `UserError` unless `place`, set by `option`, is a folder with a complete or partial cache. The message
    suggests similar caches, and the command that makes this one from the dataset `data`. URLs are not checked."""
    path = Path(place)
    if "://" in place or any(is_there(path / part) for part in ("plan.json", "manifest.json", "units")):
        return
    if len(cache_places(place)) > 1:
        raise UserError(f"this command takes a single cache, but {option} lists multiple caches: {place}")
    if is_there(path / PUBLICATION):
        raise without_pixels(path)
    if path.is_dir():
        inside = sorted(str(file.parent) for file in path.glob("*/manifest.json"))[:3]
        hint = f": did you mean {join_or(inside)}?" if inside else ": it contains no plan.json or manifest.json"
        raise UserError(f"{place} is not a cache{hint} ({option}; `scalekd cache-teacher` creates one)")
    if path.is_file():
        folder = path.parent
        holds = (folder / "manifest.json").exists()
        fix = f"{option} {folder}" if holds else f"{option} to a cache folder"
        raise UserError(f"{place} is a file, not a cache: set {fix}")
    there = [str(file.parent) for file in path.absolute().parent.glob("*/manifest.json")]
    there = [os.path.relpath(folder) if not path.is_absolute() else folder for folder in there]
    source = data or (DEMO_DATA if place == default_cache(DEMO_DATA) else "DATASET")
    make = shell_command("cache-teacher", data=source, cache=None if place == default_cache(source) else place)
    raise unknown_name("cache", place, there, f"{option}; create it with `{make}`")


def marker_at(root: StoredPath) -> str | None:
    """The file that marks a readable cache at a location: manifest.json, or `PUBLICATION` without a manifest; or None.

    Raises:
        UserError: the server cannot be read. Some servers deny access to a missing file, so the denial of the manifest
            is an error only if the other file is not there either.
    """
    denied: RemoteDeniedError | None = None
    for name in ("manifest.json", PUBLICATION):
        try:
            if is_there(root / name):
                return name
        except RemoteDeniedError as error:
            denied = denied or error
    if denied is not None:
        raise denied
    return None


def without_pixels(root: object) -> UserError:
    """The error for a location that has no manifest because a cache was published there without pixels."""
    return UserError(
        "this cache was published without pixels, so it cannot be read directly",
        where=root,
        fix=f"run `scalekd pull {root} --cache ... --data ...`, which regenerates the pixels from the images",
    )
