"""What does reading a cache with other data pipelines cost? Compares CPU time with `CachedTargets`, 2 workers each.

    python -m benchmarks.store.pipelines [--images 96] [--epochs 16] [--repeats 5]

Swin-T features (int8) of 224 px views, 32 samples per batch, warm page cache. All pipelines return decoded features,
logits and pixels; `CachedTargets` also normalizes the images, and decodes features in the training process. CPU seconds
of this process and its workers are counted, so other jobs on the machine matter little.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from datasets import IterableDataset
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import argument_parser, publish_table, ratio, time_interleaved
from benchmarks.photographs import write_photographs
from scalekd_cache import CachedTargets, RecordDecoder
from scalekd_cache.caching.job import cache_teacher
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig
from scalekd_cache.distributed import Process
from scalekd_cache.store.reader import Cache

BATCH, WORKERS = 32, 2


def make_cache(root: Path, data: Path, images: int) -> Cache:
    """One view of the photographs in shards of 16, with a randomly initialized Swin-T."""
    config = CacheTeacherConfig(
        data=DataConfig(source=str(data), max_samples=images),
        teacher=TeacherConfig(name="swin_tiny_patch4_window7_224", pretrained=False, batch_size=32),
        cache=StoreConfig(path=str(root), codec="int8", num_views=1, views_per_group=1, samples_per_shard=16),
    )
    cache_teacher(config, Process(0, 1, torch.device("cpu")))
    return Cache.open(root)


def samples(decoder: RecordDecoder, ranges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The decoded records of some ranges of images."""
    for number in ranges:
        for position in decoder.cache.positions(0, number):
            yield from decoder.read([position], 0)


class MapStyle(Dataset[dict[str, Any]]):
    """Records by position, for any sampler."""

    def __init__(self, decoder: RecordDecoder, epochs: int) -> None:
        self.decoder, self.epochs = decoder, epochs

    def __len__(self) -> int:
        return self.epochs * len(self.decoder.cache)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.decoder.read([number % len(self.decoder.cache)], 0)[0]


def ways(cache: Cache, epochs: int) -> dict[str, Callable[[], Iterable[Any]]]:
    """Each pipeline, as a function that starts it."""
    decoder, ranges = RecordDecoder(cache), list(range(cache.num_ranges)) * epochs
    tars = sorted(str(path) for path in Path(str(cache.root)).glob("units/*/v0000.tar")) * epochs

    def streamed(decode: Callable[[Any], Any]) -> Any:
        return webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(200).map(decode)

    def hugging_face() -> IterableDataset:
        return IterableDataset.from_generator(samples, gen_kwargs={"decoder": decoder, "ranges": ranges})

    batched = {"batch_size": BATCH, "num_workers": WORKERS}
    return {
        "targets": lambda: CachedTargets(cache, batch_size=BATCH, epochs=epochs, workers=WORKERS),
        "loader": lambda: DataLoader(
            CachedTargets(cache, batch_size=BATCH, epochs=epochs), batch_size=None, num_workers=WORKERS
        ),
        "webdataset": lambda: DataLoader(streamed(decoder), **batched),
        "bytes": lambda: DataLoader(streamed(lambda sample: len(sample["features"])), **batched),
        "datasets": lambda: DataLoader(hugging_face().shuffle(seed=0, buffer_size=200), **batched),
        "map": lambda: DataLoader(MapStyle(decoder, epochs), shuffle=True, **batched),
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of its workers that have ended."""
    return sum(os.times()[:4])


def run_through(start: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    """Start a pipeline and read all of its batches."""

    def run() -> None:
        for _ in start():
            pass

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    count = options.images // BATCH * BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = make_cache(folder / "cache", write_photographs(folder / "data", count), count)
        actions = {name: run_through(start) for name, start in ways(cache, options.epochs).items()}
        actions["targets"]()  # warm up the page cache
        seconds = time_interleaved(options.repeats, clock=cpu_seconds, **actions)
    unit = {"amount": count * options.epochs, "unit": "records per CPU second", "goal": ""}
    names = {
        "loader": ("DataLoader(CachedTargets)", "decoded features and float images pass between processes"),
        "webdataset": ("webdataset, decoded", "one record at a time; decoded features pass between processes"),
        "datasets": ("Hugging Face datasets, decoded", "one record at a time; decoded features pass between processes"),
        "map": ("map-style dataset, random order", "one record at a time; decoded features pass between processes"),
        "bytes": ("webdataset, members' bytes only", "nothing is checked or decoded"),
    }
    figures = [
        ratio(f"{what} / CachedTargets", seconds, key, "targets", gap=gap, **unit) for key, (what, gap) in names.items()
    ]
    publish_table("pipelines", figures, {"images": count, **vars(options), "seconds": seconds})


if __name__ == "__main__":
    main()
