"""Writes a folder of ImageNet-sized photographs for the benchmarks, without a download.

In: a folder. Out: class folders under train/ and val/ with 500x375 JPEG files. Each is a random crop of one of
scikit-learn's two sample photographs (427x640), so the content is realistic but varies little.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)


def write_photographs(folder: Path, count: int, *, classes: int = 2, validation: int = 8, seed: int = 0) -> Path:
    """Write `count` training images and a few validation images; returns `folder`."""
    from sklearn.datasets import load_sample_images  # the GPU smoke run imports this module without scikit-learn

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    rng = np.random.default_rng(seed)
    for number in range(count + validation):
        picture, label = pictures[number % 2], number % classes
        scale = rng.uniform(0.5, 1.0)
        width, height = int(picture.width * scale), int(min(picture.height, picture.width * 0.75) * scale)
        left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
        crop = picture.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        file = folder / ("train" if number < count else "val") / f"class{label}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        crop.save(file, quality=90)
    return folder
