"""Sizes of the GPU smoke run and of its CPU stand-in; images and caches that several parts use.

In: nothing. Out: `Sizes`, a folder of images, finished caches.
Invariant: the images need no package beyond numpy and Pillow, and are the same in every run.
"""

import shutil
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from scalekd_cache.config.machine import available_cores

Add = Callable[[str, Any], None]
"""Reports a result of a part: its name and a JSON value."""


FAILED = "failed"
"""Key of a result that is an error; the part then ends with exit code 1."""
WORKER_BYTES = 100 << 20
"""Shared memory for each loader worker: two batches of 128 views with their features, in half of the free memory."""


@contextmanager
def attempt(add: Add, name: str) -> Iterator[None]:
    """Context for one result: an error becomes the result, and the part continues with the next one."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        add(name, {FAILED: f"{type(error).__name__}: {error}"[:500]})


def gpu_workers(shared_memory: Path = Path("/dev/shm")) -> int:
    """Loader workers of the run on a GPU: one per core but one, fewer if shared memory is small (containers)."""
    cores = max(1, available_cores() - 1)
    return min(cores, shutil.disk_usage(shared_memory).free // WORKER_BYTES) if shared_memory.exists() else cores


class Attention(NamedTuple):
    """Shapes of one projector's attention."""

    heads: int
    width: int
    queries: int
    keys: int


class Sizes(NamedTuple):
    """Everything that differs between the smoke run and its stand-in."""

    device: str
    teacher: str
    student: str
    image_px: int
    views_px: int
    images: int
    views: int
    workers: int
    teacher_batches: tuple[int, ...]
    """The last one is also used for stage 1."""
    attention: dict[str, Attention]
    attention_batch: int
    feature_shape: tuple[int, int, int]
    codec_views: int
    trained: int
    """Images of the cache that the trainer reads: one epoch."""
    micro_batches: tuple[int, ...]
    repeats: int
    compiler: str
    """Backend of torch.compile; the stand-in does not wait for a C++ compiler."""


GPU = Sizes(
    device="cuda", teacher="swin_large_patch4_window7_224", student="resnet50", image_px=500, views_px=224,
    images=4096, views=4, workers=gpu_workers(), teacher_batches=(64, 128, 256),
    attention={"stage 3": Attention(16, 768, 196, 196), "stage 4": Attention(24, 1536, 49, 49)}, attention_batch=128,
    feature_shape=(1536, 7, 7), codec_views=256, trained=1024, micro_batches=(128, 64, 32), repeats=10,
    compiler="inductor",
)  # fmt: skip
STAND_IN = Sizes(
    device="cpu", teacher="demo_swin", student="resnet10t", image_px=80, views_px=64,
    images=16, views=2, workers=1, teacher_batches=(4, 8),
    attention={"stage 3": Attention(2, 16, 16, 16), "stage 4": Attention(2, 32, 4, 4)}, attention_batch=4,
    feature_shape=(32, 4, 4), codec_views=8, trained=16, micro_batches=(8,), repeats=2, compiler="eager",
)  # fmt: skip


def sizes_of(stand_in: bool) -> Sizes:
    """The sizes of the stand-in, or of the run on a GPU."""
    return STAND_IN if stand_in else GPU


def write_images(folder: Path, sizes: Sizes) -> None:
    """Write JPEG files of smooth random color in two classes under train/, and a few under val/, unless they exist."""
    if (folder / "val").exists():
        return

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((sizes.image_px, sizes.image_px * 3 // 4), Image.Resampling.BICUBIC)
        image.save(folder / place(number), quality=90)

    def place(number: int) -> str:
        part = "train" if number < sizes.images else "val"
        return f"{part}/class{number % 2}/{number:06d}.jpg"

    for part in ("train", "val"):
        for label in range(2):
            (folder / part / f"class{label}").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:  # Pillow releases the lock while it scales and encodes
        list(pool.map(write, range(sizes.images + 4)))


def cache_of(folder: Path, sizes: Sizes, *, tiny: bool = False) -> Path:
    """The cache for training: one view of `trained` images. Stage 1 makes it in the first call; later calls reuse it.

    Args:
        folder: folder with the images.
        sizes: sizes of the run.
        tiny: use the demo teacher at 64 px.
    """
    import torch

    from scalekd_cache.caching.job import cache_teacher
    from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
    from scalekd_cache.distributed import Process

    root = folder / ("tiny-cache" if tiny else "cache")
    config = CacheTeacherConfig(
        data=DataConfig(source=str(folder / "images"), max_samples=16 if tiny else sizes.trained),
        views=ViewConfig(size=64 if tiny else sizes.views_px),
        teacher=TeacherConfig(name="demo_swin" if tiny else sizes.teacher, pretrained=False, check_classes=False,
                              batch_size=sizes.teacher_batches[0]),
        cache=StoreConfig(path=str(root), num_views=1, views_per_group=1, samples_per_shard=max(8, sizes.trained // 4)),
        workers=sizes.workers,
    )  # fmt: skip
    cache_teacher(config, Process(0, 1, torch.device(sizes.device)))
    return root
