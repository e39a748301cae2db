"""Supported image formats, and checks that recognize an image by its file name or first bytes.

In: a file name or the first bytes of a file. Out: whether it is a supported image. Invariant: Pillow raises an error on
damaged files in every supported format, and no supported format runs other programs (as EPS does). Only the Pillow
plugins for these formats are imported, so a broken plugin for a different format cannot cause errors.
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

_PLUGINS = [
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
]
SUFFIXES: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""Suffixes of each supported format. JPEG 2000 is excluded because Pillow decodes some truncated files."""
if importlib.util.find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    _PLUGINS.append(importlib.import_module("PIL.AvifImagePlugin"))
    SUFFIXES["AVIF"] = (".avif",)
FORMATS = tuple(SUFFIXES)
"""Formats that are decoded, whatever the file name."""
IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
OTHER_SUFFIXES = ", ".join(suffixes[0][1:] for suffixes in SUFFIXES.values() if suffixes[0] != ".jpg")
"""One suffix for each format except JPEG, for messages."""
START_BYTES = 16
"""Number of leading bytes that Pillow needs to recognize the format."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Raw camera files start with these bytes too, so they count only if the file has no suffix."""


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, without the query string that some downloads leave."""
    return os.path.splitext(name.partition("?")[0])[1].lower()


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of a supported image format."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_image_file(path: str, start: bytes) -> bool:
    """Whether a file with an unknown suffix or none is a supported image, judging by its first bytes and header."""
    if len(start) < START_BYTES or (start.startswith(TIFF_STARTS) and suffix_of(os.path.basename(path))):
        return False
    accepts = (Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN and kind != "DIB")  # DIB: no magic bytes
    if not any(accept is not None and accept(start) is True for accept in accepts):
        return False
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow raises many exception types on files that are not images
        return False
