"""Training batches from a cache, in the order of `order.py`.

In: an open cache, an order, this rank's share. Out: `Batch`es of one micro-batch each, in the order of the run.
Invariant: a batch is complete and verified, or an error names the record. The position is the step number, so a
resumed loader continues with the next sample for any number of workers.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from scalekd_cache.codec import codec_from_config
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.codec.pooled import second_codec_from_config
from scalekd_cache.codec.recomputed import RecomputedLogits
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.data.workers import load_items, prefetch_count
from scalekd_cache.errors import UserError
from scalekd_cache.loader.order import (
    Ids,
    Order,
    SparseEpoch,
    featured,
    micro_batch_ids,
    micro_batches_of_rank,
    steps_per_epoch,
)
from scalekd_cache.loader.record_pixels import RecordPixels, wrong_digest
from scalekd_cache.store.base import Parts, Record
from scalekd_cache.store.growing import GrowingCache
from scalekd_cache.store.reader import Cache

DIGEST_STEPS = 2
"""Steps at the start of a session in which the digests of all stored views are compared."""
DIGEST_EVERY = 16
"""After these steps, one in this many stored views is compared, rotating over all views. Replayed views are always
compared: the image may have been replaced, and the digest costs 9 % of generating a view (docs/LOG.md)."""

PART_NAMES = {Parts.LABEL: "label", Parts.FEATURES: "features", Parts.SECOND: "pooled embedding"}
"""Parts of a record that training may need."""
MOST_WAITING = 4
"""Maximum number of micro-batches that a worker prefetches."""


class Batch(NamedTuple):
    """One micro-batch of one view number."""

    images: Tensor
    """(B, 3, H, W) uint8: the pixels that were the teacher's input."""
    labels: Tensor
    """(B,) int64."""
    codes: Tensor
    """(F, bytes_per_view) uint8: rows of the feature codec for the first F <= B samples, decoded on the training
    device."""
    logits: Tensor
    """(B, K) float32: decoded logits (K = 0 if the logit codec stores none)."""
    second: Tensor | None
    """(B, bytes_per_view) uint8: rows of the codec of pooled embeddings; None for a cache without them."""
    ids: Tensor
    """(B,) int64: positions in the view's canonical order."""
    view: int
    """The view number."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`, asynchronously where the memory is pinned; `ids` stay on the host for logs."""
        tensors = (self.images, self.labels, self.codes, self.logits)
        images, labels, codes, logits = (tensor.to(device, non_blocking=True) for tensor in tensors)
        second = None if self.second is None else self.second.to(device, non_blocking=True)
        return Batch(images, labels, codes, logits, second, self.ids, self.view)


class Slot(NamedTuple):
    """A micro-batch of the run: the index passed to loader workers."""

    epoch: int
    step: int
    micro: int
    check_all: bool


class MicroBatches(Dataset[Batch]):
    """Micro-batches by `Slot`; runs in a loader worker."""

    def __init__(
        self,
        cache: Cache,
        order: Order,
        global_batch: int,
        micro_batch: int,
        *,
        features: int | None = None,
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
        self.codec: FeatureCodec = codec_from_config(manifest.facts.codec, cache.root)
        self.logit_codec = logit_codec_from_config(manifest.facts.logit_codec)
        self.second_codec = second_codec_from_config(manifest.facts.second_codec)
        self.needed = Parts.LABEL if manifest.facts.labeled else Parts(0)
        if self.second_codec is not None:
            self.needed |= Parts.SECOND
        if features is None or isinstance(self.logit_codec, RecomputedLogits):
            features = featured(order, micro_batch)[0]
        self.features: int = features
        self._epoch: SparseEpoch | None = None
        views_config = ViewConfig(**from_plain(manifest.facts.view_recipe))
        source: Source | None = None
        if views_config.pixels == "replayed":
            source = open_cache_source(manifest.facts.data, data, "train")
        self.record_pixels = RecordPixels(views_config, source)

    def __getitem__(self, slot: Slot) -> Batch:
        view = slot.epoch % self.views
        if isinstance(self.cache, GrowingCache):
            self.cache.wait_for(view, self._print_once)
        ids = self.ids(slot.epoch, slot.step, slot.micro)
        records = self._with_pixels(self.cache.read(ids, view), ids, view)
        self._check_parts(records, view)
        always, turn = slot.check_all or self.record_pixels.source is not None, slot.epoch // self.views
        images = [
            self._pixels(record, view, check=always or (position + turn) % DIGEST_EVERY == 0)
            for record, position in zip(records, ids.tolist(), strict=True)
        ]
        codes = self.codec.unpack([record.features for record in records[: self.features]])
        second: Tensor | None = None
        if self.second_codec is not None:
            second = torch.from_numpy(self.second_codec.unpack([record.second for record in records]))
        return Batch(
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
            labels=torch.tensor([record.label for record in records], dtype=torch.int64),
            codes=torch.from_numpy(codes),
            logits=torch.from_numpy(np.stack([self.logit_codec.decode(record.logits) for record in records])),
            second=second,
            ids=torch.from_numpy(ids),
            view=view,
        )

    def ids(self, epoch: int, step: int, micro: int) -> Ids:
        """Positions (B,) of a micro-batch, in the view that the epoch reads."""
        sizes = {"step": step, "micro": micro, "global_batch": self.global_batch, "micro_batch": self.micro_batch}
        if self.order.features_every == 1:
            return micro_batch_ids(self.order, epoch=epoch, **sizes)
        if self._epoch is None or self._epoch.epoch != epoch:
            view = epoch % self.views
            self._epoch = SparseEpoch(self.order, epoch, lambda positions: self.cache.has_features(positions, view))
        return self._epoch.micro_batch_ids(**sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": None}

    def _check_parts(self, records: list[Record], view: int) -> None:
        """Raise `UserError` for a record without a part that is needed: label, features, pooled embedding; `Cache.read`
        checks labels against the classes."""
        for number, record in enumerate(records):
            needed = self.needed | (Parts.FEATURES if number < self.features else Parts(0))
            missing = needed & ~record.parts
            if missing:
                raise UserError(
                    "a record has no " + " or no ".join(PART_NAMES[part] for part in missing),
                    got=repr(record.parts),
                    expected=" and ".join(PART_NAMES[part] for part in needed),
                    where=f"view {view} of {record.key} in {self.cache.root}",
                )

    def _print_once(self, text: str) -> None:
        """Print what the loader is waiting for, from one worker only."""
        worker = get_worker_info()
        if self.verbose and (worker is None or worker.id == 0):
            print(text, flush=True)

    def _with_pixels(self, records: list[Record], ids: NDArray[np.int64], view: int) -> list[Record]:
        """The records, with pixels from the cache whose pixels are shared, if any."""
        if self.pixels is None:
            return records
        whole = []
        for record, other in zip(records, self.pixels.read(ids, view), strict=True):
            got, expected = ((one.key, one.label, one.digest, one.view) for one in (other, record))
            if got != expected:
                raise UserError(
                    "the shared pixels and the features belong to different views",
                    got=f"{other.key}, digest {other.digest}",
                    expected=f"{record.key}, digest {record.digest}",
                    where=f"view {view} of {self.pixels.root}, for {self.cache.root}",
                    fix="use the cache that was set as --pixels-from when this cache was made",
                )
            whole.append(record._replace(pixels=other.pixels))
        return whole

    def _pixels(self, record: Record, view: int, *, check: bool) -> NDArray[np.uint8]:
        """The view's uint8 pixels (size, size, 3), compared with the digest of the teacher's input if `check`."""
        pixels, replayed = self.record_pixels(record), self.record_pixels.source is not None
        assert pixels is not None
        wrong = wrong_digest(record, pixels) if check else None
        if wrong is not None:
            raise UserError(
                "a view's pixels differ from the teacher's input",
                got=f"digest {wrong}",
                expected=f"digest {record.digest}",
                where=f"view {view} of {record.key} in {self.cache.root}",
                fix=("restore the image if it was replaced after stage 1, or " if replayed else "")
                + "train with the library versions that wrote the cache: "
                + ", ".join(f"{name} {version}" for name, version in self.cache.manifest.facts.versions.items()),
            )
        return pixels


def check_workers(cache: Cache, codec: FeatureCodec, micro_batch: int, workers: int) -> int:
    """Approximate bytes of a micro-batch in transfer from a worker; `UserError` if shared memory is too small."""
    manifest = cache.manifest
    pixels, logits = 3 * int(manifest.facts.view_recipe["size"]) ** 2, 4 * len(manifest.facts.class_names)
    second = second_codec_from_config(manifest.facts.second_codec)
    row = codec.bytes_per_view + (0 if second is None else second.bytes_per_view)
    size = micro_batch * (pixels + row + logits + 16)
    prefetch_count(workers, size, MOST_WAITING)
    return size


class CacheLoader:
    """The micro-batches of one rank from a step to the end of the run.

    Iterating yields `Batch`es: for every step the rank's micro-batches in order. `state_dict` is the position.
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
        features: int | None = None,
        views: int | None = None,
        pixels: Cache | None = None,
        data: str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.order = order
        self.epochs = epochs
        self.global_batch = global_batch
        self.micros = micro_batches_of_rank(global_batch, micro_batch, rank, world_size)
        self.steps_per_epoch = steps_per_epoch(order, global_batch, micro_batch)
        self.step = 0
        self._fingerprint = cache.manifest.facts.fingerprint
        self._dataset = MicroBatches(
            cache,
            order,
            global_batch,
            micro_batch,
            features=features,
            views=views,
            pixels=pixels,
            data=data,
            verbose=rank == 0,
        )
        self.codec = self._dataset.codec
        self.logit_codec = self._dataset.logit_codec
        self.second_codec = self._dataset.second_codec
        self._workers = workers
        self._pin_memory = pin_memory
        self._batch_bytes = check_workers(cache, self.codec, micro_batch, workers)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def describe(self, step: int, micro: int) -> str:
        """The view and shards that a micro-batch of a step comes from, as text."""
        data = self._dataset
        epoch, inside = divmod(step, self.steps_per_epoch)
        ids = data.ids(epoch, inside, micro)
        view = epoch % data.views
        shards = sorted({data.cache.shard_at(position, view) for position in ids.tolist()})
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return f"micro-batch {micro} (view {view}, shards {', '.join(shards[:3])}{more})"

    def _slots(self) -> Iterator[Slot]:
        """The micro-batches that are left; in a worker of torch's DataLoader, every n-th of them, n workers."""
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
        for count, batch in enumerate(batches, start=1):
            if count % len(self.micros) == 0:  # before the yield, so that a checkpoint after it counts this step
                self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and the options that determine the order of samples."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: the saved position belongs to another order of samples.
        """
        identity = self._identity()
        different = [name for name in identity if state.get(name) != identity[name]]
        if different:
            raise UserError(
                "the checkpoint was saved with a different sample order",
                got=", ".join(f"{name}={identity[name]}" for name in different),
                expected=", ".join(f"{name}={state.get(name)}" for name in different),
                fix="resume with the options the run was started with, or choose another --run",
            )
        self.step = int(state["step"])

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
