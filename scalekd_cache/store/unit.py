"""Writes a work unit: the shards for one image range and one view group, which are committed together.

In: records for every view, with keys in the same order. Out: `units/g000-r00000/` with unit.json, keys.txt and shards.
Invariant: a unit's folder gets its final name only after everything in it has been fsynced and read back; if two
writers write the same unit, exactly one is kept; after an exception, no files are left.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from scalekd_cache import __version__
from scalekd_cache.errors import UserError
from scalekd_cache.store.base import (
    FORMAT_VERSION,
    MAX_UNIT_SAMPLES,
    Record,
    ShardId,
    ShardWriter,
    check_backend,
    check_key,
    shard_reader,
    shard_writer,
)
from scalekd_cache.store.durable_files import (
    FileHash,
    fsync_path,
    parent_folders,
    raise_disk_error,
    read_back,
    temp_path_for,
    write_new,
)
from scalekd_cache.store.image_digests import NAME as IMAGES
from scalekd_cache.store.image_digests import images_text
from scalekd_cache.store.resume import committed_unit, has_wrong_sizes, remove_damaged_unit
from scalekd_cache.store.sidecar import UnitInfo, sidecar_text, unit_folder
from scalekd_cache.store.verify_unit import ExpectedUnit

READ_BACK_RECORDS = 32
"""Number of records per reader call during read-back. The buffer is reused and stays in the CPU cache."""
COMMIT_THREADS = 4
"""Number of a unit's shards that are fsynced and read back in parallel."""


class UnitWriter:
    """A context manager that writes one unit into a temporary folder and publishes it with one rename.

    Args:
        root: the cache's folder.
        backend: `webdataset` or `zarr`.
        group: number of the view group.
        range_id: number of the image range.
        start: first image in the range, in the group's canonical order.
        stop: one past the last image.
        views: the group's view numbers.
        fingerprint: SHA-256 hex digest of everything that affects the cached bytes.
        versions: library versions, stored in the sidecar to explain any later digest mismatch.
    """

    def __init__(
        self,
        root: Path,
        *,
        backend: str,
        group: int,
        range_id: int,
        start: int,
        stop: int,
        views: Sequence[int],
        fingerprint: str,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        assert 0 <= start < stop <= start + MAX_UNIT_SAMPLES, (start, stop)
        assert 0 < len(set(views)) == len(views), views
        self.info = UnitInfo(
            format=FORMAT_VERSION,
            fingerprint=fingerprint,
            backend=check_backend(backend),
            group=group,
            range_id=range_id,
            start=start,
            stop=stop,
            views=list(views),
            count=0,
            skipped=[],
            files={},
            payload_bytes={},
            fidelity={},
            versions={"scalekd_cache": __version__, **(versions or {})},
        )
        self.root, self.folder = root, unit_folder(root, group, range_id)
        self._keys: list[str] = []
        self._images: list[str] = []
        self._seen: set[str] = set()
        self._skipped: dict[str, str] = {}
        self._writers: dict[int, ShardWriter] = {}
        self._counts = dict.fromkeys(views, 0)
        self._record_bytes = 0
        self._temp = temp_path_for(self.folder)
        with _DiskGuard(self):
            self._temp.parent.mkdir(parents=True, exist_ok=True)
            self._temp.mkdir()

    @classmethod
    def of_unit(cls, root: Path, info: UnitInfo, backend: str) -> Self:
        """A writer that rewrites an existing unit in a different form, with the same range, views, versions and skipped
        images."""
        writer = cls(
            root,
            backend=backend,
            group=info.group,
            range_id=info.range_id,
            start=info.start,
            stop=info.stop,
            views=info.views,
            fingerprint=info.fingerprint,
            versions=info.versions,
        )
        for skipped in info.skipped:
            writer.skip(skipped["key"], skipped["reason"])
        return writer

    def append(self, view_number: int, record: Record, image: str = "") -> None:
        """Add a view of an image. Every view must get the same keys in the same order.

        Args:
            view_number: number of the view.
            record: its record.
            image: digest of the image file, the same for all views (empty: unknown).

        Raises:
            UserError: the key is invalid or repeated, or the disk is full.
        """
        row = self._counts[view_number]
        if row == len(self._keys):
            self._add_key(record.key)
            self._images.append(image)
        assert record.key == self._keys[row], (record.key, self._keys[row], view_number)
        size = len(record.features) + len(record.second) + len(record.pixels) + 2 * len(record.logits) + 3072
        self._record_bytes = max(self._record_bytes, size)
        with _DiskGuard(self):
            self._writer(view_number).append(record)
        self._counts[view_number] += 1

    def skip(self, key: str, reason: str) -> None:
        """Skip an image in every view; the sidecar lists it."""
        assert key not in self._seen, f"{key} already has records"
        self._skipped[key] = reason

    def commit(self, fidelity: Mapping[str, Any]) -> bool:
        """Finish, fsync, read back and publish. If another writer has already committed this unit, keep that one and
        return False.

        Raises:
            UserError: the disk is full, or a file differs when read back. Nothing is published in that case.
        """
        count = len(self._keys)
        assert set(self._counts.values()) == {count}, self._counts
        assert count + len(self._skipped) == self.info.stop - self.info.start, (count, len(self._skipped), self.info)
        with _DiskGuard(self):
            self._finish_files(dict(fidelity))
            published = self._publish()
        self.abort()
        return published

    def abort(self) -> None:
        """Remove the temporary folder; this has no effect after a commit."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        shutil.rmtree(self._temp, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def keys(self) -> Set[str]:
        """Sample keys of the images that have records."""
        return self._seen

    @property
    def skipped(self) -> Mapping[str, str]:
        """Sample keys of the skipped images, with the reasons."""
        return self._skipped

    def needed_bytes(self) -> int:
        """Estimated size of this unit, based on its largest record so far."""
        return self._record_bytes * (self.info.stop - self.info.start) * len(self.info.views)

    def _add_key(self, key: str) -> None:
        check_key(key, f"images {self.info.start} to {self.info.stop} in the dataset")
        if key in self._seen or key in self._skipped:
            raise UserError("two images have the same key", got=key, expected="unique keys", where=self.folder.name)
        self._seen.add(key)
        self._keys.append(key)

    def _writer(self, view: int) -> ShardWriter:
        if view not in self._writers:
            info = self.info
            shard = ShardId(info.group, info.range_id, view)
            self._writers[view] = shard_writer(info.backend, self._temp, shard)
        return self._writers[view]

    def _finish_files(self, fidelity: dict[str, Any]) -> None:
        """Complete the temporary folder: write shards and keys.txt, read them back, write unit.json and fsync the
        folders."""
        info = self.info
        for view in info.views:  # creates the writers even if every image in the range was skipped
            self._writer(view)
        keys = write_new(self._temp / "keys.txt", "".join(f"{key}\n" for key in self._keys).encode())
        lists = {"keys.txt": keys}
        if all(self._images):
            lists[IMAGES] = write_new(self._temp / IMAGES, images_text(self._images))
        files = read_back(self._temp, lists)
        with ThreadPoolExecutor(COMMIT_THREADS) as pool:  # one shard waits for the disk while another is hashed
            finished = list(pool.map(self._finish_shard, info.views))
        for _, facts in finished:
            files |= facts
        self.info = dataclasses.replace(
            info,
            count=len(self._keys),
            skipped=[{"key": key, "reason": reason} for key, reason in self._skipped.items()],
            files=files,
            payload_bytes={
                name: sum(payload[name] for payload, _ in finished) for name in ("pixels", "features", "target")
            },
            fidelity=fidelity,
        )
        write_new(self._temp / "unit.json", sidecar_text(self.info).encode())
        for folder in parent_folders(self._temp, files):
            fsync_path(folder)

    def _finish_shard(self, view: int) -> tuple[dict[str, int], dict[str, FileHash]]:
        """Finish one shard and read it back: every byte, then every record through the reader used in training."""
        writer = self._writers[view]
        summary = writer.finish()
        for name in summary.files:  # writeback has started, so only the first fsync waits for the journal
            fsync_path(self._temp / name)
        facts = read_back(self._temp, summary.files)
        shard = ShardId(self.info.group, self.info.range_id, view)
        reader = shard_reader(self.info.backend, self._temp, shard, self._keys)
        assert reader.crcs.tolist() == writer.crcs, f"checksums of {reader.where} differ from those of its records"
        rows = np.arange(len(self._keys))
        for start in range(0, len(rows), READ_BACK_RECORDS):
            reader.read(rows[start : start + READ_BACK_RECORDS])
        reader.close()
        return summary.payload, facts

    def _publish(self) -> bool:
        """Publish with one rename. An existing complete unit is kept; one with truncated or missing files is
        replaced."""
        for _ in range(3):
            try:
                os.rename(self._temp, self.folder)
            except OSError:
                if not self.folder.exists():
                    raise
                info = self.info
                wanted = ExpectedUnit(
                    info.group, info.range_id, info.fingerprint, info.backend, info.views, (info.start, info.stop)
                )
                if committed_unit(self.root, wanted):
                    return False
                remove_damaged_unit(self.folder, has_wrong_sizes)
                continue
            fsync_path(self.folder.parent)
            fsync_path(self.root)
            return True
        raise UserError("cannot replace a damaged unit", where=self.folder, fix="delete this folder, then rerun")


class _DiskGuard:
    """Turns disk errors into a UserError, after removing the temporary folder."""

    def __init__(self, writer: UnitWriter) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        self._writer.abort()
        raise_disk_error(error, self._writer.folder.parent, self._writer.needed_bytes())
