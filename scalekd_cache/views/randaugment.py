"""RandAugment's fifteen operations (timm's "increasing" set): converts magnitudes to arguments and applies operations.

In: an operation's name with a magnitude (0 to 10) and sign, or with a resolved argument, and a PIL image.
Out: the argument (a plain number, which is stored in the view record) and the changed image.
Invariant: the argument fully determines the pixels; nothing here uses random numbers. Names, ranges and results match
`timm.data.auto_augment`. The order and number of `OPERATIONS` affect how views are sampled, so they never change.
"""

from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps

from scalekd_cache.errors import UserError, closest_names

FILL = (124, 116, 104)
"""Fill color (RGB) for geometric operations: ImageNet's mean, as in timm."""

RECORD_FIX = (
    "the record is damaged or was written by a different version: run `scalekd verify` on the cache, or rebuild it"
)
"""How to fix an invalid view record."""

MAGNITUDE_MAX = 10.0
"""The maximum magnitude. `level` in this module is the magnitude divided by this value, so it ranges from 0 to 1."""


class Operation(NamedTuple):
    """An operation: how its argument is computed, its valid range, and how it is applied."""

    resolve: Callable[[float, int], float]
    """(level, sign) -> argument, in the unit given next to the operation."""
    apply: Callable[[Image.Image, float, Image.Resampling], Image.Image]
    """(image, argument, filter for geometric operations) -> image of the same size."""
    low: float
    high: float
    whole: bool = False
    """Whether the argument is a whole number."""


def _nothing(level: float, sign: int) -> float:
    return 0.0


def _signed(limit: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * level * limit


def _factor(level: float, sign: int) -> float:
    """Blend factor: 1 changes nothing, and the distance from 1 grows with the level."""
    return max(0.1, 1.0 + sign * level * 0.9)


def _affine(
    image: Image.Image, matrix: tuple[float, float, float, float, float, float], resample: Image.Resampling
) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=FILL)


def _posterize(image: Image.Image, argument: float, resample: Image.Resampling) -> Image.Image:
    """Keep the highest `argument` bits; 0 (magnitude 10) gives black. Pillow's own function has rejected 0 since
    version 13."""
    mask = 256 - 2 ** (8 - int(argument))
    return image.point([value & mask for value in range(256)] * 3)


def _solarize_add(image: Image.Image, argument: float, resample: Image.Resampling) -> Image.Image:
    add = int(argument)
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _blend(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return Operation(_factor, lambda image, factor, _: enhancer(image).enhance(factor), 0.1, 1.9)


def _geometric(
    limit: float, matrix: Callable[[float, Image.Image], tuple[float, float, float, float, float, float]]
) -> Operation:
    return Operation(
        _signed(limit), lambda image, share, resample: _affine(image, matrix(share, image), resample), -limit, limit
    )


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(_nothing, lambda image, *_: ImageOps.autocontrast(image), 0, 0),
    "Equalize": Operation(_nothing, lambda image, *_: ImageOps.equalize(image), 0, 0),
    "Invert": Operation(_nothing, lambda image, *_: ImageOps.invert(image), 0, 0),
    # degrees, counter-clockwise
    "Rotate": Operation(
        _signed(30.0), lambda image, degrees, filt: image.rotate(degrees, resample=filt, fillcolor=FILL), -30, 30
    ),
    # number of bits kept
    "PosterizeIncreasing": Operation(lambda level, _: 4 - int(level * 4), _posterize, 0, 4, True),
    # values at or above this threshold are inverted
    "SolarizeIncreasing": Operation(
        lambda level, _: 256 - int(level * 256),
        lambda image, limit, _: ImageOps.solarize(image, int(limit)),
        0,
        256,
        True,
    ),
    # added to values below 128
    "SolarizeAdd": Operation(lambda level, _: int(level * 110), _solarize_add, 0, 110, True),
    "ColorIncreasing": _blend(ImageEnhance.Color),
    "ContrastIncreasing": _blend(ImageEnhance.Contrast),
    "BrightnessIncreasing": _blend(ImageEnhance.Brightness),
    "SharpnessIncreasing": _blend(ImageEnhance.Sharpness),
    # shift in pixels per pixel along the other axis
    "ShearX": _geometric(0.3, lambda shear, _: (1, shear, 0, 0, 1, 0)),
    "ShearY": _geometric(0.3, lambda shear, _: (1, 0, 0, shear, 1, 0)),
    # share of the width or height
    "TranslateXRel": _geometric(0.45, lambda share, image: (1, 0, share * image.width, 0, 1, 0)),
    "TranslateYRel": _geometric(0.45, lambda share, image: (1, 0, 0, 0, 1, share * image.height)),
}

OPERATION_NAMES = tuple(OPERATIONS)


def resolve_argument(name: str, magnitude: float, negative: bool) -> float:
    """The argument for operation `name` at `magnitude` (clipped to 0 to 10), negated if it is signed and `negative` is
    set.

    It is rounded to six decimals, so that records are short and do not depend on the last bit of the platform's log
    function.
    """
    level = max(0.0, min(magnitude, MAGNITUDE_MAX)) / MAGNITUDE_MAX
    argument = OPERATIONS[name].resolve(level, -1 if negative else 1)
    return round(float(argument), 6) + 0.0  # + 0.0 turns -0.0 into 0.0


def check_operation(name: object, argument: object) -> tuple[str, float]:
    """Return the operation if it is one of the fifteen and its argument is in range; otherwise, raise `UserError`."""
    if not isinstance(name, str) or name not in OPERATIONS:
        raise UserError(
            "a view record contains an unknown operation",
            got=repr(name),
            expected=f"one of {closest_names(str(name), OPERATIONS)}",
            fix=RECORD_FIX,
        )
    operation = OPERATIONS[name]
    number = argument if isinstance(argument, int | float) and not isinstance(argument, bool) else float("nan")
    inside = operation.low <= number <= operation.high  # False for NaN
    if not inside or (operation.whole and number != int(number)):
        kind = "a whole number" if operation.whole else "a number"
        raise UserError(
            f"a view record contains an out-of-range argument for operation {name}",
            got=repr(argument),
            expected=f"{kind} from {operation.low} to {operation.high}",
            fix=RECORD_FIX,
        )
    return name, float(number)


def apply_operation(name: str, argument: float, image: Image.Image, resample: Image.Resampling) -> Image.Image:
    """Apply operation `name` to an RGB image; `resample` is the filter for rotation, shear and translation."""
    return OPERATIONS[name].apply(image, argument, resample)
