"""Parts e to g of the GPU smoke run: stage 1, the real trainer, recovery.

In: `Sizes`, the folder of the run. Out: results, reported one by one.
Invariant: the parts run the project's own code: the jobs of `cache_teacher` and `distill`, the audit, a command line.
"""

import gc
import hashlib
import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import ROOT, option_words
from benchmarks.smoke.kernels import milliseconds
from benchmarks.smoke.sizes import FAILED, Add, Sizes, attempt, cache_of
from benchmarks.training.stage1 import measure
from scalekd_cache.audit.repair import repair_cache
from scalekd_cache.audit.verify_cache import verify_deep
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.distributed import Process, this_process
from scalekd_cache.loader.loader import Batch
from scalekd_cache.scalekd.losses import Targets
from scalekd_cache.training.checkpoint import Checkpoint, latest_checkpoint
from scalekd_cache.training.run import _make_trainer
from scalekd_cache.training.run_cache import open_run_cache
from scalekd_cache.training.trainer import Trainer

CPU_RUN_LIMIT_S = 150
EPOCHS = 4
"""Epochs of a variant. The first is not timed; the last one ends with the profiled steps."""
PROFILED = 2


@dataclass(frozen=True)
class Variant:
    """One training variant; unset options are those of `config_of`."""

    name: str
    """Kind and micro-batch."""
    micro: int
    train: dict[str, Any] = field(default_factory=dict)
    scalekd: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    synthetic: bool = False
    """Targets are random numbers on the device; nothing is decoded."""


def variants(sizes: Sizes) -> list[Variant]:
    """All variants, most important first, because the part may be stopped."""
    micro, *smaller = sizes.micro_batches
    return [
        *compared(micro),
        Variant(f"share 1/4 {micro}", micro, scalekd={"feature_share": 0.25}),
        Variant(f"lite {micro}", micro, scalekd={"projector": "lite"}),
        Variant(f"linear {micro}", micro, scalekd={"projector": "linear"}),
        *(one for size in smaller for one in compared(size)),
        Variant(f"share 1/2 {micro}", micro, scalekd={"feature_share": 0.5}),
        Variant(f"lite, share 1/4 {micro}", micro, scalekd={"projector": "lite", "feature_share": 0.25}),
        Variant(f"lamb {micro}", micro, optim={"name": "lamb", "lr": 1e-3}),
        *(Variant(f"zero{stage} {micro}", micro, train={"zero": stage}) for stage in (1, 2, 3)),
        Variant(f"channels-last {micro}", micro, train={"channels_last": True}),
    ]


def compared(micro: int) -> list[Variant]:
    """The variants that are compared at every micro-batch."""
    return [
        Variant(f"synthetic {micro}", micro, optim={"lr": 1e-9}, synthetic=True),
        Variant(f"cached {micro}", micro),
        Variant(f"live {micro}", micro, train={"targets": "live"}),
        Variant(f"baseline {micro}", micro, train={"targets": "none"}),
    ]


class Lines:
    """Replaces a run folder: keeps the trainer's logged values in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        """Store the values of a step."""
        self.lines.append(dict(values))


def config_of(sizes: Sizes, variant: Variant, cache: Path, run: Path) -> DistillConfig:
    """Options for `EPOCHS` epochs; metrics are logged once per epoch."""
    micro = variant.micro
    return DistillConfig(
        cache=str(cache),
        run=str(run),
        student=StudentConfig(name=sizes.student),
        optim=OptimConfig(**{"name": "sgd", "lr": 0.01, "base_batch_size": micro, **variant.optim}),
        scalekd=ScaleKDConfig(**variant.scalekd),
        train=TrainConfig(**{
            "epochs": EPOCHS, "global_batch_size": micro, "micro_batch_size": micro, "workers": sizes.workers,
            "log_every": 10**6, **variant.train,
        }),
    )  # fmt: skip


def trainer_of(config: DistillConfig, process: Process, checkpoint: Checkpoint | None = None) -> Trainer:
    """The trainer that `distill` builds."""
    assert config.run is not None
    return _make_trainer(config, process, open_run_cache(config, Path(config.run), process), checkpoint)


def stage1(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part e: rate of stage 1 on all images, relative to the plain teacher."""
    found = measure(
        folder / "stage1", folder / "images", teacher=sizes.teacher, images=sizes.images, views=sizes.views,
        batch=sizes.teacher_batches[-1], workers=sizes.workers, device=this_process(sizes.device).device,
        size=sizes.views_px, repeats=1,
    )  # fmt: skip
    views = sizes.images * sizes.views
    add("stage1", {
        "ratio": statistics.median(found.ratios), "views_per_s": views / found.stage1_s[0],
        "plain_views_per_s": views / found.plain_s[0], "idle_share": found.idle[0], "start_s": found.start_s[0],
        "peak_descriptors": found.descriptors, "peak_bytes": found.peak_bytes,
        "workers_peak_bytes": found.children_bytes, "workers": sizes.workers,
    })  # fmt: skip


def trainer(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part f: every variant for `EPOCHS` epochs; those between the first and the last are timed."""
    process = this_process(sizes.device)
    cache = cache_of(folder, sizes)
    for variant in variants(sizes):
        with attempt(add, variant.name):  # also for "out of memory"
            add(variant.name, timed_epoch(sizes, variant, cache, folder / "runs", process))
        gc.collect()
        if process.device.type == "cuda":
            torch.cuda.empty_cache()


def timed_epoch(sizes: Sizes, variant: Variant, cache: Path, runs: Path, process: Process) -> dict[str, Any]:
    """Step time, launch time, GPU time, kernels, data wait and peak memory of a variant."""
    gpu = process.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    made = time.perf_counter()
    run = trainer_of(config_of(sizes, variant, cache, runs / variant.name), process)
    if variant.synthetic:
        run.targets = [synthetic_targets(run, variant.micro)]
    made = time.perf_counter() - made
    lines, first = Lines(), run.loader.steps_per_epoch
    steps = run.train(lines)  # type: ignore[arg-type]
    for _ in range(first):
        next(steps)
    count = run.loader.total_steps - 2 * first
    started = time.perf_counter()
    for _ in range(count - 1):
        next(steps)
    launched = time.perf_counter()
    next(steps)  # the last step of an epoch logs, which waits for the GPU
    ended = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        list(itertools.islice(steps, PROFILED))
        if gpu:
            torch.cuda.synchronize()
    figures = {
        "step_ms": round(1e3 * (ended - started) / count, 3),
        "launch_ms": round(1e3 * (launched - started) / max(1, count - 1), 3),
        "data_wait": statistics.mean(line["data_wait"] for line in lines.lines[1:]),
        "loss": lines.lines[-1]["loss"],
        "setup_s": round(made, 2),
    }
    if gpu:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        kernels = [event for event in profiler.events() or [] if is_kernel(event)]
        figures["gpu_ms"] = round(sum(event.time_range.elapsed_us() for event in kernels) / PROFILED / 1e3, 3)
        figures["launches"] = len(kernels) // PROFILED
    teacher = run.targets[0].teacher if run.targets and not variant.synthetic else None
    if teacher is not None:
        px = sizes.views_px
        images = torch.zeros(variant.micro, 3, px, px, dtype=torch.uint8, device=process.device)
        figures["teacher_ms"] = milliseconds(lambda: teacher(images), process.device, sizes.repeats)
    steps.close()
    run.close()
    return figures


def is_kernel(event: Any) -> bool:
    """Whether a profiler's event is work on the GPU, not the span of a named range."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def synthetic_targets(run: Trainer, batch: int) -> Any:
    """A source of targets without any cost."""
    device, shape = run.process.device, run.loader.codecs[0].features.shape
    targets = Targets(
        torch.randn(batch, *shape, device=device),
        torch.ones(batch, 2, *shape[1:], device=device),
        torch.randn(batch, run.loader.codecs[0].logits.num_classes, device=device),
    )

    def source(_: Batch) -> Targets:
        return targets

    return source


def recovery(sizes: Sizes, folder: Path, add: Add) -> None:
    """Part g: resume at another ZeRO stage, verify and repair, training on the CPU of this machine."""
    process = this_process(sizes.device)
    cache = cache_of(folder, sizes)
    with attempt(add, "resume"):
        add("resume", resumed(sizes, cache, folder / "recovery", process))
    with attempt(add, "audit"):
        add("audit", audited(cache, process))
    with attempt(add, "device_cpu"):
        tiny = cache_of(folder, sizes, tiny=True)
        add("device_cpu", trained_on_cpu(tiny, folder / "cpu-run"))


def resumed(sizes: Sizes, cache: Path, folder: Path, process: Process) -> dict[str, Any]:
    """Save at half the steps at ZeRO 0; compare the loss of the last epoch with a resume at ZeRO 2."""
    micro = sizes.micro_batches[-1]
    whole = trainer_of(config_of(sizes, Variant("zero 0", micro), cache, folder / "run"), process)
    lines, other = Lines(), Lines()
    steps = whole.train(lines)  # type: ignore[arg-type]
    for _ in range(whole.loader.total_steps // 2):
        next(steps)
    started = time.perf_counter()
    whole.save(folder / "checkpoints")
    save_s = time.perf_counter() - started
    list(steps)
    checkpoint, problems = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None, problems
    config = config_of(sizes, Variant("zero 2", micro, train={"zero": 2}), cache, folder / "run")
    list(trainer_of(config, process, checkpoint).train(other))  # type: ignore[arg-type]
    losses = lines.lines[-1]["loss"], other.lines[-1]["loss"]
    return {
        "save_s": round(save_s, 2),
        "loss_of_the_last_epoch": losses,
        "difference": abs(losses[0] - losses[1]) / abs(losses[0]),
    }


def audited(cache: Path, process: Process) -> dict[str, Any]:
    """Verify the cache, damage one byte, repair it; checks that the repaired file has its original bytes."""
    whole = verify_deep(cache, device=process.device)
    file = max((path for path in (cache / "units").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    before = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    repaired = repair_cache(cache, process)
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    agreement = whole.agreement
    return {
        "problems": [str(problem) for problem in whole.findings.problems],
        "teacher_again": agreement.figures if agreement else None,
        "repaired_units": repaired.units,
        "left": [str(problem) for problem in repaired.left],
        "same_bytes": before == after,
    }


def trained_on_cpu(cache: Path, run: Path) -> dict[str, Any]:
    """`distill --device cpu` in a separate process, on a machine with a GPU."""
    options = {"cache": cache, "run": run, "student.name": "resnet10t", "train.epochs": 1, "device": "cpu",
               "train.global_batch_size": 8, "train.micro_batch_size": 8}  # fmt: skip
    command = [sys.executable, "-m", "pipelines.distill", *option_words(options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=CPU_RUN_LIMIT_S)
    output = (done.stdout + done.stderr)[-600:]
    return {"exit_code": done.returncode, ("output" if done.returncode == 0 else FAILED): output}
