"""Worker processes: transfer of items, prefetch limits, and an immediate error when a worker exits."""

import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
from commands import ENV, LIMIT_S, ROOT
from image_files import folder_tree
from small_cache import SAMPLES, copy_of_cache, options, shared_cache, shared_weights, unit_files
from small_run import config_of
from torch import Tensor
from torch.utils.data import Dataset

from scalekd_cache.caching.job import cache_teacher, dry_run
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.data import workers
from scalekd_cache.data.source import open_source
from scalekd_cache.data.workers import load_items, prefetch_count
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, worker_failure
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.models.evaluate import evaluate
from scalekd_cache.training.dry_run import plan_distill

CPU = Process(0, 1, torch.device("cpu"))
MB = 1_000_000


class Item(NamedTuple):
    number: int
    pixels: Tensor
    parts: list[tuple[str, Tensor | None]]


class Items(Dataset[Item]):
    """Items of several tensors; the item number `bad` fails."""

    def __init__(self, bad=None, does=None):
        self.bad, self.does = bad, does

    def __getitem__(self, number):
        if number == self.bad:
            return self.does()
        parts = [("a", torch.full((3,), number / 7)), ("b", None), ("c", torch.tensor(number == 3))]
        columns = torch.arange(6).view(2, 3)
        parts += [("d", columns[:1, 0]), ("e", columns.t()), ("f", columns[:, 1]), ("g", columns[:0])]
        return Item(number, torch.full((2, 3, 5), number, dtype=torch.uint8), parts)


def received(dataset, count=20, **changes):
    settings = {"workers": 2, "item_bytes": 1000, "max_prefetch": 4, **changes}
    return load_items(dataset, iter(range(count)), **settings)


def test_items_cross_as_they_are():
    plain, sent = list(received(Items(), workers=0)), list(received(Items()))
    for mine, theirs in zip(plain, sent, strict=True):
        assert mine.number == theirs.number
        assert torch.equal(mine.pixels, theirs.pixels)
        assert mine.pixels.dtype == theirs.pixels.dtype
        assert [name for name, _ in mine.parts] == [name for name, _ in theirs.parts]
        for (_, one), (_, other) in zip(mine.parts, theirs.parts, strict=True):
            assert (one is other is None) or (torch.equal(one, other) and one.dtype == other.dtype)


def test_items_that_are_kept_hold_no_descriptors():
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    items = received(Items(), count=200)
    kept = [next(items)]
    before = open_files()
    kept += [next(items) for _ in range(150)]
    assert open_files() <= before + 2 * (4 + 1)  # blocks of the workers
    assert len(kept) == 151


class GrowingItems(Items):
    """Later items are larger than `item_bytes` says."""

    def __getitem__(self, number):
        return super().__getitem__(number)._replace(pixels=torch.full((1 + number**2,), number, dtype=torch.uint8))


@pytest.mark.parametrize("borrow", [False, True])
@pytest.mark.parametrize("dataset", [Items(), GrowingItems()])
def test_workers_use_their_blocks_again(monkeypatch, dataset, borrow):
    """A block is used again only after its item was taken: every value is right, although the reader is slow."""
    blocks, plain = {}, workers._SharedItem.received

    def noted(self, *, borrow):
        blocks.setdefault(self.place, set()).add(self.block.data_ptr())
        return plain(self, borrow=borrow)

    monkeypatch.setattr(workers._SharedItem, "received", noted)
    for number, item in enumerate(received(dataset, count=60, item_bytes=300, borrow=borrow)):
        time.sleep(0.02 * (number < 20))  # the workers fill every block that they may
        expected = dataset[number]
        assert torch.equal(item.pixels, expected.pixels)
        assert all(
            one is two is None or torch.equal(one, two) for (_, one), (_, two) in zip(item.parts, expected.parts)
        )
    assert set(blocks) == {(worker, block) for worker in range(2) for block in range(4 + 1)}
    if type(dataset) is Items:
        assert {len(found) for found in blocks.values()} == {1}


@pytest.mark.parametrize(
    ("free", "workers_", "item", "ranks", "waiting"),
    [(64 * MB, 2, MB // 2, 1, 31), (64 * MB, 2, 10 * MB, 1, 1), (64 * MB, 4, MB, 4, 1), (None, 2, MB, 1, 32),
     (100_000 * MB, 16, 100 * MB, 1, 1), (64 * MB, 0, 100 * MB, 1, 0)],
)  # fmt: skip
def test_what_waits_fits_the_shared_memory(monkeypatch, free, workers_, item, ranks, waiting):
    monkeypatch.setattr(workers, "shared_memory", lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert prefetch_count(workers_, item, 32) == waiting


def test_no_room_for_one_item_a_worker_is_refused(monkeypatch):
    monkeypatch.setattr(workers, "shared_memory", lambda: 64 * MB)
    with pytest.raises(UserError, match="shared memory is too small") as error:
        prefetch_count(8, 20 * MB, 4)
    assert "64 MB free" in str(error.value)
    assert "at least 2 x 8 workers x 20.0 MB" in str(error.value)
    assert "--shm-size" in str(error.value)
    assert "or set --workers 1" in str(error.value)
    assert prefetch_count(1, 20 * MB, 4) == 1
    with pytest.raises(UserError, match="or set --workers 0"):
        prefetch_count(1, 40 * MB, 4)


def test_descriptors_bound_what_waits(monkeypatch):
    monkeypatch.setattr(workers, "_open_files", lambda: workers._OpenFiles(100, 1024))
    assert prefetch_count(32, 1000, 32) == (1024 - 100 - 64) // 32 - 7
    monkeypatch.setattr(workers, "_open_files", lambda: workers._OpenFiles(100, 256))
    with pytest.raises(UserError, match="open-file limit is too low") as error:
        prefetch_count(16, 1000, 32)
    assert "at least 292 for 16 workers" in str(error.value)
    assert "or set --workers 11" in str(error.value)
    assert prefetch_count(11, 1000, 32) == 1


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    os._exit(3)


def unsendable():
    return Item(0, torch.zeros(1), [lambda: None])


@pytest.mark.parametrize("does", [killed, left, unsendable])
def test_a_worker_that_ends_or_cannot_send_is_an_error_at_once(does):
    started = time.monotonic()
    with pytest.raises((UserError, RuntimeError)) as caught:  # torch's error, if its signal arrives between two items
        list(received(Items(bad=7, does=does)))
    error = worker_failure(caught.value) or caught.value
    assert "a data loader worker died" in str(error)
    assert time.monotonic() - started < LIMIT_S / 10


def test_shared_memory_that_is_gone_is_an_error_of_the_worker(monkeypatch):
    def full(size):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(UserError, match="ran out of shared memory") as error:
        list(received(Items()))
    assert "No space left on device" in str(error.value)


def test_little_shared_memory_changes_no_result(tmp_path, monkeypatch):
    """Stage 1 from images and from another cache's pixels, the loader, an evaluation."""
    monkeypatch.setattr(workers, "shared_memory", lambda: MB)
    whole = unit_files(shared_cache().root)
    cache_teacher(options(tmp_path / "one", shared_weights(), workers=2), CPU)
    assert {name: digest for name, digest in unit_files(tmp_path / "one").items() if name.endswith(".tar")} == {
        name: digest for name, digest in whole.items() if name.endswith(".tar")
    }
    made = [copy_of_cache(tmp_path / "pixels"), tmp_path / "alone", tmp_path / "workers"]
    for number, root in enumerate(made[1:]):
        shared = {"pixels_from": str(made[0])}
        cache_teacher(options(root, shared_weights(), cache=shared, workers=2 * number), CPU)
    tars = [{k: v for k, v in unit_files(root).items() if k.endswith(".tar")} for root in made[1:]]
    assert tars[0] == tars[1]
    order = Order(num_samples=SAMPLES, block=8, window=3, seed=5)
    batches = [
        list(CacheLoader(shared_cache(), order, epochs=1, global_batch=8, micro_batch=4, workers=count))
        for count in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.stored[0].codes, other.stored[0].codes)
    source = open_source(DataConfig(max_samples=50), "val")
    tallies = [evaluate(lambda x: x.float().mean((2, 3)), source, 64, CPU.device, workers=count) for count in (0, 2)]
    assert tallies[0] == tallies[1]


def test_both_stages_refuse_before_they_start(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory", lambda: 10_000)
    with pytest.raises(UserError, match="shared memory is too small"):
        dry_run(options(tmp_path / "cache", shared_weights(), workers=2), CPU)
    with pytest.raises(UserError, match="shared memory is too small"):
        cache_teacher(options(tmp_path / "cache", shared_weights(), workers=2), CPU)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="shared memory is too small"):
        plan_distill(config_of(tmp_path / "run", workers=2), CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stage1", "stage2"), [("64m", 0, 0), ("8m", 0, 2), ("100k", 2, None)])
def test_commands_in_a_container_of_little_shared_memory(tmp_path, size, stage1, stage2):
    """Docker's 64 MB and less, for both stages: too large items are an error that names what fits; nothing hangs."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    data = folder_tree(
        tmp_path / "data", [f"{kind}/{number}.png" for kind in "ab" for number in range(100)], ["a/x.png", "b/x.png"]
    )
    common = f"VENV=none PYTHON={sys.executable} DATA={data} CACHE={tmp_path / 'cache'}"

    def ends(words, status):
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", f"mount -t tmpfs -o size={size} tmpfs /dev/shm && make {words} {common}"],
            cwd=ROOT,
            env=ENV,
            text=True,
            timeout=LIMIT_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == status, done.stdout[-3000:]
        assert status == 0 or ("error: shared memory is too small" in done.stdout and "Traceback" not in done.stdout)
        return done.stdout

    ends("cache-teacher RECIPE=demo PRETRAINED=0 VIEWS=4 WORKERS=2 SET=views.size=224", stage1)
    train = f"distill STUDENT=test_resnet EPOCHS=1 RUN={tmp_path / 'run'}"
    if stage2 is not None and "or set --workers 1" in ends(f"{train} WORKERS=2", stage2):
        ends(f"{train} WORKERS=1", 0)
