"""What does a distillation step cost compared with the baseline, which parts dominate, and is the cache a bottleneck?

    python -m benchmarks.training.step [--pair resnet18 swin_tiny_patch4_window7_224 8] [--repeats 4] [--device cuda]

Seconds are CPU seconds on a CPU, so other jobs on the machine change them little.
One process without DeepSpeed runs these kinds of steps alternately, with SGD and the same micro-batch size:
baseline (labels only), synthetic (ScaleKD heads, random targets already on the device), cached (targets and pixels
through the real loader), live (pixels from the cache, targets from the teacher), teacher (forward pass only), and
cached with cheaper heads and feature shares (`CHEAPER`).
Peak memory comes from a fresh process that runs two steps of one kind: resident memory on a CPU (first pair only),
memory allocated by PyTorch on a GPU. The table also lists the memory that `step_memory` counts on the meta device.
"""

import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Clock,
    Measurement,
    argument_parser,
    peak_memory_bytes,
    publish_table,
    ratio,
    time_interleaved,
)
from benchmarks.photographs import write_photographs
from benchmarks.store.loader import make_cache
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.devices import choose_device
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.models.student import build_student
from scalekd_cache.models.teacher import Teacher, load_teacher, meta_teacher
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.planning.costs import CLASSES, pair_costs
from scalekd_cache.planning.step import step_memory
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.scalekd.losses import Targets
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.optim import make_optimizer
from scalekd_cache.training.targets import TargetSource, feature_samples, load_cache_tail
from scalekd_cache.training.trainer import DistillModel

PAIRS = [("resnet18", "swin_tiny_patch4_window7_224", 32), ("mobilenetv1_100", "swin_tiny_patch4_window7_224", 32)]
GPU_PAIRS = [
    (student, "swin_large_patch4_window7_224", 256)
    for student in ("resnet50", "mobilenetv1_100", "vit_small_patch16_224")
]


CHEAPER: dict[str, dict[str, Any]] = {
    "cached 1/2": {"feature_share": 0.5},
    "cached 1/4": {"feature_share": 0.25},
    "lite": {"projector": "lite"},
    "lite 1/4": {"projector": "lite", "feature_share": 0.25},
    "linear": {"projector": "linear"},
    "linear 1/4": {"projector": "linear", "feature_share": 0.25},
}
"""Cached steps with options of `ScaleKDConfig`."""
KINDS = ("baseline", "synthetic", "cached", "live", "teacher", *CHEAPER)
WATCHED = ("cached", "cached 1/4")
"""Steps whose parts are timed."""
PARTS = ("loader", "decoding", "forward", "backward", "optimizer")
"""Parts of a cached step, in order."""


def endless_loader(cache: Cache, batch: int, workers: int, device: torch.device) -> CacheLoader:
    """A loader with more micro-batches than a benchmark uses, for a device, as `distill` makes it."""
    order = Order(num_samples=len(cache), block=64, window=32, seed=0)
    pinned = device.type == "cuda"
    return CacheLoader(
        cache, order, epochs=100_000, global_batch=batch, micro_batch=batch, workers=workers, pin_memory=pinned
    )


def clock_of(device: torch.device) -> Clock:
    """Wall time with a GPU, CPU time without one."""
    return time.perf_counter if device.type == "cuda" else time.process_time


class Stopwatch:
    """Seconds between marks, by name, by the benchmark's clock; synchronizes a GPU first."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._at = device, {name: [] for name in PARTS}, 0.0
        self._clock = clock_of(device)

    def start(self) -> None:
        self._at = self._clock()

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = self._clock()
        self.seconds[name].append(now - self._at)
        self._at = now


def steps(student_name: str, teacher_name: str, batch: int, cache: Cache, device: torch.device, workers: int,
          kinds: Sequence[str] = KINDS) -> tuple[dict[str, Callable[[], None]], dict[str, Stopwatch]]:  # fmt: skip
    """Actions that run one optimizer step of each kind, and the time of each part of the steps in `WATCHED`."""
    manifest = cache.manifest
    config = DistillConfig(
        student=StudentConfig(name=student_name),
        optim=OptimConfig(name="sgd", lr=0.01, base_batch_size=batch),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=batch),
    )
    classes = len(manifest.facts.class_names)
    spec = TeacherSpec.from_json(manifest.facts.teacher["spec"])
    tail = load_cache_tail(cache).to(device)
    teacher = load_teacher_of(teacher_name, classes, device) if {"live", "teacher"} & set(kinds) else None
    models, watches = {}, {kind: Stopwatch(device) for kind in WATCHED}
    for kind in {kind if kind in CHEAPER or kind == "baseline" else "cached" for kind in kinds}:
        own = dataclasses.replace(config, scalekd=ScaleKDConfig(**CHEAPER.get(kind, {})))
        student = build_student(own.student, num_classes=classes, image_size=manifest.facts.view_recipe["size"])
        heads = [make_heads(own, student, tail)] if kind != "baseline" else []
        model = DistillModel(own, student, heads).to(device).train()
        models[kind] = (model, make_optimizer(model, own.optim, 0.01), feature_samples(own.scalekd, cache, batch))
    loader = endless_loader(cache, batch, workers, device)
    batches = iter(loader)
    cached_source = TargetSource(loader.codecs[0])
    live_source = cached_source._replace(teacher=teacher)
    first = next(batches).to(device)  # worker processes start here, before anything is timed
    synthetic = Targets(torch.randn(batch, *spec.feature_shape, device=device),
                   torch.ones(batch, 2, *spec.feature_shape[1:], device=device),
                   torch.randn(batch, classes, device=device))  # fmt: skip

    def step(kind: str, targets: list[Targets], images: Tensor, labels: Tensor, watch: Stopwatch) -> None:
        model, optimizer, _ = models[kind]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images, labels, targets, [tail] * len(targets)).total
        watch.mark("forward")
        loss.backward()
        watch.mark("backward")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.mark("optimizer")

    def cached(kind: str, watch: Stopwatch) -> None:
        watch.start()
        loaded = next(batches).to(device)
        watch.mark("loader")
        targets = cached_source._replace(features=models[kind][2])(loaded)
        watch.mark("decoding")
        step(kind, [targets], loaded.images, loaded.labels, watch)

    def live() -> None:
        loaded = next(batches).to(device)
        step("cached", [live_source(loaded)], loaded.images, loaded.labels, Stopwatch(device))

    def forward() -> None:
        teacher(first.images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    actions = {
        "baseline": lambda: step("baseline", [], first.images, first.labels, Stopwatch(device)),
        "synthetic": lambda: step("cached", [synthetic], first.images, first.labels, Stopwatch(device)),
        "cached": lambda: cached("cached", watches["cached"]),
        "live": live,
        "teacher": forward,
        **{kind: partial(cached, kind, watches.get(kind, Stopwatch(device))) for kind in CHEAPER},
    }
    return {kind: actions[kind] for kind in kinds}, watches


def peak_bytes(kind: str, student: str, teacher: str, batch: int, cache: Path, device: str) -> int:
    """Peak memory of this fresh process after two steps of one kind."""
    torch.set_num_threads(1)
    actions, _ = steps(student, teacher, batch, Cache.open(cache), torch.device(device), 0, (kind,))
    for _ in range(2):
        actions[kind]()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


def peaks(*where: object) -> dict[str, int]:
    """`peak_bytes` of steps, each in a separate process."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        return {kind: fresh.apply(peak_bytes, (kind, *where)) for kind in ("live", "baseline", "cached", *CHEAPER)}


def load_teacher_of(name: str, classes: int, device: torch.device) -> Teacher:
    """The teacher that made the cache (random weights)."""
    torch.manual_seed(0)
    return load_teacher(TeacherConfig(name=name, pretrained=False), image_size=224, num_classes=classes, device=device)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--pair", nargs=3, action="append", metavar=("STUDENT", "TEACHER", "BATCH"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, help="loader processes (default 0; on a GPU all cores but one)")
    options = parser.parse_args(argv)
    device = choose_device(options.device)
    if options.workers is None:
        options.workers = max(1, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 0
    pairs = [(s, t, int(b)) for s, t, b in options.pair or []] or (GPU_PAIRS if device.type == "cuda" else PAIRS)
    figures: list[Measurement] = []
    raw = {}
    for student, teacher, batch in pairs:
        with tempfile.TemporaryDirectory() as name:
            count = max(options.images, batch)
            data = write_photographs(Path(name) / "data", count)
            cache = make_cache(Path(name) / "cache", data, count, teacher, device=options.device)
            where = (student, teacher, batch, Path(name) / "cache", options.device)
            memory = peaks(*where) if device.type == "cuda" or not raw else {}
            actions, watches = steps(student, teacher, batch, cache, device, options.workers)
            for action in actions.values():
                action()
            seconds = time_interleaved(options.repeats, clock=clock_of(device), **actions)
        parts = {f"parts of {kind}": watch.seconds for kind, watch in watches.items()}
        raw[f"{student} {teacher}"] = {**seconds, **parts, "peak_bytes": memory}
        ceiling = pair_costs(teacher, student).ceiling
        pair = f"{student}, {teacher.partition('_patch')[0]}"
        figures += pair_rows(pair, batch, seconds, ceiling, gpu=device.type == "cuda")
        figures += cheaper_rows(pair, seconds, student, teacher)
        figures += [breakdown_row(pair, batch, kind, watch, seconds) for kind, watch in watches.items()]
        figures += memory_rows(pair, memory, counted_memory(student, teacher, batch)) if memory else []
    publish_table("step-gpu" if device.type == "cuda" else "step", figures, {"pairs": pairs, "seconds": raw})


def pair_rows(
    pair: str, batch: int, seconds: dict[str, list[float]], ceiling: float, *, gpu: bool
) -> list[Measurement]:
    """Table rows of one student-teacher pair."""
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    over = [a / b for a, b in zip(seconds["cached"], seconds["synthetic"], strict=True)]
    parts = ", ".join(f"{name} {1e3 * value / batch:.1f}" for name, value in cost.items())
    limit = (cost["synthetic"] + cost["teacher"]) / cost["synthetic"]
    gain = [a / b for a, b in zip(seconds["live"], seconds["cached"], strict=True)]
    rows = [Measurement(f"{pair}: cached / synthetic targets", statistics.median(over), (min(over), max(over)), "x",
                   f"ms per image: {parts}", "at most 1.02" if gpu else "at most 1.05",
                   "JPEG decoding in the same process"),
            Measurement(f"{pair}: live / cached", statistics.median(gain), (min(gain), max(gain)), "x",
                   f"upper limit {limit:.2f} in this run, {ceiling:.2f} by FLOPs", f"at least {0.95 * limit:.2f}", ""),
            ]  # fmt: skip
    what, gap = f"{pair}: baseline / synthetic targets", "heads and tail (`scalekd costs`)"
    rows.append(ratio(what, seconds, "baseline", "synthetic", amount=batch, unit="images/s", goal="", gap=gap))
    return rows


def cheaper_rows(pair: str, seconds: dict[str, list[float]], student: str, teacher: str) -> list[Measurement]:
    """Cost of a step over the baseline, by heads and feature share; gain over a live step, and what FLOPs allow."""
    rows, full = [], pair_costs(teacher, student)
    live = full.student.total + full.heads_total + full.teacher.forward
    for kind in ("cached", *CHEAPER):
        over = [a / b for a, b in zip(seconds[kind], seconds["baseline"], strict=True)]
        gain = statistics.median(a / b for a, b in zip(seconds["live"], seconds[kind], strict=True))
        costs = pair_costs(teacher, student, ScaleKDConfig(**CHEAPER.get(kind, {})))
        own = costs.student.total + costs.heads_total
        compared = f"{own / costs.student.total:.2f} by FLOPs; live / {kind} {gain:.2f}, {live / own:.2f} by FLOPs"
        goals = {"cached 1/4": "at most 1.8 (ResNet-18)", "linear": "at most 1.15 (ResNet-18)"}
        what = f"{pair}: {kind} / baseline"
        rows.append(
            Measurement(what, statistics.median(over), (min(over), max(over)), "x", compared, goals.get(kind, ""), "")
        )
    return rows


def breakdown_row(pair: str, batch: int, kind: str, watch: Stopwatch, seconds: dict[str, list[float]]) -> Measurement:
    """Breakdown of a step of this kind, and the fraction that a baseline step would take."""
    parts = {name: statistics.median(values[1:]) for name, values in watch.seconds.items()}
    total, baseline = sum(parts.values()), statistics.median(seconds["baseline"])
    shares = ", ".join(f"{name} {100 * value / total:.1f}%" for name, value in parts.items())
    return Measurement(f"{pair}: parts of a step, {kind}", 1e3 * total / batch, None, "ms per image", shares, "",
                  f"the baseline takes {100 * baseline / total:.0f}%; heads, tail and losses the rest")  # fmt: skip


def counted_memory(student: str, teacher: str, batch: int) -> dict[str, float]:
    """Bytes of a step by kind, without the code: model, gradients, momentum and activations, on the meta device."""
    with torch.device("meta"):
        known, totals = meta_teacher(teacher, 224, CLASSES), {}
        for kind in ("cached", *CHEAPER):
            config = DistillConfig(
                student=StudentConfig(name=student),
                optim=OptimConfig(name="sgd", lr=0.01, base_batch_size=batch),
                train=TrainConfig(global_batch_size=batch, micro_batch_size=batch),
                scalekd=ScaleKDConfig(**CHEAPER.get(kind, {})),
            )
            totals[kind] = step_memory(config, known, 224, CLASSES)["total"]
    return totals


def memory_rows(pair: str, memory: dict[str, int], counted: dict[str, float]) -> list[Measurement]:
    """Peak memory by kind of step over that of a baseline step."""
    rows = []
    for kind, size in memory.items():
        sizes = f"{size / 2**30:.2f} vs {memory['baseline'] / 2**30:.2f} GiB"
        if kind in counted:
            sizes += f"; without the code {counted[kind] / 2**30:.2f} GiB on meta tensors"
        if kind != "baseline":
            what = f"{pair}: peak memory, {kind} / baseline"
            rows.append(Measurement(what, size / memory["baseline"], None, "x", sizes, "", ""))
    return rows


if __name__ == "__main__":
    main()
