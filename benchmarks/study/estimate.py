"""Estimates the time and disk space of a study.

In: settings and their result lines. Out: printed runs, minutes and disk space. Invariant: times come from finished runs
of the same kind if there are any, else from measured training steps with random weights.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.study.plan import CACHES, Run, Setting, runs_of
from benchmarks.study.statistics import Line, read_lines
from scalekd_cache.errors import counted

START_S = 5.0
"""Seconds per run for evaluation, export and checkpoints."""


def seconds_of(setting: Setting, run: Run, lines: Sequence[Line]) -> float | None:
    """Mean wall time of finished runs of the same student and arm, else of the same targets; None if there are none."""
    mine, kind = [line for line in lines if line["student"] == run.student], setting.arms[run.arm].targets
    walls = [line["wall_s"] for line in mine if line["arm"] == run.arm]
    walls = walls or [line["wall_s"] for line in mine if setting.arms[line["arm"]].targets == kind]
    return sum(walls) / len(walls) if walls else None


def measured_steps(setting: Setting, student: str) -> tuple[dict[str, float], float]:
    """Seconds per step by kind of targets, and bytes per view of int8 features."""
    from scalekd_cache.config.options import build
    from scalekd_cache.config.recipes import recipe_section
    from scalekd_cache.config.stage1 import CacheTeacherConfig, TeacherConfig
    from scalekd_cache.config.stage2 import DistillConfig
    from scalekd_cache.distributed import this_process
    from scalekd_cache.models.student import build_student
    from scalekd_cache.models.teacher import load_teacher, split_tail
    from scalekd_cache.scalekd.heads import make_heads
    from scalekd_cache.scalekd.losses import Targets
    from scalekd_cache.training.trainer import DistillModel

    device = this_process().device
    section = recipe_section(setting.recipe, "cache")
    stage1 = build(CacheTeacherConfig, section)
    given = dict(option.split("=", 1) for option in (*setting.stage2, f"student.name={student}"))
    config = build(DistillConfig, recipe_section(setting.recipe, "distill"), given)
    size, batch = stage1.views.size, config.train.micro_batch_size
    random = TeacherConfig(name=stage1.teacher.name, pretrained=False)
    teacher = load_teacher(random, image_size=size, num_classes=10, device=device)
    tail, model = split_tail(teacher), build_student(config.student, num_classes=10, image_size=size)
    images = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (batch,), device=device)
    shape, seconds = teacher.spec.feature_shape, {}
    norms = torch.ones(batch, 2, *shape[1:], device=device)
    targets = Targets(torch.randn(batch, *shape, device=device), norms, torch.randn(batch, 10, device=device))
    for kind in ("none", "cached"):
        heads = [make_heads(config, model, tail)] if kind == "cached" else []
        whole: Any = DistillModel(config, model, heads).to(device)
        given = [targets] * len(heads), [tail] * len(heads)
        seconds[kind] = _min_seconds(lambda: whole(images, labels, *given).total.backward())  # noqa: B023
    with torch.no_grad():
        seconds["live"] = seconds["cached"] + _min_seconds(lambda: teacher(images))
    micros = config.train.global_batch_size // batch
    return {kind: value * micros for kind, value in seconds.items()}, float(torch.tensor(shape).prod())


def _min_seconds(call: Any) -> float:
    """Minimum time of two calls after one warm-up call."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def images_of(setting: Setting, data: str | None) -> int:
    """Number of training images of a setting."""
    from scalekd_cache.config.stage1 import DataConfig
    from scalekd_cache.data.source import open_source

    source = open_source(DataConfig(source=data if setting.given and data else "demo"), "train")
    limits = [int(option.partition("=")[2]) for option in setting.stage1 if option.startswith("data.max_samples=")]
    return min([len(source.samples), *limits])


def print_estimate(settings: Sequence[Setting], paths: Any) -> None:
    """Print one line per setting, and the total."""
    from scalekd_cache.config.recipes import recipe_section

    total = 0.0
    for setting in settings:
        lines = read_lines(paths.results / f"{setting.name}.jsonl")
        done = {line["key"] for line in lines}
        runs = [run for run in runs_of(setting) if run.key not in done]
        training = {**recipe_section(setting.recipe, "distill")["train"], **_train_options(setting)}
        images = images_of(setting, paths.data)
        steps = setting.epochs * (images // int(training["global_batch_size"]))
        measured: dict[str, dict[str, float]] = {}
        minutes, values = 0.0, 0.0
        for run in runs:
            known = seconds_of(setting, run, lines)
            if known is None:
                if run.student not in measured:
                    measured[run.student], values = measured_steps(setting, run.student)
                known = START_S + steps * measured[run.student][setting.arms[run.arm].targets]
            minutes += known / 60
        caches = {setting.arms[run.arm].cache for run in runs_of(setting)}
        size = recipe_section(setting.recipe, "cache")["views"]["size"]
        views = images * setting.epochs
        own = {name: 4000 + 0.3 * size * size if CACHES[name].own_pixels else 2000 for name in caches}
        disk = sum(views * (values + rest) for rest in own.values())
        print(
            f"{setting.name}: {len(runs)} of {counted(len(runs_of(setting)), 'run')} left, {steps} steps each, "
            f"{images} images, about {minutes:.0f} min on this machine under its current load;\n"
            f"  {counted(len(caches), 'cache')} of {views} views, at most {disk / 1e9:.2f} GB (plus one checkpoint)"
        )
        for student, kinds in measured.items():
            each = ", ".join(f"{kind} {1000 * value:.0f} ms" for kind, value in kinds.items())
            print(f"  measured step of {student}: {each}")
        total += minutes
    print(f"about {total:.0f} min in total; you can interrupt at any time and rerun to resume", flush=True)


def _train_options(setting: Setting) -> dict[str, str]:
    pairs = (option.partition("=") for option in setting.stage2 if option.startswith("train."))
    return {name.removeprefix("train."): value for name, _, value in pairs}
