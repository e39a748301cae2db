"""Options for reading a cache over the network.

In: values from the command line and the environment. Out: a checked, immutable dataclass.
Invariant: none of these options changes the data, only how it is downloaded.
"""

import os
from pathlib import Path

from scalekd_cache.config.base import LONGEST_MINUTES, require
from scalekd_cache.config.options import options_class
from scalekd_cache.config.places import home_path
from scalekd_cache.errors import UserError

FOLDER_VARIABLE, LIMIT_VARIABLE = "SCALEKD_CACHE_DIR", "SCALEKD_CACHE_BYTES"
DEFAULT_LIMIT_BYTES = 50_000_000_000


@options_class("remote")
class RemoteConfig:
    """Options for reading a cache from a URL. They have no effect on a cache in a local folder."""

    folder: str | None = None
    """Folder for local copies (default: $SCALEKD_CACHE_DIR, or ~/.cache/scalekd-cache)."""
    limit_bytes: int | None = None
    """Maximum size of the local copies in bytes; the least recently used copies are removed (default:
    $SCALEKD_CACHE_BYTES, or 50 GB)."""
    attempts: int = 5
    """Maximum number of attempts per transfer."""
    backoff_s: float = 0.5
    """Delay before the second attempt, in seconds; doubled after each attempt, up to 30 s."""
    timeout_s: float = 60.0
    """A transfer fails if no data arrives for this many seconds."""
    least_rate: float = 1000.0
    """Minimum average rate in bytes per second, enforced after `timeout_s`; a slower transfer fails."""
    total_s: float = 3600.0
    """Maximum duration of a transfer, in seconds."""
    redirect_hosts: str = ""
    """Other hosts (`host` or `host:port`, comma-separated) that a server may redirect to. Redirects of the manifest and
    redirects to a different URL scheme are never followed."""

    def __post_init__(self) -> None:
        require(self.limit_bytes is None or self.limit_bytes > 0, "remote.limit_bytes", self.limit_bytes, "> 0")
        require(1 <= self.attempts <= 100, "remote.attempts", self.attempts, "1 to 100")
        require(0 <= self.backoff_s <= 3600, "remote.backoff_s", self.backoff_s, "0 to 3,600")
        for name in ("timeout_s", "total_s"):
            seconds = getattr(self, name)
            require(0 < seconds <= 60 * LONGEST_MINUTES, f"remote.{name}", seconds, "above 0, at most two years")
        require(self.least_rate >= 0, "remote.least_rate", self.least_rate, ">= 0")


def copies_folder(config: RemoteConfig) -> Path:
    """The folder for local copies."""
    return home_path(config.folder or os.environ.get(FOLDER_VARIABLE) or "~/.cache/scalekd-cache")


def copies_limit(config: RemoteConfig) -> int:
    """Size limit for local copies, in bytes. Raises `UserError` if the environment variable is not a number of
    bytes."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if config.limit_bytes is not None or not text:
        return config.limit_bytes or DEFAULT_LIMIT_BYTES
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(
            "invalid number of bytes", got=text, expected="a whole number above 0", where=f"${LIMIT_VARIABLE}"
        )
    return int(text)
