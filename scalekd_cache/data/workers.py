"""Worker processes of a loader: how much they keep waiting, how it reaches the main process, and what ends them.

In: a data set, the order of its items, the bytes of one item. Out: the items, in that order.
Invariant: the tensors of an item cross in one block of shared memory, so with one file descriptor, and are copied out
of it on arrival. What waits is bounded by the free shared memory and by the limit of open files. A worker that cannot
send an item ends, and a worker that ends is an error.
"""

import contextlib
import multiprocessing.queues
import os
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from scalekd_cache.errors import UserError, worker_failure

SHARED_MEMORY = Path("/dev/shm")
WAITING_BYTES = 2 << 30
"""Most bytes that wait in the shared memory of one loader, however much is free."""
ALIGNMENT = 64
"""Tensors in a block begin at multiples of this many bytes."""
OTHER_FILES = 64
"""Descriptors that are left for everything else a process opens."""
FILES_A_WORKER = 6
"""Descriptors of the main process for the pipes and the handle of one worker."""


def bytes_a_worker(workers: int) -> int:
    """Bytes that each of some workers may keep waiting: together half of the shared memory that is free now.

    The other half is for a second loader (an evaluation within training). Processes on one machine share it evenly.
    """
    free = _free_bytes()
    share = WAITING_BYTES if free is None else free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(WAITING_BYTES, share) // max(1, workers)


def waiting_items(workers: int, item_bytes: int, most: int) -> int:
    """Items that each worker may keep waiting, 1 to `most`; 0 without workers.

    Raises:
        UserError: there is no room for one item a worker, in shared memory or in the table of open files.
    """
    if not workers:
        return 0
    fits = bytes_a_worker(workers) // (item_bytes + 4096)  # whole pages
    if fits < 1:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        raise UserError(
            "shared memory is too small for the loader's worker processes",
            got=f"{(_free_bytes() or 0) / 1e6:,.0f} MB free",
            expected=f"twice {workers} workers x {item_bytes / 1e6:,.1f} MB"
            + ("" if ranks == "1" else f" x {ranks} processes on this machine"),
            where=SHARED_MEMORY,
            fix="give the container more (docker run --shm-size=8g, or --ipc=host), or use fewer WORKERS (0: none)",
        )
    open_files = _open_files()
    left = (open_files.limit - open_files.now - OTHER_FILES) // workers - FILES_A_WORKER
    if left < 1:
        raise UserError(
            "the limit of open files is too low for the loader's worker processes",
            got=f"{open_files.limit} files (ulimit -n), {open_files.now} of them open",
            expected=f"at least {open_files.now + OTHER_FILES + workers * (FILES_A_WORKER + 1)} for {workers} workers",
            fix="raise it (ulimit -n 65536; docker run --ulimit nofile=65536), or use fewer WORKERS (0: none)",
        )
    return min(most, fits, left)


def items_of(
    dataset: Dataset[Any],
    order: Iterator[Any],
    *,
    workers: int,
    item_bytes: int,
    most_waiting: int,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """`dataset[place]` for each place of `order`, which is asked for a place when a worker needs one.

    Args:
        dataset: items are tensors, or lists, tuples and named tuples that hold tensors and small values.
        order: places in the data set.
        workers: processes that make items (0: this one).
        item_bytes: about the bytes of the tensors of one item.
        most_waiting: most items that each worker keeps waiting.
        pin_memory: give tensors in page-locked memory.

    Raises:
        UserError: no room for what the workers send, or a worker that ended.
    """
    loader = DataLoader(
        _Sending(dataset) if workers else dataset,
        batch_size=None,
        sampler=_Order(order),
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=waiting_items(workers, item_bytes, most_waiting) or None,
        worker_init_fn=_begin,
    )
    received = iter(loader)
    try:
        for item in received:
            yield item.received() if isinstance(item, _Sent) else item
    except RuntimeError as error:
        raise (worker_failure(error) or error) from error
    finally:  # now: as long as a traceback keeps the iterator, torch raises for its dead workers anywhere
        if workers:
            with contextlib.suppress(RuntimeError):  # the same error once more; torch clears up all the same
                received._shutdown_workers()  # type: ignore[attr-defined]


class _OpenFiles(NamedTuple):
    now: int
    limit: int


def _open_files() -> _OpenFiles:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        now = len(os.listdir("/proc/self/fd"))
    except OSError:
        now = OTHER_FILES
    return _OpenFiles(now, 1 << 20 if limit == resource.RLIM_INFINITY else limit)


def _free_bytes() -> int | None:
    """Free bytes of shared memory; None where it is no file system (macOS)."""
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


class _Place(NamedTuple):
    """Where a tensor lies in a block."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Sent:
    """An item on its way: its tensors in one block, the rest with a `_Place` for each."""

    block: Tensor
    """(N,) uint8, in shared memory or page-locked."""
    rest: Any

    def pin_memory(self) -> "_Sent":
        """What DataLoader's pinning thread calls: a copy, after which the shared block is given back."""
        return _Sent(self.block.pin_memory(), self.rest)

    def received(self) -> Any:
        """The item. The shared block is copied: its descriptor is closed now, not when the last tensor goes."""
        block = self.block if self.block.is_pinned() else self.block.clone()

        def tensor(place: _Place) -> Tensor:
            count = place.dtype.itemsize * torch.Size(place.shape).numel()
            return block[place.start : place.start + count].view(place.dtype).view(place.shape)

        return _replaced(self.rest, _Place, tensor)


class _Sending(Dataset[_Sent]):
    """A data set in a worker: its items, ready to be sent.

    The shared memory is taken here and not by the thread that sends, where an error would be lost and waited for.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, place: Any) -> _Sent:
        tensors: list[tuple[_Place, Tensor]] = []
        end = 0

        def placed(tensor: Tensor) -> _Place:
            nonlocal end
            place = _Place(end, tensor.dtype, tuple(tensor.shape))
            tensors.append((place, tensor))
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return place

        rest = _replaced(self.dataset[place], Tensor, placed)
        block = _shared_block(max(end, ALIGNMENT))
        for place_of, tensor in tensors:
            block[place_of.start : place_of.start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        return _Sent(block, rest)


def _shared_block(size: int) -> Tensor:
    """(size,) uint8 in shared memory, as torch's own collation takes it."""
    try:
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # in C++; the last part is what the system said
        raise UserError(
            "a worker process of the loader found no shared memory",
            got=f"{error}".splitlines()[0],
            expected=f"{size / 1e6:.1f} MB; {(_free_bytes() or 0) / 1e6:,.1f} MB are free",
            where=SHARED_MEMORY,
            fix="give the container more (docker run --shm-size=8g, or --ipc=host), or use fewer WORKERS (0: none)",
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def _replaced(item: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The item with everything of a kind in it changed."""
    if isinstance(item, kind):
        return change(item)
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_replaced(part, kind, change) for part in item))
    if isinstance(item, list | tuple):
        return type(item)(_replaced(part, kind, change) for part in item)
    return item


class _Order:
    """A sampler over places that are made as they are needed."""

    def __init__(self, places: Iterator[Any]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[Any]:
        return self._places


def _as_it_is(item: Any) -> Any:
    return item


def _begin(_: int) -> None:
    """In a worker, before its first item."""
    torch.set_num_threads(1)
    # Python prints what its sending thread cannot send, and drops it: the main process would wait for it without end.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: BaseException, _: object) -> None:
    print(f"error: a worker process cannot send an item: {type(error).__name__}: {error}", flush=True)
    os._exit(1)
