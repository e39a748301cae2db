"""A tiny cache of digits without labels, made in-process, next to a val/ with class folders."""

import functools
import tempfile
from pathlib import Path

from image_files import encoded, write
from PIL import Image
from sklearn.datasets import load_digits
from small_cache import make, write_weights

from scalekd_cache.store.reader import Cache

TRAIN, VAL = 64, 60
NO_HEAD = {"num_classes": 0}


def write_pictures(root: Path) -> Path:
    """`TRAIN` digits in root/train/, `VAL` in root/val/<class>/."""
    digits = load_digits()
    for number in range(TRAIN + VAL):
        label, name = digits.target[number], f"{number}.png"
        place = root / "train" / name if number < TRAIN else root / "val" / str(label) / name
        write(place, encoded(Image.fromarray((digits.images[number] * 15.9).astype("uint8")).resize((32, 32))))
    return root


@functools.cache
def _pristine(classes: int) -> tuple[object, Path]:
    holder = tempfile.TemporaryDirectory(prefix="unlabeled-cache-")
    folder = Path(holder.name)
    data = {"source": str(write_pictures(folder / "data")), "max_samples": None}
    weights = write_weights(folder / "teacher.safetensors")
    teacher = {} if classes else NO_HEAD
    make(folder / "cache", weights, data=data, teacher=teacher)
    return holder, folder


def unlabeled_cache(classes: int = 0) -> Cache:
    """A finished cache that tests must not change; its teacher has a classifier for `classes`, 0 or 10."""
    return Cache.open(_pristine(classes)[1] / "cache")


def unlabeled_pictures(classes: int = 0) -> Path:
    """The images of `unlabeled_cache`."""
    return _pristine(classes)[1] / "data"


def unlabeled_weights(classes: int = 0) -> Path:
    """The weights of its teacher."""
    return _pristine(classes)[1] / "teacher.safetensors"
