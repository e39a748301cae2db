"""Supported image formats, and how a file is recognized by its name or its first bytes.

In: file names, first bytes. Out: whether it is a supported image. Invariant: only formats for which Pillow raises on
damaged files, and none that runs other programs (EPS). Only the Pillow plugins of these formats are imported, so a
broken plugin of another format does no harm.
"""

import importlib
import importlib.util
import os

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
if importlib.util.find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    importlib.import_module("PIL.AvifImagePlugin")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF")
"""Formats that are decoded, whatever the file name. Not JPEG 2000: Pillow decodes some truncated files."""
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
    ]
)
START_BYTES = 16
"""Number of first bytes from which Pillow recognizes a format."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Raw camera files start with these bytes too, so they count only for a file without a suffix."""


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, without a query string (left by some downloads)."""
    return os.path.splitext(name.partition("?")[0])[1].lower()


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of a supported image format."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_image_file(path: str, start: bytes) -> bool:
    """Whether a file with another suffix, or none, is a supported image, by its first bytes and its header."""
    if len(start) < START_BYTES or (start.startswith(TIFF_STARTS) and suffix_of(os.path.basename(path))):
        return False
    accepts = (Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN and kind != "DIB")  # DIB has no magic
    if not any(accept is not None and accept(start) is True for accept in accepts):
        return False
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow raises many exception types on files that are not images
        return False
