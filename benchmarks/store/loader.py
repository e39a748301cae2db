"""Is the cache loader a bottleneck? Compares samples/s per core with a torchvision loader.

    python -m benchmarks.store.loader [--images 128] [--repeats 5] [--data folder]

Uses 500x375 photographs and 224 px views, with Swin-T features by default. One process, one thread, warm page cache.
Baselines: (a) torchvision decodes the original JPEG, applies a random resized crop and a flip, as training without a
cache does; (b) only reads the bytes of the cache. The cost of features is measured by a pass without pixels.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.harness import Measurement, argument_parser, publish_table, ratio, time_interleaved
from benchmarks.photographs import write_photographs
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.distributed import Process
from scalekd_cache.loader.loader import Batch, MicroBatches, Slot
from scalekd_cache.loader.order import Order
from scalekd_cache.loader.target_cache import target_codecs
from scalekd_cache.store.reader import Cache

BATCH = 32


def make_cache(root: Path, data: Path, images: int, teacher: str, **changes: Any) -> Cache:
    """Cache one view of `images` images with a randomly initialized teacher, on the device `device` (cpu)."""
    config = CacheTeacherConfig(
        data=DataConfig(source=str(data), max_samples=images),
        views=ViewConfig(pixels=changes.get("pixels", "baked")),
        teacher=TeacherConfig(name=teacher, pretrained=False, batch_size=32),
        cache=StoreConfig(
            path=str(root), backend=changes.get("backend", "webdataset"), codec=changes.get("codec", "int8"),
            num_views=1, views_per_group=1, samples_per_shard=512, pixels_from=changes.get("pixels_from"),
        ),
    )  # fmt: skip
    cache_teacher(config, Process(0, 1, torch.device(changes.get("device", "cpu"))))
    return Cache.open(root)


def batches_of(cache: Cache) -> Callable[[], list[Batch]]:
    """Load all micro-batches of one epoch and decode the features on the CPU."""
    order = Order(num_samples=len(cache), block=64, window=32, seed=0)
    dataset = MicroBatches(cache, order, BATCH, BATCH)
    codec = dataset.targets[0].codecs.features

    def run() -> list[Batch]:
        batches = []
        for step in range(len(cache) // BATCH):
            batch = dataset[Slot(0, step, 0, False)]
            codec.decode(batch.stored[0].codes)
            batches.append(batch)
        return batches

    return run


def features_only(cache: Cache) -> Callable[[], None]:
    """Read and check records, decode features and logits, and skip pixels."""
    codecs = target_codecs(cache)

    def run() -> None:
        for start in range(0, len(cache) // BATCH * BATCH, BATCH):
            records = cache.read(np.arange(start, start + BATCH), 0)
            codecs.features.decode(torch.from_numpy(codecs.features.unpack([record.features for record in records])))
            torch.from_numpy(np.stack([codecs.logits.decode(record.logits) for record in records]))

    return run


def originals(data: Path, count: int) -> Callable[[], None]:
    """Baseline (a): torchvision transforms on the original files, as in torchvision's reference training."""
    files = sorted((data / "train").rglob("*.jpg"))[:count]
    crop = v2.Compose([v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()])

    def run() -> None:
        for start in range(0, count // BATCH * BATCH, BATCH):
            images = [np.asarray(crop(Image.open(file).convert("RGB"))) for file in files[start : start + BATCH]]
            torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    return run


def bytes_only(cache: Cache) -> Callable[[], None]:
    """Baseline (b): read every byte of the cache's units, 1 MiB at a time."""
    files = [path for path in Path(str(cache.root)).joinpath("units").rglob("*") if path.is_file()]

    def run() -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            while os.read(descriptor, 1 << 20):
                pass
            os.close(descriptor)

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--teacher", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--data", type=Path, help="a folder with train/<class>/*.jpg (default: generated photographs)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count = options.images // BATCH * BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or write_photographs(folder / "data", count)
        baked = make_cache(folder / "baked", data, count, options.teacher)
        zarr = make_cache(folder / "zarr", data, count, options.teacher, backend="zarr")
        replayed = make_cache(folder / "replayed", data, count, options.teacher, pixels="replayed")
        actions: dict[str, Callable[[], object]] = {
            "original": originals(data, count),
            "baked": batches_of(baked),
            "zarr": batches_of(zarr),
            "replayed": batches_of(replayed),
            "features": features_only(baked),
            "features_zarr": features_only(zarr),
            "bytes": bytes_only(baked),
        }
        for action in actions.values():
            action()  # warm up the page cache and compiled kernels
        seconds = time_interleaved(options.repeats, **actions)
    unit = {"amount": count, "unit": "samples/s"}
    share = [a / b for a, b in zip(seconds["features"], seconds["baked"], strict=True)]
    jpeg = "JPEG decoding and digest of the view"
    figures = [
        ratio("baked, tar / original JPEG + torchvision", seconds, "baked", "original", goal="5 x", gap=jpeg, **unit),
        ratio("baked, zarr / original JPEG + torchvision", seconds, "zarr", "original", goal="5 x", gap=jpeg, **unit),
        ratio("replayed / original JPEG + torchvision", seconds, "replayed", "original", goal="", **unit,
              gap="decodes the whole image; crops and resizes in Pillow"),
        ratio("baked, tar / raw read of its bytes", seconds, "baked", "bytes", goal="", gap=jpeg, **unit),
        Measurement("features and logits, checked and decoded: fraction of the loader's time", statistics.median(share),
               (min(share), max(share)), "x", f"{count / statistics.median(seconds['features']):,.0f} samples/s, zarr "
               f"{count / statistics.median(seconds['features_zarr']):,.0f}", "at most 0.25", ""),
    ]  # fmt: skip
    publish_table(
        "loader",
        figures,
        {
            "images": count,
            "teacher": options.teacher,
            "data": str(options.data or "photographs"),
            "repeats": options.repeats,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
