"""Encodes, decodes and hashes a view's pixels.

In: (size, size, 3) uint8 pixels, or bytes from a cache. Out: a JPEG, WebP or PNG file, pixels, or a digest.
Invariant: the header of stored bytes is checked before anything is decoded or allocated; a format is always decoded by
the same library, so that a student gets exactly the teacher's pixels.
"""

import hashlib
import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.errors import UserError, counted

Pixels = NDArray[np.uint8]


def encode_pixels(pixels: Pixels, config: ViewConfig) -> bytes:
    """Encode a (size, size, 3) uint8 view in `pixel_format`. The file always has three channels, and equal pixels give
    equal bytes."""
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.shape == (config.size, config.size, 3), pixels.shape
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    if config.pixel_format == "png":
        picture.save(buffer, "PNG", compress_level=3)
    elif config.pixel_format == "webp":
        picture.save(buffer, "WEBP", quality=config.jpeg_quality, method=4)
    else:
        options = {"optimize": True} if config.pixel_format == "jpeg-optimized" else {}
        picture.save(buffer, "JPEG", quality=config.jpeg_quality, subsampling=config.jpeg_subsampling, **options)
    return buffer.getvalue()


def decode_pixels(data: bytes | memoryview, size: int) -> Pixels:
    """Decode a view to (size, size, 3) uint8 pixels. Format, mode and size come from the header and are checked before
    anything is decoded. Raises `UserError` if they are wrong or the bytes are damaged.

    torchvision decodes JPEG and WebP: it uses the same libraries as Pillow but without Pillow's copies (docs/LOG.md).
    """
    try:
        jpeg = jpeg_shape(data) == (size, size, 3)
        if jpeg or webp_size(data) == (size, size):
            pixels = _decode_by_torchvision(data, "decode_jpeg" if jpeg else "decode_webp")
            if pixels.shape != (size, size, 3):
                raise ValueError(f"decoded shape {pixels.shape}, which differs from the header")
            return pixels
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            got = f"{picture.format}, {picture.mode}, {picture.width} x {picture.height} pixels"
            if picture.format == "PNG" and (picture.mode, picture.size) == ("RGB", (size, size)):
                return np.array(picture)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        got = f"{counted(len(data), 'byte')}: {type(error).__name__}: {error}"
    raise UserError(
        "cannot decode a view's pixels",
        got=got,
        expected=f"a JPEG, WebP or PNG file, RGB, {size} x {size} pixels",
        fix="the cache is damaged: run `scalekd repair --cache ...`",
    )


def jpeg_shape(data: bytes | memoryview) -> tuple[int, int, int] | None:
    """(height, width, components) of an 8-bit JPEG from its first frame header (ITU-T T.81, B.2.2); None for anything
    else, including a file that ends before that header."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, components = struct.unpack(">BHHB", data[at + 4 : at + 10])
            return (height, width, components) if precision == 8 else None
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:  # not a segment, or the scan begins without a frame
            return None
        at += 2 + length
    return None


def webp_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """(width, height) of a WebP file that contains only one lossy key frame (RFC 9649, 2.5; RFC 6386, 9.1); None for
    anything else."""
    if (
        len(data) < 30
        or bytes(data[:4]) + bytes(data[8:16]) != b"RIFFWEBPVP8 "
        or bytes(data[23:26]) != b"\x9d\x01\x2a"
    ):
        return None
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF  # two bits of each value are a scaling hint that decoders ignore


def _decode_by_torchvision(data: bytes | memoryview, decoder: str) -> Pixels:
    import torch
    import torchvision.io

    try:
        planes = getattr(torchvision.io, decoder)(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError as error:  # a C++ error, which includes its source location
        raise ValueError(str(error).rpartition(", ")[2]) from error
    pixels: Pixels = planes.permute(1, 2, 0).numpy()
    return pixels


def pixel_digest(pixels: Pixels) -> str:
    """BLAKE2b digest of the shape and bytes of uint8 pixels, as 16 hex characters."""
    assert pixels.dtype == np.uint8, pixels.dtype
    shape = ",".join(map(str, pixels.shape)).encode() + b";"
    return hashlib.blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=8).hexdigest()
