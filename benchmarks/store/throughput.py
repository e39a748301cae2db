"""How fast is the store, compared with the raw disk and the libraries it uses?

    python -m benchmarks.store.throughput [--folder DIR] [--records 512] [--views 4] [--repeats 5]

Uses records like those of a default cache: a 224 px JPEG of about 16 KB, 79,708 bytes of int8 Swin-L features, 1,004
bytes of logits and a view record. Every ratio compares actions timed alternately in the same run. Takes 30 s and 2 GB
of disk.
"""

import hashlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from benchmarks.harness import Measurement, argument_parser, publish_table, ratio, time_interleaved
from scalekd_cache.store.background import CommitQueue
from scalekd_cache.store.base import BACKENDS, Record, ShardId, shard_reader
from scalekd_cache.store.durable_files import canonical_json, hash_file
from scalekd_cache.store.formats.tar_index import load_index
from scalekd_cache.store.formats.zarr_read import ShardedArray
from scalekd_cache.store.sidecar import read_keys, read_unit, unit_folder
from scalekd_cache.store.unit import UnitWriter

PIECE = 1 << 20
Measured = tuple[list[Measurement], dict[str, list[float]]]
"""Rows of the table, and the raw timings behind them."""
SIDECARS = (".json", ".txt", ".idx")
UNITS = 6
"""Units written back to back; filling the first and committing the last overlap with nothing."""


def make_records(count: int) -> list[Record]:
    """Records like those of a default cache: random JPEG bytes, features distributed like int8 codes."""
    rng = np.random.default_rng(0)
    view = canonical_json({
        "area": [12, 34, 200, 210], "flip": True, "image_size": [500, 375], "number": 0, "size": 224,
        "operations": [["ShearX", 0.123456789], ["Color", 1.23456]], "erase": [1, 2, 30, 40], "noise": 1234567890123,
    })  # fmt: skip
    records = []
    for number in range(count):
        codes = (rng.standard_normal(75_264, dtype=np.float32) * 30).clip(-127, 127).astype(np.int8).tobytes()
        pixels = b"\xff\xd8" + rng.bytes(int(rng.normal(16_000, 3_000)))
        key = f"n{number % 1000:08d}/ILSVRC2012_{number:08d}"
        features, logits = rng.bytes(2_352) + codes + rng.bytes(196), rng.bytes(1_004)
        records.append(Record(key, number % 1000, view, rng.bytes(8).hex(), pixels, features, logits))
    return records


def filled_unit(root: Path, backend: str, records: list[Record], views: int, range_id: int = 0) -> UnitWriter:
    """An uncommitted unit with all its records."""
    writer = UnitWriter(
        root,
        backend=backend,
        group=0,
        range_id=range_id,
        start=0,
        stop=len(records),
        views=range(views),
        fingerprint="0" * 64,
    )
    for start in range(0, len(records), 64):
        for view in range(views):
            for record in records[start : start + 64]:
                writer.append(view, record)
    return writer


def write_unit(root: Path, backend: str, records: list[Record], views: int) -> Path:
    """Write and commit one unit with the public writer."""
    assert filled_unit(root, backend, records, views).commit({})
    return unit_folder(root, 0, 0)


def write_units(root: Path, backend: str, records: list[Record], views: int) -> None:
    """Write several units as stage 1 does: one is committed while the next is filled."""
    with CommitQueue() as commits:
        for range_id in range(UNITS):
            commits.put(filled_unit(root, backend, records, views, range_id), {}, lambda: None)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy_with_fsync(source: Path, target: Path, *, read_back: bool) -> None:
    """Copy the same files and fsync them; with `read_back`, also read each one back from disk."""
    for path in files_of(source):
        other = target / path.relative_to(source)
        other.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, other.open("wb") as writer:
            shutil.copyfileobj(reader, writer, PIECE)
            writer.flush()
            os.fsync(writer.fileno())
        if read_back:
            with other.open("rb", buffering=0) as reader:
                os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while reader.read(PIECE):
                    pass


def writing(root: Path, backend: str, records: list[Record], views: int, repeats: int) -> Measured:
    """Compare the whole writer (tar or Zarr, hashes, fsync, read-back, commit) with a copy of its files and fsync."""
    first = write_unit(root / "first", backend, records, views)
    size = sum(path.stat().st_size for path in files_of(first))

    def fresh(action: Callable[[Path], object]) -> Callable[[], object]:
        def run() -> object:
            return action(Path(tempfile.mkdtemp(dir=root)))

        return run

    def copies(*, read_back: bool) -> Callable[[], object]:
        def run() -> None:
            for _ in range(UNITS):
                copy_with_fsync(first, Path(tempfile.mkdtemp(dir=root)), read_back=read_back)

        return run

    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        turn = time_interleaved(
            1,
            units=fresh(lambda folder: write_units(folder, backend, records, views)),
            copies=copies(read_back=False),
            copies_read_back=copies(read_back=True),
            unit=fresh(lambda folder: write_unit(folder, backend, records, views)),
            copy=fresh(lambda folder: copy_with_fsync(first, folder, read_back=False)),
        )
        for name, values in turn.items():
            seconds.setdefault(name, []).extend(values)
        for folder in root.glob("tmp*"):
            shutil.rmtree(folder)
    mega = size / 1e6
    again = "reads back and hashes every file, decodes every record"
    return [
        ratio(f"write {backend}, units in a row / copy + fsync", seconds, "units", "copies", amount=UNITS * mega,
              unit="MB/s", goal="0.5", gap=again),
        ratio(f"write {backend}, units in a row / copy + fsync + read back", seconds, "units", "copies_read_back",
              amount=UNITS * mega, unit="MB/s", goal="", gap="sha256, crc32c"),
        ratio(f"write {backend}, a single unit / copy + fsync", seconds, "unit", "copy", amount=mega, unit="MB/s",
              goal="", gap="its commit overlaps with nothing"),
    ], seconds  # fmt: skip


def random_reads(folder: Path, count: int, repeats: int) -> Measured:
    """Compare checked records in random order with one plain pread of the same bytes each; warm page cache."""
    info, _ = read_unit(folder)
    reader: Any = shard_reader(info.backend, folder, ShardId(0, 0, 0), read_keys(folder, info))
    rows = np.random.default_rng(1).integers(0, info.count, count)
    index = load_index(folder / "v0000.idx", ShardId(0, 0, 0), info.count, reader.where.stat().st_size)
    firsts = index["json_offset"]
    lengths = index["features_offset"] + index["features_bytes"] - firsts
    starts, sizes = firsts[rows].tolist(), lengths[rows].tolist()
    blocks = [slice(start, start + 64) for start in range(0, info.count, 64)]
    descriptor = os.open(reader.where, os.O_RDONLY)

    def bare() -> None:
        for start, size in zip(starts, sizes, strict=True):
            os.pread(descriptor, size, start)

    def ours() -> None:
        for row in rows:
            reader.read(np.array([row]))

    def bare_blocks() -> None:
        for block in blocks:
            for start, size in zip(firsts[block].tolist(), lengths[block].tolist(), strict=True):
                os.pread(descriptor, size, start)

    seconds = time_interleaved(
        repeats,
        batches=lambda: _batches(reader, rows),
        single=ours,
        pread=bare,
        blocks=lambda: _batches(reader, np.arange(info.count)),
        pread_blocks=bare_blocks,
    )
    os.close(descriptor)
    gap = "crc32c of 97 KB (4 us) and Python (3 us) on top of the pread (8 us); 0.65 without any Python"
    one = {"amount": count, "unit": "records/s", "goal": "0.5", "gap": gap}
    return [
        ratio("random records webdataset, 64 per call / pread", seconds, "batches", "pread", **one),
        ratio("random records webdataset, 1 per call / pread", seconds, "single", "pread", **one),
        ratio(
            "blocks of 64 adjacent records webdataset / pread",
            seconds,
            "blocks",
            "pread_blocks",
            amount=info.count,
            unit="records/s",
            goal="",
            gap=gap,
        ),
    ], seconds


def _batches(reader: Any, rows: Any) -> None:
    for start in range(0, len(rows), 64):
        reader.read(rows[start : start + 64])


def sequential_zarr(folder: Path, repeats: int) -> Measured:
    """Read the features array sequentially, 64 rows per call: our reader compared with zarr-python."""
    info, _ = read_unit(folder)
    count, path = info.count, folder / "v0000.zarr"
    plain: Any = zarr.open_group(path, mode="r")["features"]
    row = plain.shape[0] // count
    ours = ShardedArray(path / "features", "uint8", count * row, plain=True)
    bounds = [(start, min(start + 64, count)) for start in range(0, count, 64)]
    reader = shard_reader(info.backend, folder, ShardId(0, 0, 0), read_keys(folder, info))
    seconds = time_interleaved(
        repeats,
        ours=lambda: [ours.spans([(at * row, (at + 1) * row) for at in range(*bound)]) for bound in bounds],
        zarr=lambda: [plain[start * row : stop * row] for start, stop in bounds],
        records=lambda: [reader.read(np.arange(*bound)) for bound in bounds],
    )
    rows = {"amount": count, "unit": "rows/s"}
    return [
        ratio("sequential features zarr / zarr-python", seconds, "ours", "zarr", goal="0.8", **rows),
        ratio("sequential whole checked records zarr / zarr-python's features", seconds, "records", "zarr", goal="",
              **rows),
    ], seconds  # fmt: skip


def verification(folders: dict[str, Path], repeats: int) -> Measured:
    """The two passes of `make verify DEEP=1` on one core, warm; plain sha256 for comparison."""
    figures, all_seconds = [], {}
    for backend, folder in folders.items():
        info, _ = read_unit(folder)
        size = sum(fact.bytes for fact in info.files.values())
        keys, blob = read_keys(folder, info), os.urandom(1 << 24)
        readers = [shard_reader(backend, folder, ShardId(0, 0, view), keys) for view in info.views]
        seconds = time_interleaved(
            repeats,
            hash=lambda folder=folder, info=info: [hash_file(folder / name) for name in info.files],  # type: ignore[misc]
            decode=lambda readers=readers, count=info.count: [  # type: ignore[misc]
                _batches(reader, np.arange(count)) for reader in readers
            ],
            sha256=lambda blob=blob: hashlib.sha256(blob).digest(),  # type: ignore[misc]
        )
        bare = len(blob) / 1e9 / statistics.median(seconds["sha256"])
        for name, goal, gap in (("hash", "1 GB/s per core", f"plain sha256 {bare:.2f} GB/s"), ("decode", "", "")):
            rates = [size / 1e9 / value for value in seconds[name]]
            figures.append(
                Measurement(
                    f"verify {backend}, {name} pass",
                    statistics.median(rates),
                    (min(rates), max(rates)),
                    "GB/s",
                    "one core, warm",
                    goal,
                    gap,
                )
            )
        all_seconds |= {f"{backend} {name}": values for name, values in seconds.items()}
    return figures, all_seconds


def overhead(backend: str, folder: Path) -> Measurement:
    """Headers, padding, index and sidecars of a unit, in percent of its total bytes."""
    info, _ = read_unit(folder)
    total = sum(path.stat().st_size for path in files_of(folder))
    sidecars = sum(path.stat().st_size for path in files_of(folder) if path.suffix in SIDECARS)
    share = 100 * (total - sum(info.payload_bytes.values())) / total
    rates = f"of {total / info.count / len(info.views):,.0f} bytes per view, sidecars {100 * sidecars / total:.2f}%"
    return Measurement(f"overhead, {backend}", share, None, "%", rates, "8%", "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    records, measured = make_records(options.records), []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folders = {}
        for backend in BACKENDS:
            root = Path(name) / backend
            root.mkdir()
            measured.append(writing(root, backend, records, options.views, options.repeats))
            folders[backend] = unit_folder(root / "first", 0, 0)
        measured.append(random_reads(folders["webdataset"], 4 * options.records, options.repeats))
        measured.append(sequential_zarr(folders["zarr"], options.repeats))
        measured.append(verification(folders, max(1, options.repeats // 2)))
        figures = [figure for rows, _ in measured for figure in rows]
        figures += [overhead(backend, folder) for backend, folder in folders.items()]
    sizes = {"records": options.records, "views": options.views, "repeats": options.repeats}
    publish_table("store", figures, {**sizes, "seconds": [seconds for _, seconds in measured]})


if __name__ == "__main__":
    main()
