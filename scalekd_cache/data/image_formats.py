"""Which image formats are taken, and how a file of one is known by its name or its first bytes.

In: names, first bytes. Out: yes or no. Invariant: only formats whose damaged files are refused by Pillow are taken, and
none that runs other programs (EPS). Of Pillow only the plugins of these formats are imported: a broken plugin of
another format ends nothing.
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
"""What is decoded, whatever the file's name says. Not JPEG 2000: Pillow decodes some files that are cut short."""
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
"""First bytes by which Pillow knows a format."""
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Raw camera files begin like this too, so it makes an image only of a file without a suffix."""


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, without the query string that a download may have left behind it."""
    return os.path.splitext(name.partition("?")[0])[1].lower()


def is_image_name(name: str) -> bool:
    """Whether a name ends as the images do that are taken."""
    return suffix_of(name) in IMAGE_SUFFIXES


def is_image_file(path: str, start: bytes) -> bool:
    """Whether a file with another suffix, or none, is an image that is taken: by its first bytes and its header."""
    if len(start) < START_BYTES or (start.startswith(TIFF_STARTS) and suffix_of(os.path.basename(path))):
        return False
    accepts = (Image.OPEN[kind][1] for kind in FORMATS if kind in Image.OPEN and kind != "DIB")  # DIB has no magic
    if not any(accept is not None and accept(start) is True for accept in accepts):
        return False
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # Pillow raises many kinds on what only looked like an image
        return False
