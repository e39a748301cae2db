"""Evaluates a classifier (teacher or student) on validation images.

In: a function from uint8 pixels to logits, a validation source and this rank's share. Out: a `Tally`.
Invariant: every readable validation image counts exactly once, regardless of the number of ranks. Images
that cannot be decoded are counted as unreadable.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage, decode_image, image_digest
from scalekd_cache.data.workers import bytes_per_worker, load_items
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.teacher_spec import teacher_label
from scalekd_cache.progress import progress
from scalekd_cache.views.view import eval_view

Example = tuple[Tensor, int, int] | None


def percent(value: float | None) -> str:
    """Format an accuracy given in percent."""
    return "not measured" if value is None else f"{value:.2f}%"


def teacher_accuracy(teacher: Mapping[str, Any], *, labeled: bool = True) -> str:
    """A teacher's accuracy as text, from its manifest entry."""
    if not teacher["spec"]["has_classifier"]:
        return "features only (no classifier)"
    if not labeled:
        return "features and soft labels"
    return f"top-1 {percent(teacher['top1'])}"


def describe_teacher(teacher: Mapping[str, Any], *, labeled: bool = True) -> str:
    """A teacher's name and accuracy as text, from its manifest entry."""
    return f"{teacher_label(teacher)}, {teacher_accuracy(teacher, labeled=labeled)}"


def has_top5(classes: int) -> bool:
    """Whether top-5 accuracy is informative: with at most five classes, it is always 100%."""
    return classes > 5


class Tally(NamedTuple):
    """Counts over validation images. Tallies of disjoint shares can be added."""

    top1: int
    """Number of images whose label has the largest logit."""
    top5: int | None
    """Number of images whose label has one of the five largest logits; None with at most five classes."""
    images: int
    """Number of evaluated images."""
    unreadable: int
    """Images that could not be decoded."""

    def plus(self, other: "Tally") -> "Tally":
        """The sum of two tallies."""
        top5 = None if self.top5 is None or other.top5 is None else self.top5 + other.top5
        return Tally(self.top1 + other.top1, top5, self.images + other.images, self.unreadable + other.unreadable)

    @property
    def accuracies(self) -> str:
        """Top-1 accuracy as text, and top-5 accuracy if available."""
        top5 = self.top5_percent
        return f"top-1 {percent(self.top1_percent)}" + ("" if top5 is None else f", top-5 {percent(top5)}")

    @property
    def top1_percent(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.top1 / max(self.images, 1)

    @property
    def top5_percent(self) -> float | None:
        """Top-5 accuracy in percent; None with at most five classes."""
        return None if self.top5 is None else 100 * self.top5 / max(self.images, 1)


def omitted(unreadable: int, what: str = "validation image", first: str | None = None) -> str:
    """A note about the number of images that could not be decoded, with the key of the first one if it is known."""
    return f"omitted {counted(unreadable, what)} that could not be read" + (f" (the first: {first})" if first else "")


class ValidationImages(Dataset[Example]):
    """Center views (3, size, size) uint8 with label and image digest; None for an image that cannot be decoded."""

    def __init__(self, source: Source, size: int) -> None:
        self.source = source
        self.size = size

    def __len__(self) -> int:
        return len(self.source.samples)

    def __getitem__(self, index: int) -> Example:
        sample = self.source.samples[index]
        try:
            data = self.source.read(index)
            image = decode_image(data, sample.key)
        except UnreadableImage:
            return None
        digest = int.from_bytes(bytes.fromhex(image_digest(data)), "big", signed=True)
        return torch.from_numpy(eval_view(image, self.size)).permute(2, 0, 1), sample.label, digest


class CenterViews(NamedTuple):
    """Center views of the readable images in a batch."""

    images: Tensor
    """(B, 3, size, size) uint8"""
    labels: Tensor
    """(B,) int64"""
    digests: Tensor
    """(B,) int64: digests of the image files."""
    indices: list[int]
    """Indices of these images in the source."""
    skipped: list[int]
    """Indices of the images that could not be decoded."""

    @property
    def unreadable(self) -> int:
        """Number of images that could not be decoded."""
        return len(self.skipped)


class _Batches(Dataset[CenterViews]):
    """Loads the center views of multiple images at a time."""

    def __init__(self, images: ValidationImages) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> CenterViews:
        found = {index: example for index in indices if (example := self.images[index]) is not None}
        size = self.images.size
        views = torch.stack([view for view, *_ in found.values()]) if found else torch.empty(0, 3, size, size).byte()
        numbers = torch.tensor([rest for _, *rest in found.values()], dtype=torch.int64).view(-1, 2)
        skipped = [index for index in indices if index not in found]
        return CenterViews(views, numbers[:, 0], numbers[:, 1], list(found), skipped)


def center_views(
    source: Source, indices: Sequence[int], size: int, *, batch_size: int = 64, workers: int = 0
) -> Iterator[CenterViews]:
    """Yield center views of selected images in order, at most `batch_size` at a time.

    Args:
        source: the images.
        indices: indices of the selected images in the source.
        size: view size in pixels.
        batch_size: maximum number of images at a time.
        workers: number of processes that decode images.
    """
    if workers:  # a full batch per worker if two fit into shared memory, otherwise part of a batch
        batch_size = max(1, min(batch_size, bytes_per_worker(workers) // (2 * 3 * size**2)))
    yield from load_items(
        _Batches(ValidationImages(source, size)),
        (indices[start : start + batch_size] for start in range(0, len(indices), batch_size)),
        workers=workers,
        item_bytes=batch_size * 3 * size**2,
        max_prefetch=2,
    )


def tally(logits: Tensor, labels: Tensor) -> Tally:
    """Count correct predictions: `logits` (B, K) of any float dtype, `labels` (B,) int64.

    Raises:
        UserError: a logit is NaN, so there is no best class.
    """
    if bool(logits.isnan().any()):
        raise UserError(
            "the model's logits contain NaN, so its accuracy cannot be computed",
            fix="use weights from before training diverged, or restore the weights file",
        )
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    top5 = int(hits.any(1).sum()) if has_top5(logits.shape[1]) else None
    return Tally(int(hits[:, 0].sum()), top5, len(labels), 0)


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    title: str = "evaluate",
    on_batch: Callable[[Tensor, Tensor], None] | None = None,
    on_unreadable: Callable[[list[int]], None] = lambda indices: None,
    stop: Callable[[], bool] = lambda: False,
) -> Tally:
    """Evaluate `predict` on the validation images with indices rank, rank + world_size, ...

    Args:
        predict: (B, 3, size, size) uint8 on `device` -> logits (B, K).
        source: the validation split.
        size: center view size in pixels.
        device: the device that `predict` runs on.
        rank: this process's rank.
        world_size: number of processes that share the work; the caller adds up their tallies.
        batch_size: maximum number of images per call to `predict`.
        workers: number of processes that decode images.
        title: progress bar title.
        on_batch: called with the logits (B, K) and labels (B,) of every batch.
        on_unreadable: called for every batch with the indices of the images that could not be decoded.
        stop: called after every batch; if it returns true, evaluation stops and returns the tally so far.
    """
    share = range(rank, len(source.samples), world_size)
    total = Tally(0, 0, 0, 0)
    with progress(title, len(share), "image", rank=rank, leave=False) as bar:
        for images, labels, _, _, skipped in center_views(source, share, size, batch_size=batch_size, workers=workers):
            total = total.plus(Tally(0, 0, 0, len(skipped)))
            on_unreadable(skipped)
            if len(images):
                logits = predict(images.to(device)).float()
                total = total.plus(tally(logits, labels.to(device)))
                if on_batch is not None:
                    on_batch(logits, labels)
            bar.update(len(labels) + len(skipped))
            if stop():
                break
    return total
