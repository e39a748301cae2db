"""The quality of an embedding: k-NN and linear-probe accuracy, and how well two embeddings agree on neighbors.

In: a function from uint8 pixels to embeddings, or embeddings with labels. Out: accuracies in percent, shares.
Invariant: similarity is the cosine; no result depends on the order of the images, except among exact ties.
Similarities are computed in blocks, so that memory does not grow with the square of the number of images.
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
"""Similarities computed at a time."""
TEMPERATURE = 0.07
"""Of the votes, as in DINO's evaluation: a neighbor with cosine c votes with weight exp(c / temperature)."""
MAX_ITERATIONS = 1000
"""Of the optimizer of the linear probe."""


class Embeddings(NamedTuple):
    """Embeddings of the readable images of a data set, on the CPU."""

    features: Tensor
    """(N, C) float32."""
    labels: Tensor
    """(N,) int64."""


def pooled_embedding(model: nn.Module, images: Tensor) -> Tensor:
    """The input of a timm model's classifier, (B, C), as timm pools it; where it does not, the mean over positions.

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
    """The embeddings of the readable images of a data set, in its canonical order.

    Args:
        predict: (B, 3, size, size) uint8 on `device` -> embeddings (B, C).
        source: the images.
        size: side of the center view, pixels.
        device: where `predict` runs.
        indices: images to embed (None: all).
        batch_size: maximum number of images per call of `predict`.
        workers: processes that decode images.
        title: title of the progress bar.
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
    """Accuracy of a weighted vote of the nearest training images, percent.

    Args:
        train: (N, C), any float dtype.
        train_labels: (N,) int64, at least 0.
        test: (M, C).
        test_labels: (M,) int64.
        neighbors: voting images; all if there are fewer.
    """
    return _vote((block for _, block in _cosines(test, train)), train_labels, test_labels, neighbors)


@torch.no_grad()
def leave_one_out_knn(features: Tensor, labels: Tensor, *, neighbors: int = 20) -> float:
    """k-NN accuracy of every image against all others, percent; arguments as those of `knn_accuracy`."""
    assert len(features) > 1, "one image has no neighbors"
    return _vote(_cosines_of_others(features), labels, labels, min(neighbors, len(features) - 1))


def linear_probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of logistic regression on standardized embeddings, percent.

    scikit-learn's LogisticRegression with its default L2 penalty; mean and standard deviation are those of `train`.
    Arguments as those of `knn_accuracy`.

    Raises:
        UserError: an embedding is NaN or Inf.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not (train.isfinite().all() and test.isfinite().all()):
        raise UserError("the embeddings are NaN or Inf", fix="check the weights and the normalization of the model")
    given, wanted = train_labels.cpu().numpy(), test_labels.cpu()
    if len(set(given.tolist())) < 2:  # LogisticRegression needs two classes
        return _percent(wanted == int(given[0]))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    # In float64, the optimizer stops at the same solution in any order of the images.
    probe.fit(train.double().cpu().numpy(), given)
    return _percent(torch.from_numpy(probe.predict(test.double().cpu().numpy())) == wanted)


@torch.no_grad()
def retrieval_agreement(student: Tensor, teacher: Tensor, *, neighbors: int = 10) -> float:
    """Mean share (0 to 1) of an image's nearest neighbors in one embedding that are also nearest in the other.

    Args:
        student: (N, Cs), any float dtype.
        teacher: (N, Ct), of the same images.
        neighbors: nearest neighbors of each image, itself excluded; all others if there are fewer.

    Returns:
        NaN for fewer than two images: there are no neighbors. Two unrelated embeddings give about neighbors / (N - 1).
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
    """Position of the first query of each block, and its cosines with all of `bank`, (B, N) float32."""
    rows = max(1, BLOCK // max(1, len(bank)))
    known = F.normalize(bank.float(), dim=1)
    for start in range(0, len(queries), rows):
        yield start, F.normalize(queries[start : start + rows].float(), dim=1) @ known.T


def _cosines_of_others(features: Tensor) -> Iterator[Tensor]:
    """Blocks of cosines of each image with all images; with itself it is minus infinity."""
    for start, block in _cosines(features, features):
        rows = torch.arange(len(block), device=block.device)
        block[rows, start + rows] = -torch.inf
        yield block


def _vote(blocks: Iterator[Tensor], labels: Tensor, wanted: Tensor, neighbors: int) -> float:
    """Percent of images whose nearest neighbors vote for the wanted label; blocks of cosines (B, N), labels (N,)."""
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
    """The share of hits, percent."""
    return 100 * float(hits.double().mean())
