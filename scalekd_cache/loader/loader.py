"""Training batches from one cache, or from multiple caches with the same views, in the order defined by `order.py`.

In: open caches, an order, and this rank's micro-batches. Out: one `Batch` per micro-batch, in the order of the run.
Invariant: a batch is complete and verified, or an error names the record. The loader's position is the step number, so
a resumed loader continues with the next sample, whatever the number of workers.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.data.workers import load_items, prefetch_count
from scalekd_cache.errors import UserError
from scalekd_cache.loader.batch_size import BatchLimits, micro_batches_of_rank, smallest_micro_batch
from scalekd_cache.loader.order import (
    Ids,
    Order,
    SparseEpoch,
    featured,
    micro_batch_ids,
)
from scalekd_cache.loader.record_pixels import RecordPixels, verified_pixels
from scalekd_cache.loader.target_cache import (
    StoredTargets,
    TargetCache,
    TargetCodecs,
    check_same_views,
    feature_counts,
    rebuild,
    with_pixels,
)
from scalekd_cache.store.base import Record
from scalekd_cache.store.manifest import joint_fingerprint
from scalekd_cache.store.reader import Cache

DIGEST_STEPS = 2
"""Number of steps at the start of a session for which the digests of all stored views are compared."""
DIGEST_EVERY = 16
"""After these steps, one in this many stored views is compared, rotating through all views. Replayed views are always
compared, because the image may have been replaced; the digest adds 9% to the cost of generating a view
(docs/LOG.md)."""

MOST_WAITING = 4
"""Maximum number of micro-batches that a worker prefetches."""


class Batch(NamedTuple):
    """One micro-batch; all its samples have the same view number."""

    images: Tensor
    """(B, 3, H, W) uint8, contiguous in the main process and from workers: the teacher's input pixels, in the memory
    layout of stage 1."""
    labels: Tensor
    """(B,) int64."""
    stored: tuple[StoredTargets, ...]
    """Each teacher's targets, with one entry per cache."""
    ids: Tensor
    """(B,) int64: positions in the view's canonical order."""
    view: int
    """The view number."""

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to `device`, asynchronously if the memory is pinned; `ids` stay on the host for logs."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return self._replace(images=images, labels=labels, stored=tuple(one.to(device) for one in self.stored))


class Slot(NamedTuple):
    """Identifies a micro-batch in the run; passed to loader workers as the index."""

    epoch: int
    step: int
    micro: int
    check_all: bool


class MicroBatches(Dataset[Batch]):
    """Micro-batches indexed by `Slot`; runs in a loader worker."""

    def __init__(
        self,
        cache: Cache,
        order: Order,
        global_batch: int,
        micro_batch: int,
        *,
        others: Sequence[Cache] = (),
        features: Sequence[int] | None = None,
        views: int | None = None,
        pixels: Cache | None = None,
        data: str | None = None,
        verbose: bool = True,
    ) -> None:
        manifest = cache.manifest
        self.cache = cache
        self.pixels = pixels
        self.views = views or manifest.num_views
        self.verbose = verbose
        self.order = order
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        counts = feature_counts([cache, *others], features, featured(order, micro_batch)[0], micro_batch)
        targets = [TargetCache(cache, counts[0])]
        targets += [TargetCache(other, count, cache) for other, count in zip(others, counts[1:], strict=True)]
        self.targets = tuple(targets)
        self._sparsest = max(targets, key=lambda one: one.cache.manifest.facts.features_every)
        self._epoch: SparseEpoch | None = None
        views_config = ViewConfig(**from_plain(manifest.facts.view_recipe))
        source: Source | None = None
        if views_config.pixels == "replayed":
            source = open_cache_source(manifest.facts.data, data, "train")
        self.record_pixels = RecordPixels(views_config, source)

    def __getitem__(self, slot: Slot) -> Batch:
        view = slot.epoch % self.views
        for target in self.targets:
            target.wait_for(view, self._print_once)
        ids = self.ids(slot.epoch, slot.step, slot.micro)
        found = [target.read(ids, view) for target in self.targets]
        for target, others in zip(self.targets[1:], found[1:], strict=True):
            check_same_views(found[0], others, target.cache, view, rebuild(self.targets[0].cache))
        records = self._with_pixels(found[0], ids, view)
        always, turn = slot.check_all or self.record_pixels.source is not None, slot.epoch // self.views
        images = [
            verified_pixels(
                self.record_pixels,
                record,
                self.cache,
                view,
                check=always or (position + turn) % DIGEST_EVERY == 0,
            )
            for record, position in zip(records, ids.tolist(), strict=True)
        ]
        return Batch(
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            labels=torch.tensor([record.label for record in records], dtype=torch.int64),
            stored=tuple(target.stored(some) for target, some in zip(self.targets, found, strict=True)),
            ids=torch.from_numpy(ids),
            view=view,
        )

    def ids(self, epoch: int, step: int, micro: int) -> Ids:
        """Positions (B,) of a micro-batch's samples in the epoch's view."""
        sizes = {"step": step, "micro": micro, "global_batch": self.global_batch, "micro_batch": self.micro_batch}
        if self.order.features_every == 1:
            return micro_batch_ids(self.order, epoch=epoch, **sizes)
        if self._epoch is None or self._epoch.epoch != epoch:
            view = epoch % self.views
            self._epoch = SparseEpoch(self.order, epoch, lambda positions: self._sparsest.has_features(positions, view))
        return self._epoch.micro_batch_ids(**sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}

    def _print_once(self, text: str) -> None:
        """Print what the loader is waiting for. Only one worker prints."""
        worker = get_worker_info()
        if self.verbose and (worker is None or worker.id == 0):
            print(text, flush=True)

    def _with_pixels(self, records: list[Record], ids: NDArray[np.int64], view: int) -> list[Record]:
        """The records, with pixels from the cache that stores the shared pixels, if any."""
        if self.pixels is None:
            return records
        return with_pixels(records, self.pixels.read(ids, view), self.pixels, view)


def check_workers(cache: Cache, codecs: Sequence[TargetCodecs], micro_batch: int, workers: int) -> int:
    """Approximate size in bytes of a micro-batch sent by a worker, with targets in these codecs. Raises `UserError` if
    there is too little shared memory."""
    facts = cache.manifest.facts
    pixels, logits = 3 * int(facts.view_recipe["size"]) ** 2, 4 * len(facts.class_names)
    size = micro_batch * (pixels + sum(one.row_bytes + logits for one in codecs) + 16)
    prefetch_count(workers, size, MOST_WAITING)
    return size


class CacheLoader:
    """One rank's micro-batches, from a given step to the end of the run.

    Iterating yields `Batch`es: for each step, the rank's micro-batches in order. `state_dict` holds the position.
    """

    def __init__(
        self,
        cache: Cache,
        order: Order,
        *,
        epochs: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        others: Sequence[Cache] = (),
        features: Sequence[int] | None = None,
        views: int | None = None,
        pixels: Cache | None = None,
        data: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.order = order
        self.epochs = epochs
        self.global_batch = global_batch
        self.micros = micro_batches_of_rank(global_batch, micro_batch, rank, world_size)
        shares = [count / micro_batch for count in features or () if count]
        unit = math.lcm(order.features_every, smallest_micro_batch(shares))
        self.limits = BatchLimits(order, micro_batch, world_size, unit)
        self.steps_per_epoch = self.limits.steps(global_batch)
        self.step = 0
        self._fingerprint = joint_fingerprint(one.manifest.facts for one in (cache, *others))
        self._dataset = MicroBatches(
            cache,
            order,
            global_batch,
            micro_batch,
            others=others,
            features=features,
            views=views,
            pixels=pixels,
            data=data,
            verbose=rank == 0,
        )
        self.codecs: list[TargetCodecs] = [target.codecs for target in self._dataset.targets]
        self._workers = workers
        self._pin_memory = pin_memory
        self._batch_bytes = check_workers(cache, self.codecs, micro_batch, workers)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps in the whole run."""
        return self.epochs * self.steps_per_epoch

    def describe(self, step: int, micro: int) -> str:
        """Describe the view and shards from which a step's micro-batch is read; only the view, if its shards are
        unknown in this process."""
        data = self._dataset
        epoch, inside = divmod(step, self.steps_per_epoch)
        view = epoch % data.views
        if not all(target.is_loaded(view) for target in data.targets):
            return f"micro-batch {micro} (view {view})"
        ids = data.ids(epoch, inside, micro)
        shards = sorted({data.cache.shard_at(position, view) for position in ids.tolist()})
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return f"micro-batch {micro} (view {view}, shards {', '.join(shards[:3])}{more})"

    def _slots(self) -> Iterator[Slot]:
        """The remaining micro-batches; in a DataLoader worker, every n-th of them, where n is the number of workers."""
        worker = get_worker_info()
        slots = self._all_slots()
        return slots if worker is None else itertools.islice(slots, worker.id, None, worker.num_workers)

    def _all_slots(self) -> Iterator[Slot]:
        first = self.step
        for step in range(first, self.total_steps):
            for micro in self.micros:
                epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
                yield Slot(epoch, step_in_epoch, micro, step - first < DIGEST_STEPS)

    def __iter__(self) -> Iterator[Batch]:
        batches = load_items(
            self._dataset,
            self._slots(),
            workers=self._workers,
            item_bytes=self._batch_bytes,
            max_prefetch=MOST_WAITING,
            pin_memory=self._pin_memory,
        )
        whole = get_worker_info() is None  # a worker of a torch DataLoader has only a share, and keeps the position
        for count, batch in enumerate(batches, start=1):
            if whole and count % len(self.micros) == 0:  # before the yield, so that a checkpoint after it counts it
                self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and the options that determine the sample order."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved position.

        Raises:
            UserError: the saved position belongs to a different sample order, or is outside this run.
        """
        identity = self._identity()
        different = [name for name in identity if state.get(name) != identity[name]]
        if different:
            raise UserError(
                "the saved position belongs to a different sample order",
                got=", ".join(f"{name}={state.get(name)}" for name in different),
                expected=", ".join(f"{name}={identity[name]}" for name in different),
                fix="resume with the original options, or start a new run",
            )
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self.total_steps:
            raise UserError(
                "the saved position is outside this run",
                got=f"step={step!r}",
                expected=f"an integer from 0 to {self.total_steps:,}, the number of steps in all epochs",
                fix="set the number of epochs to at least that of the saved run",
            )
        self.step = step

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "seed": self.order.seed,
            "views": self._dataset.views,
            "num_samples": self.order.num_samples,
            "block": self.order.block,
            "window": self.order.window,
            "global_batch": self.global_batch,
        }
