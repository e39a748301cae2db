"""Pixels that one cache takes from another.

In: a cache that says whose pixels it shares, or the folder of one that has some. Out: the cache that holds them.
Invariant: the pixels belong to the same images, view recipe and seed; which bytes they are is decided by the digests
in every record of the cache that shares them.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd_cache.config.base import fingerprint
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.manifest import Manifest, ManifestFacts, read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import RemotePath, open_place


def pixel_identity(fingerprint_fields: Mapping[str, Any]) -> str:
    """The sha256 (hex) over what decides a cache's pixels: its view recipe and its data set's listing."""
    return fingerprint({name: fingerprint_fields[name] for name in ("views", "data")})


def open_pixel_cache(root: Path | RemotePath) -> Cache:
    """A finished cache whose pixels can be shared.

    Raises:
        UserError: not finished, without stored pixels, or sharing those of a third one itself.
    """
    cache = Cache(root, read_manifest(root))
    manifest = cache.manifest
    if manifest.pixels_from:
        raise UserError(
            "this cache has no pixels of its own, it shares those of another",
            got=root,
            expected="the cache that holds them",
            fix=f"give PIXELS_FROM={shared_place(root, manifest) or 'the cache that holds them'}",
        )
    if manifest.view_recipe.get("pixels") != "baked":
        raise UserError(
            "this cache holds no pixels: its views are drawn again from the data set",
            got=f"views.pixels={manifest.view_recipe.get('pixels')}",
            expected="views.pixels=baked",
            where=root,
            fix="leave PIXELS_FROM out",
        )
    return cache


def shared_with(root: Path, pixels: Cache) -> dict[str, str]:
    """What a cache in `root` keeps of the one whose pixels it shares: the two may move together."""
    assert isinstance(pixels.root, Path)
    path = os.path.relpath(pixels.root.resolve(), root.resolve())
    return {"identity": pixel_identity(pixels.manifest.fingerprint_fields), "path": Path(path).as_posix()}


def shared_place(root: Path | RemotePath, manifest: Manifest | ManifestFacts) -> Path | None:
    """Where a cache in a folder expects the pixels that it shares; None for one behind a URL."""
    if not isinstance(root, Path):
        return None
    return Path(os.path.normpath(root.resolve() / manifest.pixels_from["path"]))


def pixels_of(cache: Cache, place: str | None, views: int, remote: RemoteConfig | None = None) -> Cache | None:
    """The cache that holds the pixels of `cache`; None when it has its own, or needs none.

    Args:
        cache: the cache that is trained from.
        place: folder or URL of the pixels (None: where they were, relative to the cache).
        views: views that will be read.
        remote: how a URL is read.

    Raises:
        UserError: not there, other pixels, or fewer images or views.
    """
    manifest = cache.manifest
    if not manifest.pixels_from:
        if place is not None:
            raise UserError(
                "this cache has pixels of its own",
                got=f"PIXELS_FROM={place}",
                where=cache.root,
                fix="leave PIXELS_FROM out",
            )
        return None
    root = open_place(place, remote) if place is not None else shared_place(cache.root, manifest)
    if root is None or not is_there(root / "manifest.json"):
        raise UserError(
            "the cache whose pixels are shared is not there",
            got="nothing, a URL has no neighbors" if root is None else f"no manifest in {root}",
            expected=f"the cache with the pixels of {cache.root}",
            where=cache.root,
            fix="bring it there, or say where it is with PIXELS_FROM=",
        )
    pixels = open_pixel_cache(root)
    found = (pixel_identity(pixels.manifest.fingerprint_fields), len(pixels))
    expected = (manifest.pixels_from["identity"], len(cache))
    if found != expected or pixels.manifest.num_views < views:
        raise UserError(
            "the cache given holds other pixels (identity of data set and view recipe, images, views)",
            got=f"{found[0][:16]}, {found[1]} images, {pixels.manifest.num_views} views",
            expected=f"{expected[0][:16]}, {expected[1]} images, at least {views} views",
            where=root,
            fix="give the cache that PIXELS_FROM named when this one was made",
        )
    return pixels
