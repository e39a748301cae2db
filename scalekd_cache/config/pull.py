"""Options for `pull`: the published cache, the output folder, and the parts to pull.

In: values from the command line or a Python call. Out: a checked, immutable dataclass.
Invariant: none of these options changes the bytes of a pulled file.
"""

from dataclasses import field

from scalekd_cache.config.base import require
from scalekd_cache.config.options import options_class
from scalekd_cache.config.places import default_cache
from scalekd_cache.config.remote import RemoteConfig


@options_class()
class PullConfig:
    """Options for `pull`."""

    url: str
    """The published cache: hf://datasets/USER/NAME, s3://..., gs://..., https://... or a folder."""
    cache: str | None = None
    """Output folder (default: caches/ followed by the last part of the URL)."""
    views: str | None = None
    """Pull only the first few views, as a range from 0, e.g. 0-3 (default: all). A later pull can add more."""
    without_pixels: bool = False
    """Do not transfer pixels. They are regenerated from the images in --data and checked against their digests."""
    data: str | None = None
    """Path to the images that the cache was made from. Required with --without-pixels and for a cache that was
    published without pixels."""
    connections: int = 8
    """Number of files transferred in parallel."""
    workers: int = 0
    """Worker processes for regenerating pixels that are not transferred (0: use the main process)."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Options for reading from URLs."""

    def __post_init__(self) -> None:
        require(1 <= self.connections <= 256, "connections", self.connections, "1 to 256")
        require(self.workers >= 0, "workers", self.workers, ">= 0")

    @property
    def folder(self) -> str:
        """The output folder."""
        return self.cache or default_cache(self.url)
