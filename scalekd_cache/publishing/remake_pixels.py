"""Regenerates a unit's pixels, for a cache whose pixels were not transferred.

In: shards without pixels, the original unit's sidecar, and the images. Out: the original unit.
Invariant: a view is replayed from its record and encoded according to the view recipe. The image file, the decoded
pixels and every file in the unit must have the same digests as the originals, so the result is bit-identical to the
original or an error is raised.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from scalekd_cache.config.base import from_plain
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage, decode_image, image_digest
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.data.workers import load_items
from scalekd_cache.errors import UserError, counted, some_of
from scalekd_cache.loader.record_pixels import record_view, wrong_digest
from scalekd_cache.publishing.without_pixels import BARE_BACKEND
from scalekd_cache.store.base import Record, ShardId, ShardReader, shard_reader
from scalekd_cache.store.image_digests import read_images
from scalekd_cache.store.manifest import ManifestFacts
from scalekd_cache.store.sidecar import UnitInfo, read_keys, unit_folder
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.views.pixels import decode_pixels, encode_pixels
from scalekd_cache.views.view import apply_view

REMADE = "remade"
"""Subfolder of the staging folder for the unit being written."""
BATCH_RECORDS, MAX_PREFETCH = 32, 32


class ImageViews(NamedTuple):
    """The views to regenerate for one image."""

    records: list[Record]
    """One record per view, without features."""
    image: str
    """Digest of the image file; empty if unknown."""


def open_images(facts: ManifestFacts, data: str | None, where: object) -> Source:
    """The images from which the pixels are regenerated; raises `UserError` if they are not given or cannot be
    opened."""
    if data is None:
        raise UserError(
            "this pull does not transfer pixels, so it needs the images that the cache was made from",
            got="no --data",
            expected=f"the training images of dataset {facts.data.get('source')} "
            f"({counted(facts.data['samples'], 'image')})",
            where=where,
            fix="set --without-pixels --data DATA, where DATA is a folder, tars, parquet files or a name such as demo",
        )
    return open_cache_source(facts.data, data, "train")


class RemadePixels(Dataset[list[bytes]]):
    """Regenerates and encodes views in a worker process."""

    def __init__(self, source: Source, views: ViewConfig, pillow: str) -> None:
        self.source, self.views, self.pillow = source, views, pillow
        self.index = {sample.key: at for at, sample in enumerate(source.samples)}

    def check_keys(self, keys: Sequence[str]) -> None:
        """Raise `UserError` if images are missing."""
        missing = [key for key in keys if key not in self.index]
        if missing:
            raise UserError(
                "images that the cache was made from are missing from the dataset",
                got=f"no image {some_of(missing)}",
                where=f"--data {self.source.name}",
                fix="set --data to the complete dataset with the original file names, then rerun: files already "
                "transferred are kept",
            )

    def __getitem__(self, wanted: ImageViews) -> list[bytes]:
        key = wanted.records[0].key
        data = self.source.read(self.index[key])
        if wanted.image and image_digest(data) != wanted.image:
            raise self._differs(key, "the file differs", f"digest {image_digest(data)}", f"digest {wanted.image}")
        try:
            image = decode_image(data, key)
        except UnreadableImage as error:
            raise self._differs(key, "it cannot be decoded", error.reason, "a readable image") from error
        return [self._view(record, image, known=bool(wanted.image)) for record in wanted.records]

    def _view(self, record: Record, image: Any, *, known: bool) -> bytes:
        """The encoded view; `known` is whether the image file is known to be the original."""
        encoded = encode_pixels(apply_view(record_view(record), image, self.views), self.views)
        wrong = wrong_digest(record, decode_pixels(encoded, self.views.size))
        if wrong is not None and known:
            raise UserError(
                f"the pixels regenerated from image {record.key} differ from those in the cache, although the image "
                "file is the original",
                got=f"digest {wrong}",
                expected=f"digest {record.digest}",
                where=f"--data {self.source.name}",
                fix=f"install Pillow {self.pillow}, which the cache was made with, then rerun: files already "
                "transferred are kept",
            )
        if wrong is not None:
            raise self._differs(record.key, "its pixels differ", f"digest {wrong}", f"digest {record.digest}")
        return encoded

    def _differs(self, key: str, what: str, got: str, expected: str) -> UserError:
        return UserError(
            f"image {key} is not the one that the cache was made from: {what}",
            got=got,
            expected=expected,
            where=f"--data {self.source.name}",
            fix="restore the image, then rerun: files already transferred are kept. If every image differs, check the "
            f"library versions: the cache was made with Pillow {self.pillow}",
        )


def pixel_maker(facts: ManifestFacts, source: Source) -> RemadePixels:
    """Create the object that regenerates a cache's pixels."""
    views = ViewConfig(**from_plain(facts.view_recipe))
    return RemadePixels(source, views, facts.versions.get("pillow", "unknown version"))


def remake_unit(
    staging: Path,
    info: UnitInfo,
    bare: Path,
    pixels: RemadePixels,
    workers: int,
    *,
    partial: bool,
    on_image: Callable[[], object] = lambda: None,
) -> None:
    """Write a unit's files to the staging folder.

    Args:
        staging: the staging folder, which contains the unit's keys.txt and images.txt.
        info: the unit's sidecar, for the requested views.
        bare: the folder with the unit's shards without pixels.
        pixels: the object that regenerates the pixels.
        workers: number of worker processes.
        partial: whether the shards come from the published cache, with holes instead of pixels.
        on_image: called for each image whose views are regenerated.

    Raises:
        UserError: an image is missing or has changed, or a file differs from the original.
    """
    folder = unit_folder(staging, info.group, info.range_id)
    keys, images = read_keys(folder, info), read_images(folder, info)
    pixels.check_keys(keys)
    scratch = staging / REMADE
    shutil.rmtree(scratch, ignore_errors=True)
    shards = [ShardId(info.group, info.range_id, view) for view in info.views]
    readers = [shard_reader(info.backend if partial else BARE_BACKEND, bare, shard, keys) for shard in shards]
    pending: deque[tuple[Record, ...]] = deque()

    def wanted() -> Iterator[ImageViews]:
        for row, records in enumerate(_rows(readers, info.count, partial)):
            pending.append(records)
            small = [record._replace(pixels=b"", features=b"", logits=b"", second=b"") for record in records]
            yield ImageViews(small, images[row] if images else "")

    with UnitWriter.of_unit(scratch, info, info.backend) as writer:
        made = load_items(
            pixels, wanted(), workers=workers, item_bytes=3 * pixels.views.size**2, max_prefetch=MAX_PREFETCH
        )
        for row, encoded in enumerate(made):
            for view, record, data in zip(info.views, pending.popleft(), encoded, strict=True):
                writer.append(view, record._replace(pixels=data), images[row] if images else "")
            on_image()
        writer.commit(info.fidelity)
    for reader in readers:
        reader.close()
    _check_files(writer.info.files, info, pixels.pillow, bare)
    shutil.rmtree(folder)
    unit_folder(scratch, info.group, info.range_id).rename(folder)


def _rows(readers: Sequence[ShardReader], count: int, partial: bool) -> Iterator[tuple[Record, ...]]:
    """The records for each row, one per view."""
    for start in range(0, count, BATCH_RECORDS):
        rows = np.arange(start, min(start + BATCH_RECORDS, count))
        found = (reader.read_without_pixels(rows) if partial else reader.read(rows) for reader in readers)
        yield from zip(*found, strict=True)


def _check_files(made: Mapping[str, object], info: UnitInfo, pillow: str, bare: Path) -> None:
    """Raise `UserError` unless the files' digests match the originals."""
    wrong = [name for name, fact in info.files.items() if made.get(name) != fact]
    if wrong or made.keys() != info.files.keys():
        raise UserError(
            "the regenerated unit differs from the original, although all pixels match",
            got=f"different bytes in {some_of(wrong)}"
            if wrong
            else f"additional files: {some_of(sorted(made.keys() - info.files.keys()))}",
            expected="the files listed in its sidecar",
            where=bare,
            fix=f"install Pillow {pillow}, which the cache was made with, and rerun; if the error persists, the "
            "published records belong to a different cache",
        )
