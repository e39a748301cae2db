"""How fast can the same samples be read from a cache and from alternative formats?

    python -m benchmarks.peers.reading [--samples 2000] [--repeats 5] [--formats "ours, tar" LMDB ...] [--folder DIR]

A sample is a 224 px JPEG, 79,708 bytes of int8 features (Swin-L), 1,004 bytes of logits and a label. Every pass reads
all samples in a new random order, once without and once with decoding the JPEG (with the same decoder for all formats).
Figures are CPU seconds of the process with all of its threads, so other jobs on the machine matter less. Passes of all
formats alternate; the page cache is warm. In a second test, one byte of the features is flipped, or the largest file is
cut in half, and everything is read again. The table shows whether the reader reports an error or returns wrong samples.
Creates build/peers on first use (benchmarks/peers/environment.py). Takes 4 minutes and 3 GB of disk.
"""

import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Measurement, argument_parser, publish_table, ratio, time_interleaved
from benchmarks.peers.environment import restart_with_peers, versions
from benchmarks.peers.formats import FORMATS, Format
from benchmarks.peers.samples import SIZE, Passes, Sample, make_samples
from scalekd_cache.views.pixels import decode_pixels

DAMAGED, LIMIT_S = 64, 120
"""Samples that are damaged and read again; seconds after which a reader counts as hanging."""
GAPS = {
    "ours, zarr": "one read per array of a record",
    "LMDB": "faster: one copy out of the memory map, no check",
    "LMDB with a crc32c per record": "faster: no keys, view records and index to parse in Python",
}
"""What limits a format, or why it is faster."""


def one_pass(passes: Passes, count: int, *, decode: bool) -> None:
    """Read every sample once; with `decode`, decode its JPEG."""
    found = 0
    for sample in passes():
        assert len(memoryview(sample.features)) > len(memoryview(sample.logits)) > 0
        if decode:
            decode_pixels(sample.pixels, SIZE)
        found += 1
    assert found == count, (found, count)


def rates(formats: Sequence[Format], count: int, repeats: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of each pass: without and with decoding, by format."""
    samples, opened = make_samples(count), {}
    for number, kind in enumerate(formats):
        kind.write(place := folder / str(number), samples)
        opened[kind.name] = kind.open(place)
    del samples
    seconds = {}
    for name, decode in (("bytes", False), ("decoded", True)):
        actions: dict[str, Callable[[], object]] = {
            kind: partial(one_pass, passes, count, decode=decode) for kind, passes in opened.items()
        }
        for action in actions.values():
            action()  # warms up the page cache
        seconds[name] = time_interleaved(repeats, clock=time.process_time, **actions)
    return seconds


def outcome(kind: Format, damage: str, folder: str) -> str:
    """Write a few samples, damage them, read them all; what the reader got."""
    samples, place = make_samples(DAMAGED), Path(folder) / "store"
    kind.write(place, samples)
    {"flip": flip_a_byte, "cut": cut_in_half}[damage](place, samples[DAMAGED // 3])
    wrong, found = 0, 0
    try:
        for sample in kind.open(place)():
            found += 1
            wrong += content(sample) != content(samples[sample.number])
    except Exception as error:  # any kind of error is what we want to see
        return f"error ({type(error).__name__})"
    if wrong:
        return f"silent: {wrong} wrong sample{'s' if wrong > 1 else ''}"
    return "silent: fewer samples" if found < DAMAGED else "no effect"


def content(sample: Sample) -> tuple[int, bytes, bytes, bytes]:
    """All that a training step would use."""
    return sample.label, bytes(sample.pixels), bytes(sample.features), bytes(sample.logits)


def flip_a_byte(folder: Path, sample: Sample) -> None:
    """Flip one byte in the middle of the stored features of a sample."""
    middle = bytes(sample.features[40_000:40_064])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if (at := data.find(middle)) >= 0:
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
            return
    raise AssertionError(f"{folder}: the features are not stored as they are")


def cut_in_half(folder: Path, sample: Sample) -> None:
    """Cut the largest file in half."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def damaged(name: str, damage: str) -> str:
    """`outcome` in a separate process, which may be killed."""
    kind = next(kind for kind in FORMATS if kind.name == name)
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("spawn").Process(target=_tell, args=(sender, kind, damage, folder))
        child.start()
        sender.close()
        try:
            answer = receiver.recv() if receiver.poll(LIMIT_S) else "hangs"
        except EOFError:
            child.join()
            answer = f"killed ({signal.Signals(-child.exitcode).name})" if child.exitcode < 0 else "exits"
        if child.is_alive():
            child.kill()
        child.join()
    return answer


def _tell(sender: Any, kind: Format, damage: str, folder: str) -> None:
    sender.send(outcome(kind, damage, folder))


def rows(seconds: dict[str, dict[str, list[float]]], count: int, against: str) -> list[Measurement]:
    """Two table rows per format: the ratio of its samples per second to those of `against`."""
    return [
        ratio(f"{name} / {against}, {label}", seconds[kind], name, against, amount=count, unit="samples/s", goal="",
              gap=GAPS.get(name, "") if kind == "bytes" else "")
        for kind, label in (("bytes", "JPEG not decoded"), ("decoded", "JPEG decoded"))
        for name in seconds[kind]
        if name != against
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--formats", nargs="+", choices=[kind.name for kind in FORMATS], metavar="NAME")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    options = parser.parse_args(argv)
    restart_with_peers("benchmarks.peers.reading")
    torch.set_num_threads(1)
    chosen = [kind for kind in FORMATS if kind.name in (options.formats or [kind.name])]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        seconds = rates(chosen, options.samples, options.repeats, Path(folder))
    damage = {kind.name: [damaged(kind.name, how) for how in ("flip", "cut")] for kind in chosen}
    table = ["| format | one byte flipped | largest file cut in half |", "|---|---|---|"]
    table += [f"| {name} | {flipped} | {cut} |" for name, (flipped, cut) in damage.items()]
    packages = sorted({package for kind in chosen for package in kind.packages})
    note = "\n".join([*table, "", f"{options.samples:,} samples; {versions(*packages)}."])
    raw = {"samples": options.samples, "repeats": options.repeats, "cpu_seconds": seconds, "damage": damage}
    publish_table("peers-reading", rows(seconds, options.samples, chosen[0].name), raw, note=note)


if __name__ == "__main__":
    main()
