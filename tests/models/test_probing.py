"""k-NN, linear probe and common neighbors: loops and scikit-learn as references, any order of images."""

import math

import numpy as np
import pytest
import torch
from image_files import folder_tree, source_of, write
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from scalekd_cache.errors import UserError
from scalekd_cache.models import probing
from scalekd_cache.models.probing import (
    TEMPERATURE,
    embed,
    knn_accuracy,
    leave_one_out_knn,
    linear_probe_accuracy,
    retrieval_agreement,
)

CPU = torch.device("cpu")


def clusters(count, channels=6, classes=4, seed=0, spread=1.6):
    """Overlapping classes, so that no accuracy is 0 or 100%."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, channels, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centers[labels] + spread * torch.randn(count, channels, generator=generator), labels


def cosine(one, other):
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def votes_by_hand(features, labels, query, neighbors):
    near = sorted(((cosine(query, row), int(label)) for row, label in zip(features, labels, strict=True)), reverse=True)
    votes = {}
    for similarity, label in near[:neighbors]:
        votes[label] = votes.get(label, 0) + math.exp(similarity / TEMPERATURE)
    return max(votes, key=votes.__getitem__)


@pytest.fixture(params=[1 << 24, 50])
def blocks(request, monkeypatch):
    monkeypatch.setattr(probing, "BLOCK", request.param)


@pytest.mark.parametrize("neighbors", [1, 5, 20, 500])
def test_knn_is_the_weighted_vote(blocks, neighbors):
    train, labels = clusters(60)
    test, wanted = clusters(40, seed=1)
    labels, wanted = labels * 7 + 3, wanted * 7 + 3  # labels are names, not positions
    hits = [votes_by_hand(train, labels, row, neighbors) == int(label) for row, label in zip(test, wanted, strict=True)]
    accuracy = knn_accuracy(train, labels, test, wanted, neighbors=neighbors)
    assert accuracy == pytest.approx(100 * np.mean(hits))
    assert 20 < accuracy < 100
    others = [
        votes_by_hand(
            torch.cat([train[:n], train[n + 1 :]]), torch.cat([labels[:n], labels[n + 1 :]]), train[n], neighbors
        )
        for n in range(60)
    ]
    assert leave_one_out_knn(train, labels, neighbors=neighbors) == pytest.approx(
        100 * np.mean(np.array(others) == labels.numpy())
    )


@pytest.mark.parametrize("neighbors", [1, 7])
def test_knn_is_that_of_scikit_learn(blocks, neighbors):
    train, labels = clusters(80)
    test, wanted = clusters(50, seed=1)
    reference = KNeighborsClassifier(
        neighbors, metric="cosine", weights=lambda distances: np.exp((1 - distances) / TEMPERATURE)
    )
    expected = 100 * reference.fit(train.numpy(), labels.numpy()).score(test.numpy(), wanted.numpy())
    assert knn_accuracy(train, labels, test, wanted, neighbors=neighbors) == pytest.approx(expected)


def test_the_probe_is_logistic_regression_on_standardized_embeddings():
    train, labels = clusters(120)
    test, wanted = clusters(80, seed=1)
    train[:, 0] *= 1000  # undone by standardization
    test[:, 0] *= 1000
    train[:, 1] = test[:, 1] = 3  # a constant channel is harmless
    mean, std = train.double().mean(0), train.double().std(0, correction=0).clamp(min=1e-12)
    std[1] = 1
    reference = LogisticRegression(max_iter=5000).fit(((train - mean) / std).numpy(), labels.numpy())
    expected = 100 * reference.score(((test - mean) / std).numpy(), wanted.numpy())
    assert linear_probe_accuracy(train, labels, test, wanted) == pytest.approx(expected)
    assert 30 < expected < 100
    only = torch.full_like(labels, 2)  # a single class in train
    assert linear_probe_accuracy(train, only, test, wanted) == pytest.approx(100 * float((wanted == 2).double().mean()))


@pytest.mark.parametrize("neighbors", [1, 4, 10, 500])
def test_agreement_is_the_share_of_common_neighbors(blocks, neighbors):
    student, _ = clusters(30)
    teacher = torch.cat([student[:, :3], clusters(30, channels=5, seed=2)[0]], 1)

    def near(features, n):
        others = [(cosine(features[n], features[m]), m) for m in range(30) if m != n]
        return {m for _, m in sorted(others, reverse=True)[:neighbors]}

    shares = [len(near(student, n) & near(teacher, n)) / min(neighbors, 29) for n in range(30)]
    agreement = retrieval_agreement(student, teacher, neighbors=neighbors)
    assert agreement == pytest.approx(np.mean(shares))
    assert retrieval_agreement(student, 3 * student, neighbors=neighbors) == 1
    assert agreement < 1 or neighbors > 29


def test_nothing_depends_on_the_order_of_images():
    train, labels = clusters(70)
    test, wanted = clusters(50, seed=1)
    teacher, _ = clusters(70, channels=9, seed=3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        one, two = torch.randperm(70, generator=generator), torch.randperm(50, generator=generator)
        for accuracy in (knn_accuracy, linear_probe_accuracy):
            before = accuracy(train, labels, test, wanted)
            assert accuracy(train[one], labels[one], test[two], wanted[two]) == pytest.approx(before)
        assert leave_one_out_knn(train[one], labels[one]) == pytest.approx(leave_one_out_knn(train, labels))
        assert retrieval_agreement(train[one], teacher[one]) == pytest.approx(retrieval_agreement(train, teacher))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q  # a rotation keeps all cosines
    assert retrieval_agreement(train, train @ turn, neighbors=5) == 1


def test_extremes():
    one = torch.ones(1, 3)
    assert math.isnan(retrieval_agreement(one, one))
    assert retrieval_agreement(torch.eye(2), torch.eye(2)) == 1
    assert knn_accuracy(one, torch.tensor([4]), one.bfloat16(), torch.tensor([4])) == 100
    assert knn_accuracy(one, torch.tensor([4]), one, torch.tensor([0])) == 0
    assert leave_one_out_knn(torch.tensor([[1.0, 0], [1, 0.1], [0, 1]]), torch.tensor([0, 0, 1]), neighbors=1) == (
        pytest.approx(200 / 3)
    )
    assert 0 <= knn_accuracy(torch.zeros(4, 3), torch.arange(4), torch.zeros(2, 3), torch.arange(2)) <= 100


@pytest.mark.parametrize("workers", [0, 1])
def test_embeddings_of_readable_images_in_order(tmp_path, workers):
    root = folder_tree(tmp_path, val=[f"ant/{n}.png" for n in range(4)] + ["bee/1.png"])
    source = source_of(root, "val")
    bad = next(n for n, sample in enumerate(source.samples) if sample.label == 0)
    write(root / "val" / f"{source.samples[bad].key}.png", b"nothing")
    source, seen = source_of(root, "val"), []

    def predict(images):
        seen.append(images)
        return images.half().mean((2, 3))[:, :, None]  # maps are flattened

    found = embed(predict, source, 16, CPU, batch_size=2, workers=workers)
    good = [n for n in range(5) if n != bad]
    assert (found.features.shape, found.features.dtype) == ((4, 3), torch.float32)
    assert found.labels.tolist() == [source.samples[n].label for n in good]
    assert torch.equal(found.features, torch.cat(seen).half().mean((2, 3)).float())
    part = embed(predict, source, 16, CPU, indices=[good[2], bad, good[0]])
    assert torch.equal(part.features, found.features[[2, 0]])
    nothing = embed(predict, source, 16, CPU, indices=[bad])
    assert (nothing.features.shape, nothing.labels.shape) == ((0, 0), (0,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_embeddings_that_are_not_finite_have_no_linear_probe(value, place):
    parts = [torch.randn(6, 3), torch.randn(4, 3)]
    parts[place][1, 1] = value
    with pytest.raises(UserError, match="NaN or Inf"):
        linear_probe_accuracy(parts[0], torch.arange(6) % 2, parts[1], torch.arange(4) % 2)
