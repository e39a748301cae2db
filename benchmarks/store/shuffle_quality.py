"""How well is the training order shuffled, and how much does each process read?

    python -m benchmarks.store.shuffle_quality

Positions: the position of samples within an epoch, over many epochs, compared with independent uniform numbers.
Mixing: distinct classes per batch, and same-class pairs within 16 batches. Compares a dataset sorted by class (tars
written class by class), the same dataset in hashed order (as for an image folder), a full permutation, and caches with
features for a quarter of the views, whose epochs deal from two streams.
Training: a small network with BatchNorm on scikit-learn's digits sorted by class.
Reading: bytes that each of N processes reads per epoch from a default cache, as counted by the kernel.
Writes benchmarks/results/shuffle-quality.json and .png. Takes about a minute.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.harness import RESULTS, pyplot, write_results
from benchmarks.store.throughput import make_records, write_unit
from scalekd_cache.loader.batch_size import micro_batches_of_rank
from scalekd_cache.loader.order import (
    WINDOW,
    Ids,
    Order,
    SparseEpoch,
    class_correlation,
    epoch_ids,
    micro_batch_ids,
    mixing_window,
    steps_per_epoch,
)
from scalekd_cache.store.base import ShardId, shard_reader, stores_features
from scalekd_cache.store.sidecar import read_keys, read_unit

CLASSES, EACH, BATCH, MICRO = 1000, 1281, 256, 32
"""ImageNet's class counts and the batch sizes of the traditional recipe."""
SHARD = 512
"""Images per shard, which decide where features are stored in a sparse cache."""
SEEDS = range(8)


def kolmogorov(positions: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance between positions (0 to 1) and the uniform distribution."""
    positions = np.sort(positions)
    ranks = np.arange(1, len(positions) + 1) / len(positions)
    return float(np.maximum(ranks - positions, positions - ranks + 1 / len(positions)).max())


def positions(samples: int = 40_000, epochs: int = 200, chosen: int = 64) -> dict[str, Any]:
    """Positions of chosen samples over epochs, compared with as many independent uniform numbers."""
    order, draw = Order(num_samples=samples, block=64, window=WINDOW, seed=0), np.random.default_rng(0)
    members = draw.choice(samples, chosen, replace=False)
    places = np.empty((epochs, samples), np.int64)
    for epoch in range(epochs):
        places[epoch, epoch_ids(order, epoch, 0, samples)] = np.arange(samples)
    found = places[:, members] / samples
    fair = draw.random(found.shape)
    neighbors = np.abs(places[:, 1:] - places[:, :-1]).mean() / (samples / 3)
    return {
        "samples": samples, "epochs": epochs, "samples_looked_at": chosen,
        "distance_from_uniform": statistics.median(kolmogorov(column) for column in found.T),
        "distance_of_uniform_numbers": statistics.median(kolmogorov(column) for column in fair.T),
        "correlation_of_successive_epochs": float(np.corrcoef(found[:-1].ravel(), found[1:].ravel())[0, 1]),
        "distance_of_neighbors_over_that_of_any_two": float(neighbors),
    }  # fmt: skip


def ids_in_turn(order: Order, count: int) -> Ids:
    """The first positions of epoch 0, in the order in which they are read."""
    if order.features_every == 1:
        return epoch_ids(order, 0, 0, count)
    epoch = SparseEpoch(order, 0, lambda ids: stores_features(ids % SHARD, 0, order.features_every))
    steps = min(count // BATCH, steps_per_epoch(order, BATCH))
    return np.concatenate(
        [
            epoch.micro_batch_ids(step=step, micro=micro, global_batch=BATCH, micro_batch=MICRO)
            for step in range(steps)
            for micro in range(BATCH // MICRO)
        ]
    )


def mixing(labels: Ids, order: Order | None, batches: int = 200) -> dict[str, float]:
    """Distinct classes per batch and per micro-batch, and the rate of same-class pairs within 16 batches."""
    count = len(labels)
    ids = np.random.default_rng(1).permutation(count) if order is None else ids_in_turn(order, count)
    seen = labels[ids[: count // BATCH * BATCH]].reshape(-1, BATCH)
    chosen = seen[np.linspace(0, len(seen) - 1, batches).astype(int)]
    runs = seen[: len(seen) // 16 * 16].reshape(-1, 16 * BATCH)
    sizes = np.stack([np.bincount(run, minlength=CLASSES) for run in runs]).astype(np.float64)
    pairs = 16.0 * BATCH
    return {
        "classes_in_a_batch": float(np.mean([len(np.unique(batch)) for batch in chosen])),
        "classes_in_a_micro_batch": float(np.mean([len(np.unique(batch[:MICRO])) for batch in chosen])),
        "same_class_pairs_in_16_batches": float((sizes * (sizes - 1)).sum(1).mean() / (pairs * (pairs - 1))),
    }


def orders(labels: Ids) -> dict[str, tuple[Ids, Order | None]]:
    """The orders to compare, as (labels in canonical order, order)."""
    hashed = np.random.default_rng(2).permutation(labels)
    wide = mixing_window(len(labels), 64, class_correlation(labels))
    plain = {"num_samples": len(labels), "block": 64, "seed": 0}
    sparse = {**plain, "features_every": 4, "ranges": -(-len(labels) // SHARD)}
    return {
        "full permutation": (labels, None),
        "image folder (hashed), 64 blocks of 64": (hashed, Order(window=WINDOW, **plain)),
        "class-sorted tars, 64 blocks of 64": (labels, Order(window=WINDOW, **plain)),
        f"class-sorted tars, {wide:,} blocks of 64 (chosen by likeness)": (
            labels,
            Order(window=wide, **plain),
        ),
        "image folder, features of a quarter": (hashed, Order(window=WINDOW, **sparse)),
        "class-sorted tars, likeness, features of a quarter": (labels, Order(window=wide, **sparse)),
    }


class Small(nn.Sequential):
    """Two convolutions with BatchNorm for 8x8 digits."""

    def __init__(self) -> None:
        def layer(before: int, after: int) -> list[nn.Module]:
            return [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]

        super().__init__(*layer(1, 24), *layer(24, 48), nn.Flatten(), nn.Linear(192, 10))


def accuracy(ids_of_epoch: Any, train: tuple[np.ndarray, Ids], test: tuple[np.ndarray, Ids], seed: int) -> float:
    """Percent of test digits after three epochs of SGD in batches of 32."""
    torch.manual_seed(seed)
    model, images, labels = Small(), torch.from_numpy(train[0]), torch.from_numpy(train[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        for batch in torch.from_numpy(ids_of_epoch(epoch, seed)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(torch.from_numpy(test[0])).argmax(1).numpy() == test[1]
    return 100 * float(right.mean())


def training() -> dict[str, dict[str, Any]]:
    """Train the same network on class-sorted digits in four orders; windows are much smaller than the dataset."""
    digits = load_digits()
    pixels = (digits.images[:, None] / 16 - 0.3).astype(np.float32)
    shuffled = np.random.default_rng(0).permutation(len(pixels))
    held_out, rest = shuffled[:360], shuffled[360:]
    kept = rest[np.argsort(digits.target[rest], kind="stable")]
    train, test = (pixels[kept], digits.target[kept]), (pixels[held_out], digits.target[held_out])
    count, block = len(kept), 16
    wide = mixing_window(count, block, class_correlation(train[1]))

    def windowed(window: int) -> Any:
        return lambda epoch, seed: epoch_ids(
            Order(num_samples=count, block=block, window=window, seed=seed), epoch, 0, count
        )

    ways = {
        "full permutation": lambda epoch, seed: np.random.default_rng([seed, epoch]).permutation(count),
        "class-sorted, 2 blocks of 16": windowed(2),
        "class-sorted, 4 blocks of 16": windowed(4),
        f"class-sorted, {wide} blocks of 16 (chosen by likeness)": windowed(wide),
    }
    result = {}
    for name, way in ways.items():
        each = [accuracy(way, train, test, seed) for seed in SEEDS]
        result[name] = {"top1_mean": statistics.mean(each), "top1_std": statistics.stdev(each), "top1": each}
    return result


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def reading(records: int = 512, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> list[dict[str, Any]]:
    """Bytes that rank 0 of N reads in one epoch of one shard, times N, divided by the size of the shard."""
    order, rows = Order(num_samples=records, block=64, window=WINDOW, seed=0), []
    made = make_records(records)
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("webdataset", "zarr"):
            unit = write_unit(Path(folder, backend), backend, made, 1)
            whole = sum(path.stat().st_size for path in unit.rglob("*") if path.is_file())
            info, _ = read_unit(unit)
            for count in ranks:
                reader = shard_reader(backend, unit, ShardId(0, 0, 0), read_keys(unit, info))
                before = bytes_read()
                for step in range(records // BATCH):
                    for micro in micro_batches_of_rank(BATCH, MICRO, 0, count):
                        reader.read(
                            micro_batch_ids(
                                order, epoch=0, step=step, micro=micro, global_batch=BATCH, micro_batch=MICRO
                            )
                        )
                share = (bytes_read() - before) * count / whole
                rows.append({"backend": backend, "ranks": count, "read_times_ranks_over_shard": share})
                reader.close()
    return rows


def plot(mixed: dict[str, dict[str, float]], labels: Ids, trained: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot distinct classes per batch over an epoch, and the accuracy of the small network."""
    plt = pyplot()

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1.3, 1, 1))
    for (name, (canonical, order)), color in zip(
        orders(labels).items(), ("k", "tab:green", "tab:red", "tab:blue", "tab:olive", "tab:cyan"), strict=True
    ):
        ids = np.random.default_rng(1).permutation(len(labels)) if order is None else ids_in_turn(order, 200 * BATCH)
        seen = canonical[ids[: 200 * BATCH]].reshape(200, BATCH)
        axes[0].plot([len(np.unique(batch)) for batch in seen], color=color, lw=1, label=name)
    axes[0].set(
        xlabel="step",
        ylabel=f"distinct classes in a batch of {BATCH}",
        ylim=(0, 256),
        title="1,000 classes of 1,281 images, as in ImageNet",
    )
    axes[0].legend(fontsize=7.5, loc="lower right")
    names = [name.replace(", ", ",\n").replace(" (", "\n(") for name in mixed]
    axes[1].barh(names, [row["same_class_pairs_in_16_batches"] * CLASSES for row in mixed.values()], color="tab:gray")
    axes[1].set(xscale="log", xlabel="same-class pairs within 16 batches, relative to chance", title="mixing")
    for number, row in enumerate(trained.values()):
        axes[2].plot([number] * len(row["top1"]), row["top1"], "o", alpha=0.5, color="tab:blue")
        axes[2].plot([number - 0.2, number + 0.2], [row["top1_mean"]] * 2, "k-")
    axes[2].set_xticks(
        range(len(trained)), [name.replace(", ", ",\n").replace(" (", "\n(") for name in trained], fontsize=7.5
    )
    axes[2].set(ylabel="top-1, %", title=f"digits sorted by class, {len(SEEDS)} seeds")
    axes[2].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the benchmark; write and print the results."""
    torch.set_num_threads(1)
    labels = np.repeat(np.arange(CLASSES), EACH)
    mixed = {name: mixing(*pair) for name, pair in orders(labels).items()}
    trained = training()
    content = {
        "positions": positions(),
        "mixing": mixed,
        "training": trained,
        "reading": reading(),
    }
    write_results("shuffle-quality", content)
    plot(mixed, labels, trained, RESULTS / "shuffle-quality.png")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
