"""Alternatives to a cache, each used as its documentation recommends for random access.

In: samples. Out: for each format, a function that writes a folder and a function that opens it for shuffled passes. A
format imports its library when it is used. No format compresses (features are int8 codes), and payloads are yielded
without additional copies.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.own_store import read_cache, write_cache
from benchmarks.peers.samples import FEATURES, LOGITS, Passes, Sample, make_sample

CHUNK_BYTES = 64 << 20
"""Size of a shard for the formats that have shards."""
LENGTHS = struct.Struct("<qqq")
"""Number, label, bytes of pixels: the header of an LMDB value."""


class Format(NamedTuple):
    """One way to store samples."""

    name: str
    write: Callable[[Path, list[Sample]], None]
    open: Callable[[Path], Passes]
    packages: tuple[str, ...] = ()


def shuffled(count: int, read: Callable[[int], Sample]) -> Passes:
    """Passes in a full random permutation, for formats with random access."""
    seeds = itertools.count()
    return lambda: map(read, np.random.default_rng(next(seeds)).permutation(count).tolist())


# ---- LMDB ---------------------------------------------------------------------------------------------------------


def write_lmdb(folder: Path, samples: list[Sample], *, checksum: bool) -> None:
    import google_crc32c
    import lmdb

    size = 2 * len(samples) * (FEATURES + 60_000) + (64 << 20)
    with lmdb.open(str(folder), map_size=size) as environment, environment.begin(write=True) as transaction:
        for number, label, *parts in samples:
            value = LENGTHS.pack(number, label, len(parts[0])) + b"".join(parts)
            end = struct.pack("<I", google_crc32c.value(value)) if checksum else b""
            transaction.put(struct.pack(">q", number), value + end)


def read_lmdb(folder: Path, *, checksum: bool) -> Passes:
    import google_crc32c
    import lmdb

    environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
    transaction = environment.begin()

    def read(number: int) -> Sample:
        value = transaction.get(struct.pack(">q", number))
        if checksum and google_crc32c.value(value[:-4]) != struct.unpack("<I", value[-4:])[0]:
            raise ValueError(f"record {number}: wrong crc32c")
        number, label, length = LENGTHS.unpack_from(value)
        payload, pixels_end = memoryview(value), LENGTHS.size + length
        features_end = pixels_end + FEATURES
        return Sample(number, label, payload[LENGTHS.size : pixels_end], payload[pixels_end:features_end],
                      payload[features_end : features_end + LOGITS])  # fmt: skip

    return shuffled(environment.stat()["entries"], read)


# ---- litdata ------------------------------------------------------------------------------------------------------


def as_fields(number: int) -> dict[str, Any]:
    return make_sample(number)._asdict()


def write_litdata(folder: Path, samples: list[Sample]) -> None:
    import litdata

    numbers = [sample.number for sample in samples]
    litdata.optimize(as_fields, numbers, str(folder), chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False)


def read_litdata(folder: Path) -> Passes:
    import litdata

    dataset = litdata.StreamingDataset(str(folder), shuffle=True)
    return lambda: (Sample(**fields) for fields in dataset)


# ---- MDS (mosaicml-streaming) ---------------------------------------------------------------------------------------

COLUMNS = {"number": "int", "label": "int", "pixels": "bytes", "features": "bytes", "logits": "bytes"}


def write_mds(folder: Path, samples: list[Sample]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["sha1"], size_limit=CHUNK_BYTES) as writer:
        for sample in samples:
            writer.write(sample._asdict())


@functools.cache
def mds_dataset(folder: Path) -> Any:
    """The dataset, opened once per process, because a second one for the same folder is rejected."""
    from streaming import StreamingDataset

    return StreamingDataset(local=str(folder), shuffle=True, batch_size=32, validate_hash="sha1")


def read_mds_in_order(folder: Path) -> Passes:
    return lambda: (Sample(**fields) for fields in mds_dataset(folder))


def read_mds_by_index(folder: Path) -> Passes:
    dataset = mds_dataset(folder)
    return shuffled(dataset.num_samples, lambda number: Sample(**dataset[number]))


# ---- HDF5 ---------------------------------------------------------------------------------------------------------


def write_hdf5(folder: Path, samples: list[Sample]) -> None:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "samples.h5", "w") as file:
        fixed = {"features": FEATURES, "logits": LOGITS}
        for name, size in fixed.items():
            rows = file.create_dataset(name, (len(samples), size), "uint8", chunks=(1, size))
            for sample in samples:
                rows[sample.number] = np.frombuffer(getattr(sample, name), np.uint8)
        pixels = file.create_dataset("pixels", (len(samples),), h5py.vlen_dtype(np.uint8))
        for sample in samples:
            pixels[sample.number] = np.frombuffer(sample.pixels, np.uint8)
        file["label"] = np.array([sample.label for sample in samples])


def read_hdf5(folder: Path) -> Passes:
    import h5py

    file = h5py.File(folder / "samples.h5", "r")
    pixels, features, logits, labels = (file[name] for name in ("pixels", "features", "logits", "label"))
    return shuffled(
        len(labels), lambda at: Sample(at, int(labels[at]), pixels[at].data, features[at].data, logits[at].data)
    )


# ---- files --------------------------------------------------------------------------------------------------------


def write_files(folder: Path, samples: list[Sample]) -> None:
    folder.mkdir()
    for sample in samples:
        (folder / f"{sample.number:08d}.jpg").write_bytes(sample.pixels)
        np.save(folder / f"{sample.number:08d}.features.npy", np.frombuffer(sample.features, np.uint8))
        np.save(folder / f"{sample.number:08d}.logits.npy", np.frombuffer(sample.logits, np.uint8))
    np.save(folder / "labels.npy", np.array([sample.label for sample in samples]))


def read_files(folder: Path) -> Passes:
    labels = np.load(folder / "labels.npy").tolist()

    def read(number: int) -> Sample:
        stem = f"{folder}/{number:08d}"
        with open(f"{stem}.jpg", "rb") as file:
            pixels = file.read()
        features, logits = np.load(f"{stem}.features.npy"), np.load(f"{stem}.logits.npy")
        return Sample(number, labels[number], pixels, features.data, logits.data)

    return shuffled(len(labels), read)


def write_pt(folder: Path, samples: list[Sample]) -> None:
    import torch

    folder.mkdir()
    for sample in samples:
        parts = {name: torch.frombuffer(bytearray(getattr(sample, name)), dtype=torch.uint8) for name in PAYLOADS}
        torch.save({"label": sample.label, **parts}, folder / f"{sample.number:08d}.pt")


def read_pt(folder: Path) -> Passes:
    import torch

    def read(number: int) -> Sample:
        parts = torch.load(folder / f"{number:08d}.pt", weights_only=True)
        return Sample(number, parts["label"], *(parts[name].numpy().data for name in PAYLOADS))

    return shuffled(len(list(folder.glob("*.pt"))), read)


PAYLOADS = ("pixels", "features", "logits")

# ---- webdataset ---------------------------------------------------------------------------------------------------


def write_webdataset(folder: Path, samples: list[Sample]) -> None:
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%04d.tar", maxsize=CHUNK_BYTES, verbose=0) as writer:
        for sample in samples:
            writer.write({"__key__": f"{sample.number:08d}", "cls": str(sample.label).encode(), "jpg": sample.pixels,
                          "features": sample.features, "logits": sample.logits})  # fmt: skip


def read_webdataset(folder: Path) -> Passes:
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))

    def samples() -> Iterator[Sample]:
        for fields in webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(1000):
            yield Sample(
                int(fields["__key__"]), int(fields["cls"]), fields["jpg"], fields["features"], fields["logits"]
            )

    return samples


# ---- zarr-python --------------------------------------------------------------------------------------------------


def write_zarr(folder: Path, samples: list[Sample]) -> None:
    import zarr

    group = zarr.open_group(folder, mode="w")
    group.create_array("label", data=np.array([sample.label for sample in samples]))
    group.create_array("length", data=np.array([len(sample.pixels) for sample in samples]))
    for name in PAYLOADS:
        size = max(len(getattr(sample, name)) for sample in samples)
        rows = group.create_array(name, shape=(len(samples), size), chunks=(1, size), dtype="uint8", compressors=None)
        for sample in samples:
            data = getattr(sample, name)
            rows[sample.number, : len(data)] = np.frombuffer(data, np.uint8)


def read_zarr(folder: Path) -> Passes:
    import zarr

    group: Any = zarr.open_group(folder, mode="r")
    pixels, features, logits = (group[name] for name in PAYLOADS)
    labels, lengths = group["label"][:].tolist(), group["length"][:].tolist()
    return shuffled(len(labels), lambda at: Sample(at, labels[at], pixels[at][: lengths[at]].data, features[at].data,
                                                   logits[at].data))  # fmt: skip


FORMATS = (
    Format("ours, tar", functools.partial(write_cache, backend="webdataset"), read_cache),
    Format("ours, zarr", functools.partial(write_cache, backend="zarr"), read_cache),
    Format("LMDB", functools.partial(write_lmdb, checksum=False), functools.partial(read_lmdb, checksum=False),
           ("lmdb",)),
    Format("LMDB with a crc32c per record", functools.partial(write_lmdb, checksum=True),
           functools.partial(read_lmdb, checksum=True), ("lmdb",)),
    Format("litdata", write_litdata, read_litdata, ("litdata",)),
    Format("MDS, iterated", write_mds, read_mds_in_order, ("mosaicml-streaming",)),
    Format("MDS, by index", write_mds, read_mds_by_index, ("mosaicml-streaming",)),
    Format("HDF5", write_hdf5, read_hdf5, ("h5py",)),
    Format("jpg and npy files", write_files, read_files),
    Format("webdataset, shuffle(1000)", write_webdataset, read_webdataset, ("webdataset",)),
    Format("one .pt per sample", write_pt, read_pt, ("torch",)),
    Format("zarr-python, chunks of 1", write_zarr, read_zarr, ("zarr",)),
)  # fmt: skip
