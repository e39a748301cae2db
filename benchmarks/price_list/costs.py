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
from scalekd_cache.distributed import Process
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.student import build_student
from scalekd_cache.planning.costs import SWIN_L, pair_costs
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.optim import make_optimizer
from scalekd_cache.training.targets import TargetSource, feature_samples, load_cache_tail, make_heads, make_order
from scalekd_cache.training.trainer import DistillModel

REPEATS = 24
HEADS = ("cap", "lite", "linear")
CPU = Process(0, 1, torch.device("cpu"))


def config_of(setting: Setting, arm: Arm) -> DistillConfig:
    """The options of an arm's runs that matter for one step."""
    words = (*setting.stage2, *arm.options, f"train.targets={arm.targets}", f"student.name={setting.student}")
    return build(DistillConfig, recipe_section(setting.recipe, "distill"), dict(word.split("=", 1) for word in words))


def stepper(setting: Setting, arm: Arm, cache: Cache) -> Callable[[], None]:
    """A function that trains one step of an arm."""
    config, manifest = config_of(setting, arm), cache.manifest
    tail = load_cache_tail(cache)
    size = manifest.facts.view_recipe["size"]
    student = build_student(config.student, num_classes=len(manifest.facts.class_names), image_size=size)
    distills = arm.targets != "none"
    model = DistillModel(config, student, [make_heads(config, student, tail)] if distills else []).train()
    optimizer = make_optimizer(model, config.optim, 1e-4)
    train = config.train
    features = feature_samples(config.scalekd, cache, train.micro_batch_size) if distills else None
    loader = CacheLoader(
        cache, make_order(train, cache, CPU), epochs=100_000, global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size, workers=0, features=None if features is None else [features],
    )  # fmt: skip
    source = TargetSource(loader.codecs[0], features=features)
    batches, micros = iter(loader), len(loader.micros)

    def step() -> None:
        with ablations(arm):
            for batch in itertools.islice(batches, micros):
                targets, tails = ([source(batch)], [tail]) if distills else ([], [])
                (model(batch.images, batch.labels, targets, tails).total / micros).backward()
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


def measure(setting: Setting, cache: Path, file: Path) -> dict[str, float]:
    """Median CPU seconds per step of every arm; measured once per kind of step and kept in `file`."""
    used = dict.fromkeys(name for question in setting.questions for name in (question.against, *question.arms))
    known = read_costs(setting, file)
    if set(known) == set(used):
        return known
    kinds: dict[Any, str] = {}
    for name in used:
        kinds.setdefault(setting.arms[name]._replace(length=1.0), name)
    opened = Cache.open(cache)
    steppers = {name: stepper(setting, setting.arms[name], opened) for name in kinds.values()}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for repeat in range(REPEATS + 2):
        for name in random.Random(repeat).sample(list(steppers), len(steppers)):
            started = time.process_time()
            steppers[name]()
            if repeat >= 2:
                times[name].append(time.process_time() - started)
    seconds = {name: round(statistics.median(values), 5) for name, values in times.items()}
    facts = {name: machine()[name] for name in ("cpu", "cores", "threads", "commit", "date", "load")}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seconds": seconds, "repeats": REPEATS, **facts}, indent=1) + "\n", encoding="utf-8")
    return read_costs(setting, file)


def flops(
    teacher: str = SWIN_L, student: str = "resnet50", names: Sequence[str] = HEADS, shares: Sequence[float] = SHARES
) -> dict[str, dict[str, float]]:
    """FLOPs of a cached step over those of the baseline, by heads and share."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for projector, share in itertools.product(names, shares):
        costs = pair_costs(teacher, student, ScaleKDConfig(projector=projector, feature_share=share))  # type: ignore[arg-type]
        found[projector][f"{share:g}"] = (costs.student.total + costs.heads_total) / costs.student.total
    return found
