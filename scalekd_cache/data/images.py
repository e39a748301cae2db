"""Decodes one image file.

In: the bytes of an image file. Out: (H, W, 3) uint8 RGB.
Invariant: a decoded image is complete and never zero-filled; a bad image raises `UnreadableImage` and never crashes.
"""

import hashlib
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from scalekd_cache.data.image_formats import FORMATS

MAX_PIXELS = 178_956_970
"""Maximum image size in pixels: twice Pillow's default limit, the size above which Pillow itself raises an error."""
DEEP_FORMATS = ("PNG", "PPM")
"""Formats whose gray values in Pillow's 32-bit mode "I" go up to 65535. In others, the white level is unknown."""
ORIENTATION_TAG = 0x0112
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):  # noqa: N818 (not a program error)
    """An image that cannot be decoded. The caller records it and continues with the next image."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot decode image {self.key}: {self.reason}"


def image_digest(data: bytes) -> str:
    """BLAKE2b digest of an image file as 16 hex characters, used to detect replaced files."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def decode_image(data: bytes, key: str) -> npt.NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) uint8 RGB.

    EXIF rotation is applied; alpha and palette transparency are composited over white; 16-bit gray is scaled to 8-bit,
    and inverted if its zero is white; CMYK is converted without a color profile; only the first of multiple frames is
    used.

    Raises:
        UnreadableImage: the file is empty, truncated, not an image or larger than `MAX_PIXELS`, or its value range is
            unknown (floats and wider integers).
    """
    if not data:
        raise UnreadableImage(key, "zero bytes")
    ImageFile.LOAD_TRUNCATED_IMAGES = (
        False  # process-wide; if another library sets it, truncated images are zero-filled
    )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, key)
            negative = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
            image.load()
            if image.mode == "F" or (image.mode == "I" and image.format not in DEEP_FORMATS):
                raise UnreadableImage(key, f"mode {image.mode} in {image.format}, expected 8 or 16 bits")
            deep = image.mode.startswith("I;16")
            pixels = np.array(_to_rgb(_upright(image)))
            if deep and negative:  # Pillow inverts 8-bit images only
                pixels = 255 - pixels
    except (UnreadableImage, MemoryError):  # MemoryError depends on the machine, not on the image
        raise
    except Exception as error:  # Pillow raises many exception types on damaged bytes
        reason = "not a known image format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(key, reason or type(error).__name__) from error
    assert pixels.ndim == 3, pixels.shape
    assert pixels.shape[2] == 3, pixels.shape
    assert pixels.dtype == np.uint8, pixels.dtype
    return pixels


def _check_size(image: Image.Image, key: str) -> None:
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise UnreadableImage(key, f"size {width}x{height}, expected 1x1 up to {MAX_PIXELS} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """The image rotated according to its EXIF orientation."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # the pixels are complete; only the EXIF block is damaged
        return image
    method = TRANSPOSES.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_deep_gray(image)
    color = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(color, tuple) and max(color) > 255:  # of 16 bits; the pixels have 8
        image.info["transparency"] = tuple(value >> 8 for value in color)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """Convert 16-bit gray to 8-bit RGB; pixels with the transparent value, if there is one, become white."""
    values = np.asarray(image).astype(np.uint32)
    gray = np.where(values == image.info.get("transparency", -1), 255, (values + 128) // 257)
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
