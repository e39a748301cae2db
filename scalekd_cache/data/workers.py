"""Loads items in worker processes, with limited prefetching, shared-memory transfer and worker error reporting.

In: a dataset, the order of its items, and the size of one item in bytes. Out: the items, in that order.
Invariant: all tensors of an item are sent in one block of shared memory (one file descriptor) and copied out of it when
received, by the loader or by its caller; the worker then reuses the block. Prefetching is limited by the free shared
memory and the open-file limit. A worker that cannot send an item exits, and a worker that exits raises an error. Every
worker runs one thread.
"""

import contextlib
import dataclasses
import itertools
import math
import multiprocessing.queues
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from scalekd_cache.config.machine import SHARED_MEMORY, shared_memory
from scalekd_cache.errors import UserError, counted, worker_failure

SHARED_MEMORY_FIX = "give the container more shared memory (docker run --shm-size=8g or --ipc=host)"
MAX_PREFETCH_BYTES = 2 << 30
"""Maximum number of bytes that one loader prefetches in shared memory, even if more is free."""
ALIGNMENT = 64
"""Alignment of tensors in a block, in bytes."""
RESERVED_FILES = 64
"""Number of file descriptors reserved for everything else in the process."""
FILES_PER_WORKER = 7
"""Number of file descriptors that one worker uses in the main process: pipes, process handle and the block being
read."""


def bytes_per_worker(workers: int) -> int:
    """Number of bytes that each worker may prefetch; together, the workers use half of the free shared memory.

    The other half is for a second loader (evaluation during training). Processes on one machine get equal shares.
    """
    free = shared_memory()
    share = MAX_PREFETCH_BYTES if free is None else free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MAX_PREFETCH_BYTES, share) // max(1, workers)


def prefetch_count(workers: int, item_bytes: int, most: int) -> int:
    """Number of items that each worker may prefetch, from 1 to `most`; 0 without workers.

    Raises:
        UserError: shared memory or the open-file limit is too small for one item per worker.
    """
    if not workers:
        return 0
    page = 4096
    fits = bytes_per_worker(workers) // (item_bytes + page)
    if fits < 1:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        raise UserError(
            "shared memory is too small for the loader's worker processes",
            got=f"{(shared_memory() or 0) / 1e6:,.0f} MB free",
            expected=f"at least 2 x {counted(workers, 'worker')} x {item_bytes / 1e6:,.1f} MB"
            + ("" if ranks == "1" else f" x {ranks} processes on this machine"),
            where=SHARED_MEMORY,
            fix=f"{SHARED_MEMORY_FIX}, or set --workers {bytes_per_worker(1) // (item_bytes + page)}",
        )
    open_files = _open_files()
    room = max(0, open_files.limit - open_files.now - RESERVED_FILES)
    left = room // workers - FILES_PER_WORKER
    if left < 1:
        needed = open_files.now + RESERVED_FILES + workers * (FILES_PER_WORKER + 1)
        raise UserError(
            "the open-file limit is too low for the loader's worker processes",
            got=f"limit {open_files.limit} (ulimit -n), {counted(open_files.now, 'file')} open",
            expected=f"at least {needed} for {counted(workers, 'worker')}",
            fix="raise the limit (ulimit -n 65536; docker run --ulimit nofile=65536), "
            f"or set --workers {room // (FILES_PER_WORKER + 1)}",
        )
    return min(most, fits, left)


def load_items(
    dataset: Dataset[Any],
    order: Iterator[Any],
    *,
    workers: int,
    item_bytes: int,
    max_prefetch: int,
    pin_memory: bool = False,
    borrow: bool = False,
) -> Iterator[Any]:
    """Yield `dataset[index]` for each index in `order`; `order` is advanced only when a worker needs an index.

    Args:
        dataset: items must be tensors, or lists, tuples and named tuples of tensors and small values.
        order: indices into the dataset.
        workers: number of worker processes (0: load in this process).
        item_bytes: approximate size of one item's tensors.
        max_prefetch: maximum number of items that each worker prefetches.
        pin_memory: return tensors in page-locked memory.
        borrow: return views of the item's shared memory instead of copies. They are overwritten once the next item is
            taken.

    Raises:
        UserError: there is too little shared memory or there are too few file descriptors, or a worker exited.
    """
    prefetch = prefetch_count(workers, item_bytes, max_prefetch)
    loader = DataLoader(
        _SharedMemoryItems(dataset, prefetch + 1, item_bytes) if workers else dataset,
        batch_size=None,
        sampler=_LazySampler(order),
        collate_fn=_identity,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch or None,
        worker_init_fn=_init_worker,
    )
    received = iter(loader)
    mapped: dict[tuple[int, int], Tensor] = {}
    try:
        for item in received:
            if isinstance(item, _SharedItem):
                if not pin_memory:
                    mapped[item.place] = item.block  # stays mapped: remapping costs as much as the copy
                item = item.received(borrow=borrow)
            yield item
            del item
    except (RuntimeError, EOFError, ConnectionError) as error:
        raise ((worker_failure(error) if workers else None) or error) from error
    finally:  # shut down now: while a traceback keeps the iterator alive, dead workers can make torch raise anywhere
        if workers:
            with contextlib.suppress(RuntimeError):  # it repeats the same error; torch cleans up anyway
                received._shutdown_workers()  # type: ignore[attr-defined]


class _OpenFiles(NamedTuple):
    now: int
    limit: int


def _open_files() -> _OpenFiles:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        now = len(os.listdir("/proc/self/fd"))
    except OSError:
        now = RESERVED_FILES
    return _OpenFiles(now, 1 << 20 if limit == resource.RLIM_INFINITY else limit)


class _TensorSlot(NamedTuple):
    """Position of a tensor in a block."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


Place = tuple[int, ...]
"""Position in nested lists and tuples: one index per level."""


@dataclass(frozen=True)
class _SharedItem:
    """An item in transit, with its tensors in one block."""

    block: Tensor
    """(N,) uint8, in shared memory or page-locked."""
    place: tuple[int, int]
    """Worker index, and the block's index among the worker's blocks."""
    slots: list[tuple[Place, _TensorSlot]]
    """Position of each tensor in the item and in the block."""
    rest: Any
    """The item with None instead of its tensors."""

    def pin_memory(self) -> "_SharedItem":
        """Return a pinned copy, so that the worker can reuse the block. DataLoader's pinning thread calls this."""
        return dataclasses.replace(self, block=self.block.pin_memory())

    def received(self, *, borrow: bool = False) -> Any:
        """The item. Unless it is borrowed, the shared block is copied, because the worker reuses it."""
        block = self.block if borrow or self.block.is_pinned() else self.block.clone()
        item = self.rest
        for path, slot in self.slots:
            count = slot.dtype.itemsize * math.prod(slot.shape)
            item = _put(item, path, block[slot.start : slot.start + count].view(slot.dtype).view(slot.shape))
        return item


class _SharedMemoryItems(Dataset[_SharedItem]):
    """Wraps a dataset in a worker and puts the tensors of its items into shared memory.

    The worker fills its blocks in turn instead of allocating new ones, because new pages cost four times as much as the
    copy into them. There is one more block than prefetched items, so before a block is reused, the main process has
    taken the item after the one in that block. Shared memory is allocated here because an error in the sending thread
    would be lost, and the main process would hang.

    Args:
        dataset: the items.
        blocks: number of blocks per worker.
        block_bytes: size of a block in bytes; larger items get larger blocks.
    """

    def __init__(self, dataset: Dataset[Any], blocks: int, block_bytes: int) -> None:
        self.dataset, self._block_bytes = dataset, block_bytes
        self._blocks: list[Tensor | None] = [None] * blocks
        self._turn = 0

    def __getitem__(self, place: Any) -> _SharedItem:
        tensors: list[tuple[Place, Tensor]] = []
        rest = _without_tensors(self.dataset[place], (), tensors)
        starts = list(itertools.accumulate((-(-t.nbytes // ALIGNMENT) * ALIGNMENT for _, t in tensors), initial=0))
        number, block = self._next_block(max(starts[-1], ALIGNMENT))
        slots = []
        for start, (path, tensor) in zip(starts, tensors, strict=False):
            flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element may have any stride
            block[start : start + tensor.nbytes] = flat.view(torch.uint8)
            slots.append((path, _TensorSlot(start, tensor.dtype, tuple(tensor.shape))))
        worker = get_worker_info()
        assert worker is not None
        return _SharedItem(block, (worker.id, number), slots, rest)

    def _next_block(self, size: int) -> tuple[int, Tensor]:
        """The next block's number and its first `size` bytes."""
        number = self._turn = (self._turn + 1) % len(self._blocks)
        block = self._blocks[number]
        if block is None or len(block) < size:
            self._blocks[number] = None  # frees it first
            block = self._blocks[number] = _shared_block(max(size, self._block_bytes))
        return number, block[:size]


def _shared_block(size: int) -> Tensor:
    """(size,) uint8 in shared memory, allocated as torch's default collation does."""
    try:
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UserError(
            "a loader worker process ran out of shared memory",
            got=f"{(shared_memory() or 0) / 1e6:,.1f} MB of free shared memory ({f'{error}'.splitlines()[0]})",
            expected=f"at least {size / 1e6:,.1f} MB",
            where=SHARED_MEMORY,
            fix=f"{SHARED_MEMORY_FIX}, or lower --workers (0: load in the main process)",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def _without_tensors(item: Any, path: Place, tensors: list[tuple[Place, Tensor]]) -> Any:
    """The item with None instead of its tensors, which are added to `tensors` with their positions."""
    if isinstance(item, Tensor):
        tensors.append((path, item))
        return None
    if isinstance(item, list | tuple):
        return _like(item, [_without_tensors(part, (*path, n), tensors) for n, part in enumerate(item)])
    return item


def _put(item: Any, path: Place, tensor: Tensor) -> Any:
    """The item with the tensor inserted; lists are changed in place, because the receiver owns the item."""
    if not path:
        return tensor
    first = path[0]
    part = _put(item[first], path[1:], tensor)
    if isinstance(item, list):
        item[first] = part
        return item
    return _like(item, [*item[:first], part, *item[first + 1 :]])


def _like(item: Any, parts: list[Any]) -> Any:
    """The parts as a list, tuple or named tuple of the item's type."""
    return item._make(parts) if hasattr(item, "_make") else type(item)(parts)


class _LazySampler:
    """A sampler that draws indices from an iterator on demand."""

    def __init__(self, places: Iterator[Any]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[Any]:
        return self._places


def _identity(item: Any) -> Any:
    return item


def _init_worker(_: int) -> None:
    """Set up a worker process; called before its first item."""
    torch.set_num_threads(1)
    # By default, if an item cannot be pickled, Python prints the error and drops the item; the main process would hang.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit_on_send_error)  # type: ignore[attr-defined]


def _exit_on_send_error(error: BaseException, _: object) -> None:
    print(f"error: a worker process cannot send an item: {type(error).__name__}: {error}", flush=True)
    os._exit(1)
