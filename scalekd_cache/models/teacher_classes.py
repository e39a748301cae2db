"""Checks from accuracy on labeled images that the teacher's outputs are in the dataset's class order.

In: the teacher's predictions and the labels. Out: nothing, or an error that names the matching order.
Invariant: an order is never evaluated on the images it was fitted to. A difference within chance is not an error.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalekd_cache.data.classes import ORDERS
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.evaluate import percent

IntArray = npt.NDArray[np.int64]
Hits = npt.NDArray[np.bool_]
LEAST_IMAGES = 100
"""Minimum number of images for deciding that a teacher is near chance."""
LEAST_GAIN = 0.02
"""Minimum accuracy gain from a different order, as a fraction of the images."""
UNLIKELY = 1e-3
MAX_FITTED = 4096
"""Maximum number of classes for which an order is fitted."""
CONTINUE_HINT = "to continue anyway: --teacher.check_classes=false"


class Answers:
    """The teacher's predictions on labeled images."""

    def __init__(self, teacher: str, class_names: Sequence[str]) -> None:
        """`teacher` is the teacher's name in messages; `class_names` are the dataset's."""
        self.teacher = teacher
        self.class_names = class_names
        self._pairs: list[IntArray] = []

    def __len__(self) -> int:
        return sum(pairs.shape[1] for pairs in self._pairs)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Keep the class with the largest logit for each image: `logits` (B, K), `labels` (B,)."""
        self._pairs.append(torch.stack([labels, logits.argmax(1).cpu()]).numpy())

    def check(self, pixels_from: str | None = None) -> None:
        """Raise `UserError` if the class order differs or accuracy is near chance (`check_class_order`)."""
        if self._pairs:
            labels, guesses = np.concatenate(self._pairs, 1)
            check_class_order(labels, guesses, self.class_names, self.teacher, pixels_from)


def check_class_order(
    labels: IntArray, guesses: IntArray, class_names: Sequence[str], teacher: str, pixels_from: str | None = None
) -> None:
    """Raise `UserError` if the teacher's classes are in a different order or its accuracy is near chance.

    Args:
        labels: (N,) int64.
        guesses: (N,) int64, the class with the largest logit for each image.
        class_names: the dataset's class names.
        teacher: the teacher's name in the message.
        pixels_from: the cache that stores the shared pixels and labels, and thus determines the class order.

    Raises:
        UserError: a different order gives much higher accuracy, or accuracy is near chance.
    """
    right = labels == guesses
    count, hits = len(labels), int(right.sum())
    if not count:
        return
    file = "FILE (one class name per line, in the order of the teacher's outputs)"
    here = f" when you rebuild {pixels_from} (its labels are shared too)" if pixels_from else ""
    for name, key in ORDERS.items():
        ordered = sorted(range(len(class_names)), key=lambda label: (key(class_names[label]), class_names[label]))
        there = np.array(ordered)[guesses] == labels
        if far_above(there, right):
            order, fix = f"the classes in {name} order", f"set --classes {name}{here}, or --classes {file}"
            raise _other_order(teacher, hits, int(there.sum()), count, order, fix)
    fitted = right_when_fitted(labels, guesses, len(class_names))
    if far_above(fitted, right):
        best = _assigned(labels, guesses, len(class_names))
        named = ", ".join(f"output {out} is {class_names[label]}" for out, label in best.items() if out != label)
        order = f"an order fitted to half of the images ({named:.100} ...)"
        raise _other_order(teacher, hits, int(fitted.sum()), count, order, f"set --classes {file}{here}")
    if near_chance(labels, guesses, len(class_names)):
        raise UserError(
            "the teacher's accuracy is near chance",
            got=f"top-1 {percent(100 * hits / count)} on {counted(count, 'labeled image')}",
            expected=f"a teacher trained on these {counted(len(class_names), 'class')}",
            where=teacher,
            fix=f"correct --teacher-weights, or set --classes {file}{here}; {CONTINUE_HINT}",
        )


def near_chance(labels: IntArray, guesses: IntArray, classes: int) -> bool:
    """Whether this accuracy is likely by chance and unlikely for a teacher halfway between chance and 100%."""
    from scipy.stats import binom  # not at the top: scipy.stats and scipy.optimize take a second to import

    count, hits = len(labels), int((labels == guesses).sum())
    shares = [np.bincount(values, minlength=classes) / max(count, 1) for values in (labels, guesses)]
    chance = float(shares[0] @ shares[1])
    by_chance = binom.sf(hits - 1, count, chance) > UNLIKELY
    return bool(count >= LEAST_IMAGES and by_chance and binom.cdf(hits, count, (1 + chance) / 2) < UNLIKELY)


def far_above(better: Hits, hits: Hits) -> bool:
    """Whether a different order is better by more than three standard deviations and at least `LEAST_GAIN`."""
    gain, differing = int(better.sum()) - int(hits.sum()), int((better != hits).sum())
    return gain > 3 * differing**0.5 and gain >= LEAST_GAIN * len(hits)


def right_when_fitted(labels: IntArray, guesses: IntArray, classes: int) -> Hits:
    """(N,) bool: whether each image is classified correctly with the order that is best for the other half."""
    right = np.zeros(len(labels), np.bool_)
    for half in (0, 1):
        mine = np.arange(len(labels)) % 2 == half
        order = np.full(classes, -1, np.int64)
        for out, label in _assigned(labels[mine], guesses[mine], classes).items():
            order[out] = label
        right[~mine] = order[guesses[~mine]] == labels[~mine]
    return right


def _assigned(labels: IntArray, guesses: IntArray, classes: int) -> dict[int, int]:
    """The best one-to-one assignment of the teacher's outputs to classes."""
    from scipy.optimize import linear_sum_assignment

    if classes > MAX_FITTED:
        return {}
    counts = np.zeros((classes, classes), np.int32)
    np.add.at(counts, (guesses, labels), 1)
    outputs, best = linear_sum_assignment(counts, maximize=True)
    return {out: label for out, label in zip(outputs.tolist(), best.tolist(), strict=True) if counts[out, label]}


def _other_order(teacher: str, hits: int, better: int, count: int, order: str, fix: str) -> UserError:
    return UserError(
        "the teacher's class order differs from the dataset's",
        got=f"top-1 {percent(100 * hits / count)} on {counted(count, 'labeled image')} with the dataset's class order",
        expected=f"{percent(100 * better / count)} with {order}",
        where=teacher,
        fix=f"{fix}; {CONTINUE_HINT}",
    )
