"""Built-in datasets: the bundled demo digits, plus cifar10 and imagenette, which torchvision downloads.

In: `DataConfig` and a split. Out: a `ListedSource`; images stored as arrays are returned as PNG bytes.
Invariant: the train and val splits are disjoint and the same on every machine.
"""

import http.client
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from scalekd_cache.config.places import home_path
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data.base import ListedSource, SampleList, Split, canonical_order, hash_order
from scalekd_cache.data.folder import LAYOUT, open_folder
from scalekd_cache.errors import UserError
from scalekd_cache.store.locks import lock, open_lock

BUILTIN = ("demo", "cifar10", "imagenette")
DEMO_SIZE = 64
"""Side length of a demo image in pixels."""
DEMO_VAL_SHARE = 0.2
IMAGENETTE_FOLDER = "imagenette2-320"
DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException, tarfile.TarError)
Pixels = npt.NDArray[np.uint8]


class NotDownloadedError(UserError):
    """The dataset would have to be downloaded first."""


def open_builtin(name: str, config: DataConfig, split: Split, *, download: bool) -> ListedSource:
    """Open demo, cifar10 or imagenette; the last two are downloaded into `config.download_dir` if missing.

    Raises:
        NotDownloadedError: the dataset is missing and `download` is false. Nothing was written.
    """
    folder = home_path(config.download_dir)
    if name == "demo":
        return _open_demo(split)
    return (_open_cifar10 if name == "cifar10" else _open_imagenette)(folder, split, download)


class DigitReader:
    """Returns 8x8 digits, (N, 8, 8) uint8 in 0..16, as RGB PNG files of `DEMO_SIZE` x `DEMO_SIZE` pixels."""

    def __init__(self, digits: Pixels) -> None:
        self._digits = digits

    def __call__(self, index: int) -> bytes:
        """PNG bytes of digit `index`."""
        gray = np.round(self._digits[index] * (255 / 16)).astype(np.uint8)
        large = Image.fromarray(gray).resize((DEMO_SIZE, DEMO_SIZE), Image.Resampling.BICUBIC)
        return _png(large.convert("RGB"))


def _open_demo(split: Split) -> ListedSource:
    """scikit-learn's 1,797 handwritten digits; about a fifth of each class is in val."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    keys = [f"digits/{index:04d}" for index in range(len(labels))]
    chosen: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[hash_order([keys[index] for index in members], b"scalekd-cache demo split")]
        val_count = round(len(members) * DEMO_VAL_SHARE)
        chosen += members[:val_count].tolist() if split == "val" else members[val_count:].tolist()
    order = [chosen[position] for position in canonical_order([keys[index] for index in chosen])]
    return ListedSource(
        name="demo",
        class_names=tuple(str(label) for label in range(10)),
        samples=SampleList((keys[index] for index in order), [int(labels[index]) for index in order]),
        reader=DigitReader(images[order].reshape(-1, 8, 8).astype(np.uint8)),
    )


class Cifar10Reader:
    """Returns CIFAR-10 images as PNG files. Forked workers share the array; spawned workers load it on first use."""

    def __init__(self, folder: Path, split: Split, images: Pixels, order: npt.NDArray[np.int64]) -> None:
        self._folder = folder
        self._split: Split = split
        self._images: Pixels | None = images
        self._order = order

    def __call__(self, index: int) -> bytes:
        """PNG bytes of image `index`, 32x32."""
        if self._images is None:
            self._images = _load_cifar10(self._folder, self._split, download=False).data
        return _png(Image.fromarray(self._images[self._order[index]]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}


def _open_cifar10(folder: Path, split: Split, download: bool) -> ListedSource:
    with _explained("cifar10", folder):
        try:
            data = _load_cifar10(folder, split, download=False)
        except RuntimeError:  # torchvision: not found or corrupted
            with _download("cifar10", folder, download):
                data = _load_cifar10(folder, split, download=True)
    keys = [f"cifar10/{index:05d}" for index in range(len(data.targets))]
    order = canonical_order(keys)
    return ListedSource(
        name="cifar10",
        class_names=tuple(data.classes),
        samples=SampleList((keys[index] for index in order), [int(data.targets[index]) for index in order]),
        reader=Cifar10Reader(folder, split, data.data, order),
    )


def _load_cifar10(folder: Path, split: Split, *, download: bool) -> Any:
    """Load torchvision's dataset with .data (N, 32, 32, 3) uint8, .targets and .classes, after checking MD5 sums."""
    return _torchvision_datasets().CIFAR10(str(folder), train=split == "train", download=download)


def _open_imagenette(folder: Path, split: Split, download: bool) -> ListedSource:
    """Open imagenette2-320 (shorter side 320 pixels). It is unpacked into a temporary folder, which is then renamed."""
    final = folder / IMAGENETTE_FOLDER
    if not final.is_dir():
        with _explained("imagenette", folder), _download("imagenette", folder, download):
            if not final.is_dir():  # another process may have downloaded it in the meantime
                temporary = tempfile.mkdtemp(prefix=".tmp-imagenette-", dir=folder)
                try:
                    _torchvision_datasets().Imagenette(temporary, split="train", size="320px", download=True)
                    os.rename(Path(temporary) / IMAGENETTE_FOLDER, final)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    return open_folder("imagenette", final, split, devkit=None)


@contextmanager
def _download(name: str, folder: Path, allowed: bool) -> Iterator[None]:
    """Hold a lock so that only one process downloads at a time."""
    if not allowed:
        raise NotDownloadedError(f"{name} is not in {folder} yet", fix="run the command without --dry-run")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    with open_lock(path) as file:
        lock(file, path)
        yield


@contextmanager
def _explained(name: str, folder: Path) -> Iterator[None]:
    """Turn download errors into a `UserError` that explains the alternatives."""
    try:
        yield
    except DOWNLOAD_ERRORS as error:
        raise UserError(
            f"{name} could not be downloaded or unpacked",
            got=f"{type(error).__name__}: {error}",
            expected="a network connection and free disk space, or an existing copy of the dataset",
            where=folder.absolute(),
            fix=f"rerun, or get the images another way and set data.source to a folder with {LAYOUT}; "
            "data.source=demo needs no network",
        ) from error


def _torchvision_datasets() -> Any:
    import torchvision.datasets

    return torchvision.datasets


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
