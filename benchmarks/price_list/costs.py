"""What one optimizer step of every arm costs: CPU seconds on this machine, and FLOPs for Swin-L -> ResNet-50.

In: a setting and a cache of it. Out: <setting>-steps.json with seconds per step. Invariant: steps of all arms alternate
in one process, in another order each time, because the step after a large one takes longer; they include loader,
decoding, losses and optimizer, but not DeepSpeed; the time is that of the process, so other processes on the machine
matter little.
"""

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.price_list.plan import SHARES
from benchmarks.study.__main__ import ablations
from benchmarks.study.plan import Arm, Setting
from scalekd_cache.config.options import build
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig
from scalekd_cache.devices import autocast, autocast_dtype
from scalekd_cache.distributed import Process, this_process
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.student import build_student
from scalekd_cache.planning.costs import SWIN_L, pair_costs
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.optim import make_optimizer
from scalekd_cache.training.targets import TargetSource, feature_samples, load_cache_tail, make_order
from scalekd_cache.training.trainer import DistillModel

REPEATS = 24
HEADS = ("cap", "lite", "linear")
READY = 4
"""Steps whose batches are ready on a GPU before the first is timed: there, loader workers run beside the steps."""


def config_of(setting: Setting, arm: Arm) -> DistillConfig:
    """The options of an arm's runs that matter for one step."""
    words = (*setting.stage2, *arm.options, f"train.targets={arm.targets}", f"student.name={setting.student}")
    return build(DistillConfig, recipe_section(setting.recipe, "distill"), dict(word.split("=", 1) for word in words))


def stepper(setting: Setting, arm: Arm, cache: Cache, process: Process) -> Callable[[], None]:
    """A function that trains one step of an arm; on a GPU, without the loader."""
    config, manifest, device = config_of(setting, arm), cache.manifest, process.device
    tail = load_cache_tail(cache).to(device)
    size = manifest.facts.view_recipe["size"]
    student = build_student(config.student, num_classes=len(manifest.facts.class_names), image_size=size)
    distills = arm.targets != "none"
    model = DistillModel(config, student, [make_heads(config, student, tail)] if distills else [])
    model = model.to(device).train()
    optimizer = make_optimizer(model, config.optim, 1e-4)
    train = config.train
    features = feature_samples(config.scalekd, cache, train.micro_batch_size) if distills else None
    loader = CacheLoader(
        cache, make_order(train, cache, process), epochs=100_000, global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size, workers=0, features=None if features is None else [features],
    )  # fmt: skip
    source = TargetSource(loader.codecs[0], features=features)
    batches, micros = iter(loader), len(loader.micros)
    if device.type == "cuda":
        batches = itertools.cycle([batch.to(device) for batch in itertools.islice(batches, READY * micros)])
    dtype = autocast_dtype(train.precision, device)

    def step() -> None:
        with ablations(arm):
            for batch in itertools.islice(batches, micros):
                targets, tails = ([source(batch)], [tail]) if distills else ([], [])
                with autocast(device, dtype):
                    losses = model(batch.images, batch.labels, targets, tails)
                (losses.total / micros).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def read_costs(setting: Setting, file: Path) -> dict[str, float]:
    """CPU seconds per step of the arms of a setting's questions, as far as their kind of step was measured."""
    known = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.exists() else {}
    kinds = {setting.arms[name]._replace(length=1.0): float(value) for name, value in known.items()}
    used = dict.fromkeys(name for question in setting.questions for name in (question.against, *question.arms))
    found = {name: kinds.get(setting.arms[name]._replace(length=1.0)) for name in used}
    return {name: value for name, value in found.items() if value is not None}


def kind_of_cost(file: Path) -> str:
    """What the seconds in a cost file are; without a file, no costs are known."""
    accelerator = json.loads(file.read_text(encoding="utf-8")).get("accelerator") if file.exists() else None
    return f"time on one {accelerator}, without the loader" if accelerator else "CPU time"


def measure(setting: Setting, cache: Path, file: Path) -> dict[str, float]:
    """Median seconds per step of every arm: CPU time, or wall time on a GPU. Each kind is measured once and kept in
    `file`."""
    used = dict.fromkeys(name for question in setting.questions for name in (question.against, *question.arms))
    known = read_costs(setting, file)
    if set(known) == set(used):
        return known
    kinds: dict[Any, str] = {}
    for name in used:
        kinds.setdefault(setting.arms[name]._replace(length=1.0), name)
    opened, process = Cache.open(cache), this_process()
    clock = gpu_clock if process.device.type == "cuda" else time.process_time
    steppers = {name: stepper(setting, setting.arms[name], opened, process) for name in kinds.values()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for repeat in range(REPEATS + 2):
        for name in random.Random(repeat).sample(list(steppers), len(steppers)):
            started = clock()
            steppers[name]()
            if repeat >= 2:
                times[name].append(clock() - started)
    seconds = {name: round(statistics.median(values), 5) for name, values in times.items()}
    facts = {name: machine()[name] for name in ("cpu", "cores", "threads", "accelerator", "commit", "date", "load")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seconds": seconds, "repeats": REPEATS, **facts}, indent=1) + "\n", encoding="utf-8")
    return read_costs(setting, file)


def gpu_clock() -> float:
    """Wall time after everything enqueued on the GPU has finished."""
    torch.cuda.synchronize()
    return time.perf_counter()


def flops(
    teacher: str = SWIN_L, student: str = "resnet50", names: Sequence[str] = HEADS, shares: Sequence[float] = SHARES
) -> dict[str, dict[str, float]]:
    """FLOPs of a cached step over those of the baseline, by heads and share."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for projector, share in itertools.product(names, shares):
        costs = pair_costs(teacher, student, ScaleKDConfig(projector=projector, feature_share=share))  # type: ignore[arg-type]
        found[projector][f"{share:g}"] = (costs.student.total + costs.heads_total) / costs.student.total
    return found
