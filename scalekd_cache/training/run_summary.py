"""A finished run's summary, and the table printed at the end.

In: options, caches and accuracies. Out: a `Summary` for summary.json, and a text table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.evaluate import percent, teacher_accuracy
from scalekd_cache.models.teacher_spec import label_of, teacher_label
from scalekd_cache.progress import duration_text
from scalekd_cache.store.manifest import joint_fingerprint
from scalekd_cache.training.run_cache import RunCache
from scalekd_cache.training.run_evaluation import Evaluation
from scalekd_cache.training.run_files import SUMMARY, Summary, TeacherSummary, read_config, read_summary


def make_summary(
    config: DistillConfig, reads: RunCache, loader: CacheLoader, world_size: int, found: Evaluation
) -> Summary:
    """Build the summary at the end of training."""
    facts, tally = reads.facts, found.tally
    known = [one.teacher["top1"] for one in facts if one.teacher["top1"] is not None]
    held_out = {name: round(value, 4) for name, value in found.held_out.items()}
    return {
        "student": config.student.name,
        "teacher": ", ".join(teacher_label(one.teacher) for one in facts),
        "image_size": config.student.image_size or facts[0].view_recipe["size"],
        "targets": config.train.targets,
        "top1": round(tally.top1_percent, 4) if tally else None,
        "top5": round(tally.top5_percent, 4) if tally and tally.top5_percent is not None else None,
        "val_images": tally.images if tally else 0,
        **({"held_out": held_out} if held_out else {}),
        "teacher_top1": max(known, default=None),
        **({"teachers": _teachers(config, reads, found)} if len(facts) > 1 else {}),
        "has_classifier": any(one.teacher["spec"]["has_classifier"] for one in facts),
        "epochs": config.train.epochs,
        "steps": loader.total_steps,
        "seed": config.train.seed,
        "zero": config.train.zero,
        "world_size": world_size,
        "views": reads.views,
        "codec": ", ".join(codecs.features.id for codecs in loader.codecs),
        "bytes_per_view": sum(cache.manifest.bytes_per_view["total"] for cache in reads.caches),
        "cache_fingerprint": joint_fingerprint(facts),
    }


def _teachers(config: DistillConfig, reads: RunCache, found: Evaluation) -> list[TeacherSummary]:
    """One entry per teacher if the run has multiple teachers."""
    shares = config.scalekd.weights_of(len(reads.caches))
    return [
        {
            "name": name,
            "label": label_of(name, facts.teacher["config"]),
            "share": round(share, 6),
            "top1": facts.teacher["top1"],
            "fingerprint": facts.fingerprint,
            "held_out": {figure: round(value, 4) for figure, value in found.of_teachers.get(name, {}).items()},
        }
        for name, share, facts in zip(reads.names(), shares, reads.facts, strict=True)
    ]


def baseline_summary(run: Path, summary: Summary) -> Summary | None:
    """The baseline's summary: that of a neighboring run of the same student with --targets none and as many steps, from
    the same initial weights.

    Unfinished and unreadable runs are skipped.
    """
    for folder in sorted(run.absolute().parent.glob(f"*/{SUMMARY}")):
        try:
            other = read_summary(folder.parent)
            if other and other.get("targets") == "none" and _setting(folder.parent, other) == _setting(run, summary):
                return other
        except UserError:
            continue
    return None


def _setting(run: Path, summary: Summary) -> list[Any]:
    """What a run and its baseline have in common."""
    same = ("student", "image_size", "steps", "seed", "cache_fingerprint")
    return [read_config(run).get("init"), *(summary.get(name) for name in same)]


def _held_out_rows(held_out: Mapping[str, float]) -> list[tuple[str, str]]:
    """Table rows for a run on a cache without labels."""
    cosines = [
        f"{held_out[f'cosine_{name}']:.3f} ({name})" for name in ("patch", "pooled") if f"cosine_{name}" in held_out
    ]
    rows = []
    if "held_out_loss" in held_out:  # missing if none of the images with feature maps could be read
        loss = f"feature loss {held_out['held_out_loss']:.4f}"
        rows.append(("held out", f"cosine to the teacher {', '.join(cosines)}; {loss}"))
    if "retrieval" in held_out:
        rows.append(("neighbors", f"{held_out['retrieval']:.0%} of the 10 nearest neighbors match the teacher's"))
    for name, title in (("knn", "k-NN"), ("linear_probe", "linear probe")):
        if name in held_out:
            rows.append((title, f"{percent(held_out[name])} (teacher {percent(held_out[f'teacher_{name}'])})"))
    return rows


def summary_table(run: Path, summary: Summary) -> str:
    """The table printed at the end of a run."""
    baseline = baseline_summary(run, summary) if summary["targets"] != "none" else None
    facts = {"spec": {"has_classifier": summary.get("has_classifier", True)}, "top1": summary["teacher_top1"]}
    teacher = teacher_accuracy(facts, labeled="held_out" not in summary)
    accuracies = f"top-1 {percent(summary['top1'])}"
    accuracies += "" if summary["top5"] is None else f", top-5 {percent(summary['top5'])}"
    baseline_text = (
        f"top-1 {percent(baseline['top1'])} with the same number of steps"
        if baseline
        else "no run with as many steps yet (train it with --targets none)"
    )
    several = [
        (one.get("label", one["name"]), f"weight {one['share']:.3g}, top-1 {percent(one['top1'])}")
        for one in summary.get("teachers", ())
    ]
    rows = [
        *(several or [("teacher", f"{summary['teacher']}, {teacher}")]),
        ("student", f"{summary['student']}, {accuracies}"),
        ("targets", str(summary["targets"])),
        ("baseline", baseline_text),
        *_held_out_rows(summary.get("held_out", {})),
        (
            "epochs",
            f"{summary['epochs']} ({counted(summary['steps'], 'step')}, {summary['images_per_s']:.0f} images/s)",
        ),
        ("time", duration_text(60 * summary["minutes"])),
        (
            "cache",
            f"{counted(summary['views'], 'view')}, {summary['bytes_per_view']:,.0f} bytes per view, including pixels",
        ),
        ("run", str(run)),
        ("export", str(run / "export")),
    ]
    if summary["targets"] == "none" or "held_out" in summary:
        rows = [row for row in rows if row[0] != "baseline"]
    if "held_out" in summary:
        rows = [(name, summary["student"] if name == "student" else text) for name, text in rows]
    width = max(len(name) for name, _ in rows)
    line = "-" * 72
    return "\n".join([line, *(f"{name:<{width}}  {text}" for name, text in rows), line])
