"""Runs a series of students or seeds with one command and reports the mean and spread over the seeds.

In: a `DistillConfig` whose `student.name` and `train.seeds` can list multiple values. Out: one configuration per run,
the summaries, and one row per student.
Invariant: each run in a series has its own folder and is identical to a single run with the same student and seed.
"""

import dataclasses
import gc
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, cast

import torch

from scalekd_cache.config.places import default_run
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.distributed import Process
from scalekd_cache.models.evaluate import percent
from scalekd_cache.progress import duration_text
from scalekd_cache.training.dry_run import plan_distill
from scalekd_cache.training.run import distill
from scalekd_cache.training.run_files import RunSummary, Summary
from scalekd_cache.training.trackers import Logger


def single_runs(config: DistillConfig) -> list[DistillConfig]:
    """One configuration per student and seed, without duplicates, ordered by student, each with its own folder.

    The folder is `run` (None: `default_run`). It is followed by -<student> if `run` is set and there are multiple
    students, and by -seed<N> if `train.seeds` is set.
    """
    students = list(dict.fromkeys(name.strip() for name in config.student.name.split(",") if name.strip()))
    students = students or [config.student.name]
    seeds = seeds_of(config)
    runs = []
    for name in students:
        one = dataclasses.replace(config, student=dataclasses.replace(config.student, name=name))
        shared = config.run is not None and len(students) > 1
        run = f"{config.run}-{name}" if shared else config.run or default_run(name, config.train.targets)
        for seed in seeds or [config.train.seed]:
            train = dataclasses.replace(config.train, seed=seed, seeds=None)
            runs.append(dataclasses.replace(one, train=train, run=f"{run}-seed{seed}" if seeds else run))
    return runs


def seeds_of(config: DistillConfig) -> list[int]:
    """The seeds in `train.seeds` without duplicates; empty if not set."""
    return list(dict.fromkeys(int(seed) for seed in (config.train.seeds or "").split(",") if seed.strip()))


def plan_series(configs: Sequence[DistillConfig], process: Process) -> list[str]:
    """Check all runs, and print and return the lines that describe what they would do."""
    lines = [line for config in configs for line in plan_distill(config, process)]
    process.print_rank0("\n".join(lines))
    return lines


def distill_series(configs: Sequence[DistillConfig], process: Process, log: Logger | None = None) -> list[Summary]:
    """Train one run after another. All runs are checked before the first one starts; finished runs are not repeated.

    `log` is called as in `distill`.

    Raises:
        UserError: a run failed. The remaining runs are not started, and a rerun resumes at the failed run.
    """
    if len(configs) > 1:
        for config in configs:
            plan_distill(config, process)
    summaries = []
    for number, config in enumerate(configs, 1):
        if len(configs) > 1:
            process.print_rank0(f"run {number} of {len(configs)}: {config.run}")
        summaries.append({"run": str(config.run), **distill(config, process, log)})
        gc.collect()  # DeepSpeed engines contain reference cycles
        if process.device.type == "cuda":
            torch.cuda.empty_cache()
    return summaries


def summarize_series(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per set of runs that differ only in the seed: number of runs, mean and sample standard deviation.

    The deviation is None for a single run. Both are None if a run was not evaluated.
    """
    groups: dict[tuple[Any, ...], list[Summary]] = {}
    for summary in summaries:
        same = ("student", "teacher", "targets", "cache_fingerprint", "steps", "image_size")
        groups.setdefault(tuple(summary.get(name) for name in same), []).append(summary)
    return [_row(runs) for runs in groups.values()]


def series_facts(summaries: Sequence[Summary]) -> RunSummary:
    """The first run's summary. With multiple runs, it also has `runs` (all summaries) and `series`
    (`summarize_series`)."""
    several = {"runs": list(summaries), "series": summarize_series(summaries)} if len(summaries) > 1 else {}
    return cast(RunSummary, {**summaries[0], **several})


def _row(runs: Sequence[Summary]) -> dict[str, Any]:
    row: dict[str, Any] = {name: runs[0][name] for name in ("student", "teacher", "targets", "epochs", "steps")}
    row |= {"n": len(runs), "seeds": [run["seed"] for run in runs]}
    for name in ("top1", "top5"):
        values = [run[name] for run in runs]
        known = None not in values
        row[name] = values
        row[f"{name}_mean"] = round(statistics.mean(values), 4) if known else None
        row[f"{name}_std"] = round(statistics.stdev(values), 4) if known and len(values) > 1 else None
    return {**row, "minutes": round(math.fsum(run["minutes"] for run in runs), 2)}


def series_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summarize_series` as a text table."""
    head = ("student", "targets", "n", "top-1", "std", "top-5", "top-1 per run", "epochs", "time")
    shown = [name != "top-5" or any(row["top5_mean"] is not None for row in rows) for name in head]
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        spread = "-" if row["top1_std"] is None else f"{row['top1_std']:.2f}"
        each = ", ".join("-" if value is None else f"{value:.2f}" for value in row["top1"])
        accuracies = percent(row["top1_mean"]), spread, percent(row["top5_mean"]), each
        time = duration_text(60 * row["minutes"])
        lines.append((row["student"], row["targets"], str(row["n"]), *accuracies, str(row["epochs"]), time))
    lines = [tuple(itertools.compress(line, shown)) for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(sum(shown))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)
