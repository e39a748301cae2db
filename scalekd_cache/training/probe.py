"""Measures a backbone's k-NN and linear-probe accuracy, with random weights and raw pixels as baselines.

In: a backbone and a labeled dataset. Out: accuracies in percent.
Invariant: all three embeddings use the same readable images, and no image is in both the training and the test set.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scalekd_cache.config.downstream import ProbeConfig
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.convert.backbone import Backbone, open_backbone
from scalekd_cache.data.base import IntArray, NoSplitError, Source, hash_order
from scalekd_cache.data.source import open_source
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.normalize import Normalize, resize
from scalekd_cache.models.probing import embed, knn_accuracy, linear_probe_accuracy, pooled_embedding

PIXEL_SIDE = 16
"""Image size for the pixel baseline."""
HELD_OUT_SHARE = 0.2
"""Fraction of the images used for testing if only one split has labels."""
EMBEDDINGS = {"backbone": "the backbone", "random_weights": "random weights",
              "pixels": f"pixels, {PIXEL_SIDE} x {PIXEL_SIDE}"}  # fmt: skip
"""The compared embeddings, keyed by their names in the results."""


class LabeledImages(NamedTuple):
    """A subset of a dataset's labeled images."""

    source: Source
    indices: IntArray
    """(N,) int64, in source order."""


def labeled_splits(data: DataConfig, use: Callable[[str], object] = print) -> tuple[LabeledImages, LabeledImages]:
    """Training and test images: train and val or, if only one split has labels, two parts of it chosen by a key hash.

    Args:
        data: the dataset.
        use: called with a line of output about a missing split.

    Raises:
        UserError: no split has labels, or the only labeled one has fewer than two images.
    """
    train = open_source(data, "train")
    try:
        val = open_source(data, "val")
    except NoSplitError as error:
        use(f"no validation images ({str(error).splitlines()[0]})")
        val = None
    labeled = [source for source in (train, val) if source is not None and source.class_names]
    if not labeled:
        raise UserError(
            "this dataset has no labels", where=data.source, expected="images in train/<class>/, val/<class>/ or both"
        )
    if len(labeled) == 2:
        first, second = (LabeledImages(source, np.arange(len(source.samples))) for source in labeled)
        return first, second
    source = labeled[0]
    total = len(source.samples)
    if total < 2:
        raise UserError("the dataset has too few labeled images", got=total, expected="at least 2", where=data.source)
    order = hash_order((sample.key for sample in source.samples), b"scalekd-cache probe")
    count = max(1, round(HELD_OUT_SHARE * total))
    use(f"only one split has labels: using {total - count:,} of its images for training and {count:,} for testing")
    return LabeledImages(source, np.sort(order[count:])), LabeledImages(source, np.sort(order[:count]))


def probe(config: ProbeConfig, device: torch.device, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure a backbone's pooled embeddings, the same with random weights, and raw pixels.

    Args:
        config: the options.
        device: where the backbone runs.
        say: called with each line of output.

    Returns:
        Names and counts and, for each of `EMBEDDINGS`, its width (`channels`) and the `knn` and `linear_probe` accuracy
        in percent.

    Raises:
        UserError: the backbone or dataset does not exist, there are no labels, or a split has no readable images.
    """
    backbone = open_backbone(config.backbone, config.weights, size=config.size, pretrained=True, option="--backbone")
    splits = labeled_splits(config.data, say)
    if len(splits[1].source.class_names) < 2:
        raise UserError("all images belong to one class", where=config.data.source, expected="at least 2 classes")
    compared = _Compared(backbone, device)
    training, testing = (
        embed(compared, split.source, backbone.image_size, device, indices=split.indices.tolist(),
              workers=config.workers, title=title)
        for split, title in zip(splits, ("embed training images", "embed validation images"), strict=True)
    )  # fmt: skip
    if not len(training.labels) or not len(testing.labels):
        which = "validation" if len(training.labels) else "training"
        raise UserError(
            f"none of the {which} images could be read", where=config.data.source, fix="check the dataset's image files"
        )
    rows: dict[str, Any] = {}
    parts = zip(*(torch.split(found.features, compared.widths, 1) for found in (training, testing)), strict=True)
    for name, (train, test) in zip(EMBEDDINGS, parts, strict=True):
        rows[name] = {
            "channels": train.shape[1],
            "knn": knn_accuracy(train, training.labels, test, testing.labels),
            "linear_probe": linear_probe_accuracy(train, training.labels, test, testing.labels),
        }
    return {
        "backbone": config.backbone,
        "model": backbone.name,
        "data": config.data.source,
        "image_size": backbone.image_size,
        "train_images": len(training.labels),
        "val_images": len(testing.labels),
        "unreadable": sum(len(split.indices) for split in splits) - len(training.labels) - len(testing.labels),
        "classes": len(splits[1].source.class_names),
        "results": rows,
    }


def probe_table(facts: dict[str, Any]) -> str:
    """Format the results of `probe` as a text table."""
    lines = [
        f"{facts['train_images']:,} training and {counted(facts['val_images'], 'validation image')} in "
        f"{counted(facts['classes'], 'class')}, {facts['image_size']} x {facts['image_size']} pixels"
        + (f"; {facts['unreadable']:,} could not be read" if facts["unreadable"] else ""),
        f"{'':<34} {'channels':>8} {'k-NN':>9} {'linear probe':>13}",
    ]
    for name, row in facts["results"].items():
        title = f"{facts['backbone']}" if name == "backbone" else EMBEDDINGS[name]
        lines.append(f"{title:<34} {row['channels']:>8,} {row['knn']:>7.2f}% {row['linear_probe']:>11.2f}%")
    return "\n".join(lines)


class _Compared:
    """Maps uint8 images to all `EMBEDDINGS`, concatenated, so that each image is decoded only once."""

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self._normalize = Normalize(backbone.mean, backbone.std).to(device)
        self._models = [model.to(device) for model in (backbone.model, backbone.with_random_weights(0))]
        self.widths: list[int] = []
        """Channels of each embedding, set by the first call."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, C), float32."""
        x = self._normalize(images)
        embeddings = [pooled_embedding(model, x).float() for model in self._models]
        embeddings.append(resize(images, PIXEL_SIDE).float().flatten(1) / 255)
        self.widths = [embedding.shape[1] for embedding in embeddings]
        return torch.cat(embeddings, 1)
