"""Measures embeddings: k-NN and linear-probe accuracy, and how well two embeddings agree on nearest neighbors.

In: a function from uint8 pixels to embeddings, or embeddings with labels. Out: accuracies in percent, and agreement
from 0 to 1.
Invariant: similarity is cosine similarity, and results do not depend on the image order, except for exact ties.
Similarities are computed in blocks, so that memory does not grow quadratically with the number of images.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalekd_cache.data.base import Source
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import center_views
from scalekd_cache.progress import progress

BLOCK = 1 << 24
"""Maximum number of similarities computed at a time."""
TEMPERATURE = 0.07
"""Voting temperature, as in DINO's evaluation: a neighbor with cosine c has weight exp(c / temperature)."""
MAX_ITERATIONS = 1000
"""Maximum number of optimizer iterations for the linear probe."""


class Embeddings(NamedTuple):
    """Embeddings of a dataset's readable images, on the CPU."""

    features: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N,) int64."""


def pooled_embedding(model: nn.Module, images: Tensor) -> Tensor:
    """The pooled input (B, C) to a timm model's classifier; the mean over positions if timm does not pool.

    Args:
        model: the timm model.
        images: (B, 3, H, W), normalized.
    """
    timm_model: Any = model
    pooled: Tensor = timm_model.forward_head(timm_model.forward_features(images), pre_logits=True)
    if pooled.ndim == 4:
        positions = (1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else (2, 3)
        return pooled.mean(positions)
    return pooled.mean(1) if pooled.ndim == 3 else pooled


@torch.no_grad()
def embed(
    predict: Callable[[Tensor], Tensor],
    source: Source,
    size: int,
    device: torch.device,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    title: str = "embed",
) -> Embeddings:
    """Compute embeddings of a dataset's readable images in canonical order.

    Args:
        predict: (B, 3, size, size) uint8 on `device` -> embeddings (B, C).
        source: the images.
        size: center view size in pixels.
        device: the device that `predict` runs on.
        indices: indices of the images to embed (None: all).
        batch_size: maximum number of images per call to `predict`.
        workers: number of processes that decode images.
        title: progress bar title.
    """
    chosen = range(len(source.samples)) if indices is None else indices
    features, labels = [], [torch.empty(0, dtype=torch.int64)]
    with progress(title, len(chosen), "image") as bar:
        for batch in center_views(source, chosen, size, batch_size=batch_size, workers=workers):
            if len(batch.labels):
                features.append(predict(batch.images.to(device)).flatten(1).float().cpu())
                labels.append(batch.labels)
            bar.update(len(batch.labels) + batch.unreadable)
    return Embeddings(torch.cat(features) if features else torch.empty(0, 0), torch.cat(labels))


@torch.no_grad()
def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, neighbors: int = 20
) -> float:
    """Accuracy of a weighted vote among the nearest training images, in percent.

    Args:
        train: (N, C), any float dtype.
        train_labels: (N,) non-negative int64.
        test: (M, C).
        test_labels: (M,) int64.
        neighbors: number of images that vote; all training images if there are fewer.
    """
    return _vote((block for _, block in _cosines(test, train)), train_labels, test_labels, neighbors)


@torch.no_grad()
def leave_one_out_knn(features: Tensor, labels: Tensor, *, neighbors: int = 20) -> float:
    """Leave-one-out k-NN accuracy in percent. The arguments are as in `knn_accuracy`."""
    assert len(features) > 1, "one image has no neighbors"
    return _vote(_cosines_of_others(features), labels, labels, min(neighbors, len(features) - 1))


def linear_probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of logistic regression on standardized embeddings, in percent.

    The classifier is scikit-learn's LogisticRegression with its default L2 penalty. Embeddings are standardized with
    the mean and standard deviation of `train`. The arguments are as in `knn_accuracy`.

    Raises:
        UserError: an embedding contains NaN or Inf.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("the embeddings contain NaN or Inf", fix="check the model's weights and normalization")
    given, wanted = train_labels.cpu().numpy(), test_labels.cpu()
    if len(set(given.tolist())) < 2:  # LogisticRegression needs two classes
        return _percent(wanted == int(given[0]))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    # In float64, the optimizer reaches the same solution for any order of the images.
    probe.fit(train.double().cpu().numpy(), given)
    return _percent(torch.from_numpy(probe.predict(test.double().cpu().numpy())) == wanted)


@torch.no_grad()
def retrieval_agreement(student: Tensor, teacher: Tensor, *, neighbors: int = 10) -> float:
    """Mean fraction (0 to 1) of an image's nearest neighbors that two embeddings share.

    Args:
        student: (N, Cs), any float dtype.
        teacher: (N, Ct), for the same images.
        neighbors: number of nearest neighbors per image, excluding the image itself; all others if there are fewer.

    Returns:
        The fraction, or NaN for fewer than two images. Unrelated embeddings give about neighbors / (N - 1).
    """
    assert len(student) == len(teacher), (student.shape, teacher.shape)
    count = min(neighbors, len(student) - 1)
    if count < 1:
        return float("nan")
    shared = 0
    for mine, theirs in zip(_cosines_of_others(student), _cosines_of_others(teacher), strict=True):
        near = torch.zeros(mine.shape, dtype=torch.bool).scatter_(1, mine.topk(count, dim=1).indices.cpu(), True)
        shared += int(near.gather(1, theirs.topk(count, dim=1).indices.cpu()).sum())
    return shared / (count * len(student))


def _cosines(queries: Tensor, bank: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each block's first query, and the block's cosines with all of `bank`, (B, N) float32."""
    rows = max(1, BLOCK // max(1, len(bank)))
    known = F.normalize(bank.float(), dim=1)
    for start in range(0, len(queries), rows):
        yield start, F.normalize(queries[start : start + rows].float(), dim=1) @ known.T


def _cosines_of_others(features: Tensor) -> Iterator[Tensor]:
    """Yield blocks of cosines between each image and all images, with minus infinity on the diagonal."""
    for start, block in _cosines(features, features):
        rows = torch.arange(len(block), device=block.device)
        block[rows, start + rows] = -torch.inf
        yield block


def _vote(blocks: Iterator[Tensor], labels: Tensor, wanted: Tensor, neighbors: int) -> float:
    """Percentage of images whose neighbors vote for the correct label; `blocks`: cosines (B, N), `labels`: (N,)."""
    classes, votes_for = torch.unique(labels, return_inverse=True)
    found = []
    for cosines in blocks:
        near = cosines.topk(min(neighbors, len(labels)), dim=1)
        weights = (near.values / TEMPERATURE).exp()
        ballot = weights.new_zeros(len(cosines), len(classes))
        ballot.scatter_add_(1, votes_for.to(cosines.device)[near.indices], weights)
        found.append(ballot.argmax(1).cpu())
    return _percent(classes.cpu()[torch.cat(found)] == wanted.cpu())


def _percent(hits: Tensor) -> float:
    """The percentage of hits."""
    return 100 * float(hits.double().mean())
