"""Shared pixels: a cache without its own pixels reads them from another cache.

In: a cache whose manifest refers to another cache's pixels, or the folder of a cache with pixels. Out: the cache
that stores the pixels. Invariant: the pixels belong to the same images, view recipe and seed; the digest in every
record verifies the pixel bytes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd_cache.config.base import fingerprint
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.cache_folder import marker_at
from scalekd_cache.store.manifest import ManifestFacts, read_manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import RemotePath, open_place


def pixel_identity(fingerprint_fields: Mapping[str, Any]) -> str:
    """SHA-256 hex digest of everything that determines a cache's pixels: the view recipe and the dataset listing."""
    return fingerprint({name: fingerprint_fields[name] for name in ("views", "data")})


def open_pixel_cache(root: Path | RemotePath) -> Cache:
    """Open a finished cache whose pixels can be shared.

    Raises:
        UserError: the cache is not finished, stores no pixels, or itself shares a third cache's pixels.
    """
    cache = Cache(root, read_manifest(root))
    manifest = cache.manifest
    if manifest.facts.pixels_from:
        raise UserError(
            "this cache does not store its pixels: it shares those of another cache",
            got=root,
            expected="the cache that stores the pixels",
            fix="set --pixels-from to "
            f"{shared_pixels_path(root, manifest.facts) or 'the cache that stores the pixels'}",
        )
    if manifest.facts.view_recipe.get("pixels") != "baked":
        raise UserError(
            "this cache stores no pixels: its views are replayed from the dataset",
            got=f"views.pixels={manifest.facts.view_recipe.get('pixels')}",
            expected="views.pixels=baked",
            where=root,
            fix="set --pixels-from to a cache that stores its pixels, or remove the option",
        )
    return cache


def pixel_reference(root: Path, pixels: Path, facts: ManifestFacts) -> dict[str, str]:
    """The manifest's reference to the cache whose pixels are shared; the path is relative, so that both caches can be
    moved together."""
    path = os.path.relpath(pixels.resolve(), root.resolve())
    return {"identity": pixel_identity(facts.fingerprint_fields), "path": Path(path).as_posix()}


def shared_pixels_path(root: Path | RemotePath, facts: ManifestFacts) -> Path | None:
    """The folder of the cache whose pixels are shared; None for a remote cache."""
    if not isinstance(root, Path):
        return None
    return Path(os.path.normpath(root.resolve() / facts.pixels_from["path"]))


def pixel_difference(found: tuple[str, int], expected: tuple[str, int]) -> str:
    """How a cache with too few or different pixels differs from the one that is needed; the arguments are (identity,
    number of images)."""
    if found[0] != expected[0]:
        return "was made from a different dataset or view recipe"
    return "has too few views" if found == expected else "has a different number of images"


def open_shared_pixels(cache: Cache, place: str | None, views: int, remote: RemoteConfig | None = None) -> Cache | None:
    """Open the cache that stores the pixels for `cache`; None if `cache` does not share pixels.

    Args:
        cache: the cache used for training.
        place: folder or URL of the cache with the pixels (None: the path in the manifest, relative to the cache).
        views: number of views that will be read.
        remote: options for reading a URL.

    Raises:
        UserError: the cache is missing, holds different pixels, or has too few images or views.
    """
    manifest = cache.manifest
    if not manifest.facts.pixels_from:
        if place is not None:
            raise UserError(
                "this cache does not share the pixels of another cache",
                got=f"--pixels-from {place}",
                where=cache.root,
                fix="remove --pixels-from",
            )
        return None
    root = open_place(place, remote) if place is not None else shared_pixels_path(cache.root, manifest.facts)
    if root is None or marker_at(root) is None:
        raise UserError(
            "the cache that stores the shared pixels is missing",
            got="no path: the cache is at a URL" if root is None else f"no manifest in {root}",
            expected=f"the cache that stores the pixels for {cache.root}",
            where=cache.root,
            fix=f"copy the cache that stores the pixels to {root}, or set --pixels-from to its location"
            if root is not None
            else "set --pixels-from to the cache that stores the pixels",
        )
    pixels = open_pixel_cache(root)
    found = (pixel_identity(pixels.manifest.facts.fingerprint_fields), len(pixels))
    expected = (manifest.facts.pixels_from["identity"], len(cache))
    if found != expected or pixels.manifest.num_views < views:
        raise UserError(
            f"the cache that should store the shared pixels {pixel_difference(found, expected)}",
            got=f"identity {found[0][:16]}, {counted(found[1], 'image')}, {counted(pixels.manifest.num_views, 'view')}",
            expected=f"identity {expected[0][:16]} (hash of dataset and view recipe), {counted(expected[1], 'image')}, "
            f"at least {counted(views, 'view')}",
            where=root,
            fix=f"set --pixels-from to a complete copy of the cache that stores the pixels for {cache.root}",
        )
    return pixels
