"""Compares multiple runs: a table that includes the teacher, mean and spread over seeds, and charts.

In: runs, and the teacher's predictions if available. Out: values for the template.
Invariant: losses share a chart only if they are sums of the same terms, and thus comparable.
"""

import json
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from scalekd_cache.config.base import flat
from scalekd_cache.config.places import cache_places
from scalekd_cache.convert.markup import last_part
from scalekd_cache.models.evaluate import percent
from scalekd_cache.progress import duration_text
from scalekd_cache.reports.charts import Chart, curves, matrix, scatter
from scalekd_cache.reports.predictions import Images, Predictions
from scalekd_cache.reports.run_data import Run
from scalekd_cache.scalekd.losses import LossTerms
from scalekd_cache.training.held_out_evaluation import FIGURES
from scalekd_cache.training.run_files import text_option

LABELS = {
    "top1": "top-1",
    "top5": "top-5",
    "held_out_loss": "feature loss, held out",
    "cosine_patch": "cosine of maps",
    "cosine_pooled": "cosine of embeddings",
    "retrieval": "common neighbors",
    "knn": "k-NN",
    "teacher_knn": "k-NN, teacher",
    "linear_probe": "linear probe",
    "teacher_linear_probe": "linear probe, teacher",
}
"""Short names for accuracies and for the metrics in `training/held_out_evaluation.py`."""
NUMBERS = ("epochs", *LABELS.values(), "parameters, M", "weights, MB", "training images/s", "inference images/s",
           "time")  # fmt: skip
"""Table columns that hold numbers."""
LOSS = ("targets", "label_loss")
"""Options in `train` that determine the loss."""
NOT_RESULTS = ("seed", "workers", "log_every", "log_samples", "timeout_minutes", "checkpoint_epochs",
               "checkpoint_steps", "keep_checkpoints", "eval_epochs")  # fmt: skip
"""Options in `train` that may differ between averaged runs."""


def compare_runs(runs: list[Run], teacher: Predictions | None, images: Images | None) -> dict[str, Any]:
    """Collect the values for the comparison template."""
    return {
        "rows": _informative([*(_row(run) for run in runs), *_teacher_rows(runs)], len(_fingerprints(runs)) > 1),
        "numbers": NUMBERS,
        "seeds": mean_over_seeds(runs),
        "seed_numbers": ("epochs", "seeds", "lowest", "highest", *LABELS.values()),
        "charts": [*_loss_charts(runs), *_other_charts(runs), *_agreement_chart(runs, teacher, images)],
    }


def format_figure(name: str, value: float) -> str:
    """Format an accuracy or a held-out metric."""
    if name == "retrieval":
        return f"{value:.0%}"
    return percent(value) if name.startswith("top") or "knn" in name or "probe" in name else f"{value:.3f}"


def _measures(summary: Mapping[str, Any]) -> dict[str, float]:
    """A finished run's metrics: top-1 and top-5, or the held-out metrics."""
    held_out = summary.get("held_out", {})
    if held_out:
        return dict(held_out)
    return {name: summary[name] for name in ("top1", "top5") if summary[name] is not None}


def heads_of(options: Mapping[str, Any]) -> str:
    """A run's head type; "none" without distillation."""
    targets = text_option(options, "train.targets")
    return "none" if targets == "none" else text_option(options, "scalekd.projector")


def _row(run: Run) -> dict[str, str]:
    student, summary = run.student, run.summary
    held_out = {} if summary is None else summary.get("held_out", {})
    return {
        "run": run.name,
        "model": text_option(run.options, "student.name"),
        "cache": _cache_names(run),
        "targets": text_option(run.options, "train.targets"),
        "heads": heads_of(run.options),
        "initial weights": last_part(run.options.get("init") or ""),
        "epochs": text_option(run.options, "train.epochs"),
        "top-1": "in progress" if summary is None else "" if held_out else percent(summary["top1"]),
        "top-5": "" if summary is None or summary["top5"] is None else percent(summary["top5"]),
        **{LABELS[name]: format_figure(name, held_out[name]) if name in held_out else "" for name in FIGURES},
        "parameters, M": "" if student is None else f"{student.parameters / 1e6:.2f}",
        "weights, MB": "" if student is None else f"{student.bytes / 1e6:.1f}",
        "training images/s": "" if summary is None else f"{summary['images_per_s']:,.0f}",
        "inference images/s": "" if student is None or student.images_per_s is None else f"{student.images_per_s:,.0f}",
        "time": "" if summary is None else duration_text(60 * summary["minutes"]),
    }


def _cache_names(run: Run) -> str:
    return ", ".join(last_part(place) for place in cache_places(text_option(run.options, "cache")))


def _teacher_rows(runs: list[Run]) -> list[dict[str, str]]:
    """For each cache, one row per teacher."""
    finished_last = sorted(runs, key=lambda run: run.summary is not None)
    of_caches = {run.facts["fingerprint"]: run for run in finished_last}
    empty = dict.fromkeys(_row(runs[0]), "")
    return [
        {**empty, "run": "teacher", "model": name, "cache": _cache_names(run), "top-1": top1}
        for run in of_caches.values()
        for name, top1 in _teachers(run)
    ]


def _teachers(run: Run) -> list[tuple[str, str]]:
    """Name and accuracy of each teacher of a run. Without a summary or labels, one text describes the teachers."""
    summary = run.summary
    if summary is None or "held_out" in summary:
        return [(text, "") for text in [run.facts.get("teacher")] if text]
    several = [(one.get("label", one["name"]), percent(one["top1"])) for one in summary.get("teachers", ())]
    return several or [(summary["teacher"], percent(summary["teacher_top1"]))]


def mean_over_seeds(runs: list[Run]) -> list[dict[str, str]]:
    """Rows with mean and spread for finished runs that differ only in the seed. Single seeds get no row."""
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        if run.summary is not None and _measures(run.summary):
            train = {name: value for name, value in _part(run, "train").items() if name not in NOT_RESULTS}
            parts = [run.facts["fingerprint"], *(run.options.get(name) for name in ("student", "init"))]
            parts += [_part(run, "scalekd"), _part(run, "optim")]
            key = json.dumps([*parts, train], sort_keys=True, default=str)
            groups.setdefault(key, {})[text_option(run.options, "train.seed")] = run
    return [_mean_row(list(group.values())) for group in groups.values() if len(group) > 1]


def _mean_row(runs: list[Run]) -> dict[str, str]:
    """Mean and standard deviation of each metric, and the range of the main metric."""
    found = [_measures(run.summary) for run in runs if run.summary is not None]
    values = {name: [row[name] for row in found] for name in found[0] if all(name in row for row in found)}
    main = next(name for name in ("top1", "knn", "cosine_patch", *values) if name in values)
    spreads = {
        LABELS[name]: f"{_plain(name, statistics.mean(ours))} ± {format_figure(name, statistics.stdev(ours))}"
        for name, ours in values.items()
    }
    return {
        "model": text_option(runs[0].options, "student.name"),
        "targets": text_option(runs[0].options, "train.targets"),
        "heads": heads_of(runs[0].options),
        "epochs": text_option(runs[0].options, "train.epochs"),
        "seeds": str(len(runs)),
        LABELS[main]: spreads.pop(LABELS[main]),
        "lowest": format_figure(main, min(values[main])),
        "highest": format_figure(main, max(values[main])),
        **spreads,
    }


def _plain(name: str, value: float) -> str:
    return format_figure(name, value).removesuffix("%")


def _informative(rows: list[dict[str, str]], caches: bool) -> list[dict[str, str]]:
    """Remove the columns that are empty for all runs, and the caches if all runs use the same one."""
    kept = [name for name in rows[0] if any(row[name] for row in rows) and (caches or name != "cache")]
    return [{name: row[name] for name in kept} for row in rows]


def _fingerprints(runs: list[Run]) -> set[str]:
    return {run.facts["fingerprint"] for run in runs}


def _part(run: Run, name: str) -> dict[str, Any]:
    part = run.options.get(name)
    return part if isinstance(part, dict) else {}


def _loss_charts(runs: list[Run]) -> list[Chart]:
    """One chart per distinct loss (cache, targets, terms, weights and label loss)."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if any("loss" in line for line in run.lines):
            options = flat(run.options)
            names = sorted(name for name in options if name.startswith(("scalekd.", "train.label")))
            terms = [] if heads_of(run.options) == "none" else [options[name] for name in names if "weight" in name]
            terms += [name for name in LossTerms._fields if any(line.get(name) for line in run.lines)]
            key = [run.facts["fingerprint"], *(text_option(run.options, f"train.{name}") for name in LOSS), *terms]
            groups.setdefault(json.dumps(key, default=str), []).append(run)
    charts = []
    for group in groups.values():
        targets = text_option(group[0].options, "train.targets")
        name = "Loss without distillation" if targets == "none" else f"Loss, {targets} targets"
        same = sum(text_option(other[0].options, "train.targets") == targets for other in groups.values())
        title = f"{name}: {', '.join(run.name for run in group)}" if same > 1 else name
        styles = [number for number, run in enumerate(runs) if any(run is one for one in group)]
        series = [run.series("loss") for run in group]
        charts.append(curves(series, "step", "weighted loss", title, styles=styles))
    return charts


def _other_charts(runs: list[Run]) -> list[Chart]:
    """Charts of throughput, and accuracy against size and speed."""
    started = [number for number, run in enumerate(runs) if run.lines]
    rates = [runs[number].series("images_per_s") for number in started]
    charts = [curves(rates, "step", "images/s", "Training throughput", styles=started)]
    measured = [
        (run.name, run.student, float(run.summary["top1"]))
        for run in runs
        if run.student is not None and run.summary is not None and run.summary["top1"] is not None
    ]
    if measured:
        sizes = [(name, student.parameters / 1e6, top1) for name, student, top1 in measured]
        speeds = [(name, student.images_per_s, top1) for name, student, top1 in measured if student.images_per_s]
        charts.append(scatter(sizes, "million parameters", "top-1, percent", "Accuracy and size"))
        if speeds:
            charts.append(scatter(speeds, "images/s, forward", "top-1, percent", "Accuracy and inference speed"))
    return charts


def _agreement_chart(runs: list[Run], teacher: Predictions | None, images: Images | None) -> list[Chart]:
    """A chart of how often the students and the teacher predict the same class."""
    predicted = [(run.name, run.predictions) for run in runs if run.predictions is not None]
    if images is None or len(predicted) < 2:
        return []
    if teacher is not None:
        predicted.append(("teacher", teacher))
    names = [name for name, _ in predicted]
    shares = np.array([[float((a.classes == b.classes).mean()) for _, b in predicted] for _, a in predicted])
    return [matrix(shares, names, names, ("", ""), "Prediction agreement (% of images)")]
