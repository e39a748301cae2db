"""Is stage 1 as fast as the teacher? Compares views/s of cache-teacher with the plain forward pass.

    python -m benchmarks.training.stage1 [--teacher swin_tiny_patch4_window7_224] [--images 80] [--views 2]
        [--workers 1]

The plain teacher gets precomputed uint8 batches of the same shape and precision. Stage 1 decodes photographs, samples
views, encodes JPEG, runs the teacher, encodes features, writes, fsyncs and reads back. Both use the same number of
threads. Stage 1 is timed from its first forward pass to its last commit, so the start of the workers is not included.
"""

import dataclasses
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from benchmarks.harness import Measurement, argument_parser, peak_memory_bytes, publish_table, timed
from benchmarks.photographs import write_photographs
from scalekd_cache.caching.job_plan import make_plan
from scalekd_cache.caching.make_units import make_units
from scalekd_cache.codec import make_codec
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.devices import choose_device
from scalekd_cache.distributed import Process
from scalekd_cache.errors import counted
from scalekd_cache.models.teacher import Teacher, TeacherOutput, load_teacher

DEFAULTS: dict[str, tuple[Any, Any]] = {
    "teacher": ("swin_tiny_patch4_window7_224", "swin_large_patch4_window7_224"),
    "images": (80, 4096),
    "batch": (32, 256),
    "workers": (1, max(1, (os.cpu_count() or 2) - 1)),
}
"""Default on a CPU, default on a GPU."""
POLL_S = 0.05


class TimedTeacher(nn.Module):
    """A teacher that records the start of its first forward pass and the device time of all passes."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher, self.started = teacher, 0.0
        self._spans: list[tuple[Any, Any]] = []

    def forward(self, images: Tensor) -> TeacherOutput:
        """See `Teacher`."""
        self.started = self.started or time.perf_counter()
        first = self._mark()
        output: TeacherOutput = self.teacher(images)
        self._spans.append((first, self._mark()))
        return output

    def _mark(self) -> Any:
        if self.teacher.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def busy_s(self) -> float:
        """Seconds of all forward passes."""
        if self.teacher.device.type != "cuda":
            return float(sum(last - first for first, last in self._spans))
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in self._spans) / 1e3


class Usage:
    """Peak file descriptors of this process and peak memory of its child processes. A context manager."""

    def __init__(self) -> None:
        self.descriptors, self.children_bytes = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self.descriptors = max(self.descriptors, len(os.listdir("/proc/self/fd")))
            self.children_bytes = max(self.children_bytes, sum(map(_resident_bytes, _children())))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def _children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # a thread that has just ended
            found += task.read_text().split()
    return found


def _resident_bytes(pid: str) -> int:
    """Shared pages count once for each process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # it has just exited
        return 0


class Rates(NamedTuple):
    """Results of a stage-1 benchmark; one entry per repeat."""

    stage1_s: list[float]
    """From the first forward pass to the last commit."""
    plain_s: list[float]
    """The plain teacher on the same number of views."""
    idle: list[float]
    """Fraction of stage 1's time without a forward pass."""
    start_s: list[float]
    """Time to the first forward pass: starting worker processes, decoding the first images."""
    descriptors: int
    children_bytes: int
    peak_bytes: int

    @property
    def ratios(self) -> list[float]:
        """Rate of stage 1 divided by that of the plain teacher."""
        return [plain / own for own, plain in zip(self.stage1_s, self.plain_s, strict=True)]


def measure(
    folder: Path,
    data: Path,
    *,
    teacher: str,
    images: int,
    views: int,
    batch: int,
    workers: int,
    device: torch.device,
    size: int = 224,
    repeats: int = 2,
) -> Rates:
    """Run stage 1 and the plain teacher alternately, `repeats` times.

    Args:
        folder: folder for the caches.
        data: the images, class folders under train/.
        teacher: timm name; random weights.
        images: number of images.
        views: views per image, in one group.
        batch: views per forward pass; divides images * views.
        workers: processes that sample views.
        device: device of the teacher.
        size: side of a view, pixels.
        repeats: number of repeats.
    """
    assert images * views % batch == 0, "images x views must be a multiple of the batch size"
    config = CacheTeacherConfig(
        data=DataConfig(source=str(data), max_samples=images),
        views=ViewConfig(size=size),
        teacher=TeacherConfig(name=teacher, pretrained=False, batch_size=batch),
        cache=StoreConfig(path=str(folder / "cache"), num_views=views, views_per_group=views,
                          samples_per_shard=min(512, max(32, images // 3))),
    )  # fmt: skip
    source = open_source(config.data, "train")
    torch.manual_seed(0)
    model = load_teacher(config.teacher, image_size=size, num_classes=len(source.class_names), device=device)
    job = make_plan(config, Process(0, 1, device), source, model, make_codec("int8", model.spec.feature_shape))
    ready = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)

    def plain() -> None:
        for _ in range(images * views // batch):
            model(ready)
        if device.type == "cuda":
            torch.cuda.synchronize()

    stage1_s, plain_s, idle, start_s = [], [], [], []
    model(ready)
    with Usage() as usage:
        for number in range(repeats):
            watched = TimedTeacher(model)
            stage: Any = dataclasses.replace(job.stage, root=folder / f"round{number}", teacher=watched)  # type: ignore[arg-type]
            started = time.perf_counter()
            with torch.no_grad():
                make_units(stage, job.units, iter(range(len(job.units))), workers, lambda unit: None)
            seconds = time.perf_counter() - watched.started
            stage1_s.append(seconds)
            start_s.append(watched.started - started)
            idle.append(1 - watched.busy_s() / seconds)
            plain_s.append(timed(plain))
    return Rates(stage1_s, plain_s, idle, start_s, usage.descriptors, usage.children_bytes, peak_memory_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    for name, (cpu, gpu) in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(cpu), help=f"default {cpu}; on a GPU {gpu}")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of the teacher; each worker has its own thread")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    gpu = device.type == "cuda"
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[gpu])
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        data = write_photographs(Path(name) / "data", options.images)
        found = measure(
            Path(name), data, teacher=options.teacher, images=options.images, views=options.views,
            batch=options.batch, workers=options.workers, device=device, repeats=options.repeats,
        )  # fmt: skip
    views = options.images * options.views
    rates_s = [f"{views / statistics.median(seconds):.1f}" for seconds in (found.stage1_s, found.plain_s)]
    figure = Measurement(
        f"stage 1 / plain teacher, {options.teacher}, {counted(options.threads, 'thread')}, "
        f"{counted(options.workers, 'worker')}",
        statistics.median(found.ratios),
        (min(found.ratios), max(found.ratios)),
        "x",
        f"{rates_s[0]} vs {rates_s[1]} views/s; no forward pass in {statistics.median(found.idle):.0%} of the time; "
        f"start {statistics.median(found.start_s):.1f} s",
        "0.97" if gpu else "0.93",
        "" if gpu else "encodes and checks features on the same cores",
    )
    publish_table("stage1-gpu" if gpu else "stage1", [figure], {"options": vars(options), "rates": found._asdict()})


if __name__ == "__main__":
    main()
