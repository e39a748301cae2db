"""Chooses the destination from `--to`.

In: a URL or a folder. Out: a `Destination`.
Invariant: nothing is read or written here. Messages contain no password, token or query.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from scalekd_cache.errors import UserError, closest_names
from scalekd_cache.publishing.destination import KINDS, Destination
from scalekd_cache.publishing.to_folder import FolderPlace
from scalekd_cache.store.remote.url_transfer import without_password

HUB_SITE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/\s]+/[^/\s]+)")


def open_destination(to: str, *, private: bool = False, connections: int = 4) -> Destination:
    """The destination given by `--to`.

    Args:
        to: a URL or a folder.
        private: whether to make a new hub repository private.
        connections: the number of parallel transfers.

    Raises:
        UserError: the URL has an unknown scheme, is incomplete, or contains a password.
    """
    site = HUB_SITE.match(to)
    if site is not None:
        raise UserError(f"--to is a web page URL: use --to hf://datasets/{site[1]}")
    scheme, mark, _ = to.partition(":")
    if not mark or "/" in scheme or len(scheme) < 2:
        return _folder(to, connections)
    if to.lower().startswith("file:///"):
        return _folder(local_folder(to), connections)
    if scheme.lower() not in KINDS:
        known = [f"{name}://" for name in KINDS]
        near = closest_names(f"{scheme}://", known)
        raise UserError(f"--to {_shown(to)} has an unsupported URL scheme: use {near}, or a folder")
    scheme = scheme.lower()
    url = to[to.index(":") :].rstrip("/")
    authority, _, folder = url.removeprefix("://").partition("/")
    parts = folder.split("/")
    if not url.startswith("://") or not authority or not folder:
        raise UserError(f"--to {_shown(to)} is not a complete URL: use {KINDS[scheme]}")
    if {"", ".", ".."} & set(parts):
        raise UserError(f"--to {_shown(to)} contains //, . or .. in its path: use {KINDS[scheme]}")
    if "@" in authority:
        raise UserError(
            "--to contains a username, a password or a token",
            got=_shown(to),
            fix="remove it: credentials are read from the environment (docs/REMOTE.md)",
        )
    if any(mark in url for mark in "?#@*"):
        raise UserError(f"--to {_shown(to)} contains a query, a revision or a pattern: use {KINDS[scheme]}")
    if scheme == "hf":
        from scalekd_cache.publishing.to_hub import HubPlace, hub_repository

        return HubPlace(*hub_repository(f"hf{url}"), private=private, connections=connections)
    from scalekd_cache.publishing.to_bucket import BucketPlace

    return BucketPlace(scheme + url, connections)


def local_folder(to: str) -> str:
    """The folder of a file:/// URL; anything else is returned unchanged."""
    return unquote(urlsplit(to).path) if to.lower().startswith("file:///") else to


def _shown(to: str) -> str:
    """The option value without passwords, even if it is not a complete URL."""
    return re.sub(r":(?!//)[^/]*@", ":***@", without_password(to))


def _folder(to: str, connections: int) -> Destination:
    root = Path(to)
    if root.exists() and not root.is_dir():
        raise UserError(f"--to {to} is a file: choose a folder, or a URL such as {KINDS['hf']}")
    if not root.absolute().parent.is_dir():
        hint = f"hf://{to}" if to.startswith("datasets/") else KINDS["hf"]
        raise UserError(
            f"--to {to} is neither a URL nor inside an existing folder: create {root.parent}, or use a URL such as "
            f"{hint}"
        )
    return FolderPlace(root, connections)
