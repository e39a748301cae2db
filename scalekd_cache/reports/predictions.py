"""Predictions on validation images by a run's student and its teacher.

In: a run folder, and validation images. Out: `Predictions` for each classifier.
Invariant: all classifiers get the same images; an image that cannot be decoded is skipped for all of them.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalekd_cache.config.places import cache_places
from scalekd_cache.convert.timm_export import WEIGHTS, load_export
from scalekd_cache.data.base import Source, key_text, sample_indices
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import ValidationImages
from scalekd_cache.models.normalize import resize
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.weights import weights_available
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.training.run_evaluation import make_predictor
from scalekd_cache.training.run_files import read_config, student_options

BATCH = 32
REPEATS = 5
"""Number of timed forward passes; the median speed is reported."""
Predict = Callable[[Tensor], Tensor]


class Images(NamedTuple):
    """The validation images that can be decoded."""

    dataset: ValidationImages
    indices: list[int]
    labels: NDArray[np.int64]
    unreadable: int
    """Number of images that could not be decoded."""

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """Uint8 pixels (size, size, 3) of image `row`."""
        example = self.dataset[self.indices[row]]
        assert example is not None
        return example[0].permute(1, 2, 0).numpy()

    def key(self, row: int) -> str:
        """Sample key of image `row`, as text."""
        return key_text(self.dataset.source.samples[self.indices[row]].key)


class Predictions(NamedTuple):
    """The predicted class of every image."""

    classes: NDArray[np.int64]
    percent: NDArray[np.float64]
    """Probability of the predicted class in percent."""

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """Top-1 accuracy in percent."""
        return 100 * float((self.classes == labels).mean())


def validation_images(source: Source, size: int, count: int) -> Images:
    """At most `count` images, evenly spaced over the dataset."""
    dataset = ValidationImages(source, size)
    indices, labels = list[int](), list[int]()
    chosen = sample_indices(len(dataset), count)
    for index in chosen:
        example = dataset[index]
        if example is not None:
            indices.append(index)
            labels.append(example[1])
    return Images(dataset, indices, np.asarray(labels, dtype=np.int64), len(chosen) - len(indices))


def predict_images(predict: Predict, images: Images, device: torch.device) -> Predictions:
    """Run a classifier on the images."""
    rows = []
    for start in range(0, len(images.indices), BATCH):
        batch = [images.dataset[index] for index in images.indices[start : start + BATCH]]
        pixels = torch.stack([example[0] for example in batch if example is not None])
        with torch.no_grad():
            rows.append(predict(pixels.to(device)).float().softmax(1).cpu())
    probabilities = torch.cat(rows).double()
    best = probabilities.max(1)
    return Predictions(best.indices.numpy(), 100 * best.values.numpy())


class RunStudent(NamedTuple):
    """A run's loaded export."""

    predict: Predict
    parameters: int
    bytes: int
    """Size of the weights file."""
    images_per_s: float | None
    """Images per second for float32 forward passes on this device with batches of `BATCH` images (None: not timed)."""


def load_run_student(run: Path, size: int, process: Process, *, timed: bool) -> RunStudent | None:
    """Load the exported student; None if the run has not exported one yet.

    Raises:
        UserError: the export is damaged.
    """
    folder = run / "export"
    if not os.path.lexists(folder):
        return None
    options = student_options(run)
    model = load_export(folder, size).to(process.device)
    predict = make_predictor(model, options.mean, options.std)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    speed = _speed(predict, size, process.device) if timed else None
    return RunStudent(predict, parameters, (folder / WEIGHTS).stat().st_size, speed)


def _speed(predict: Predict, size: int, device: torch.device) -> float:
    images = torch.zeros(BATCH, 3, size, size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        with torch.no_grad():
            predict(images)[0, 0].item()  # synchronize with the device
        seconds.append(time.perf_counter() - started)
    return BATCH / float(np.median(seconds[1:]))


def load_run_teacher(run: Path, weights: str | None, process: Process) -> Predict:
    """Load the teacher from a run's (first) cache. Images of another size than the teacher's are resized.

    Raises:
        UserError: the cache or the weights are unavailable, or the weights belong to a different teacher.
    """
    manifest = read_manifest(open_place(cache_places(str(read_config(run).get("cache")))[0]))
    config = cache_teacher_config(
        manifest.facts.teacher["config"], weights, manifest.facts.fingerprint_fields["precision"]
    )
    if not manifest.facts.teacher["spec"]["has_classifier"]:
        name = manifest.facts.teacher["spec"]["name"]
        raise UserError("the teacher has no classifier", got=name, fix="omit --teacher-weights")
    if not weights_available(config):
        raise UserError(
            "the teacher's weights are not available",
            where=config.weights,
            fix="set --teacher-weights to the weights file",
        )
    teacher = load_cache_teacher(manifest, config, process.device)
    size = teacher.spec.image_size
    return lambda images: teacher(resize(images.float(), size).round().to(torch.uint8)).logits


def confusion(labels: Sequence[int] | NDArray[np.int64], predictions: Predictions, classes: int) -> NDArray[np.int64]:
    """Confusion matrix (classes, classes) of counts, with labels as rows and predictions as columns."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    inside = predictions.classes < classes
    np.add.at(counts, (np.asarray(labels)[inside], predictions.classes[inside]), 1)
    return counts
