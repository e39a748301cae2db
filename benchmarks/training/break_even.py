"""When does a cache break even? Compares S students trained from one cache with S live trainings.

    python -m benchmarks.training.break_even [--students resnet18 mobilenetv1_100] [--epochs 2] [--data folder]

Measured: wall time of complete commands on the same small dataset, with one `cache-teacher` plus one `distill` per
student, compared with one `distill TARGETS=live` per student. Extrapolated: ImageNet with Swin-L, from FLOPs
(`make costs`) at one assumed rate.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import (
    RESULTS,
    Measurement,
    argument_parser,
    option_words,
    publish_table,
    pyplot,
    run_python,
    timed,
)
from benchmarks.photographs import write_photographs
from scalekd_cache.errors import counted
from scalekd_cache.planning.costs import pair_costs

STUDENTS = ("resnet18", "mobilenetv1_100", "vit_tiny_patch16_224")
TEACHER = "swin_tiny_patch4_window7_224"
BIG, BIG_TEACHER = ("resnet50", "mobilenetv1_100", "vit_small_patch16_224"), "swin_large_patch4_window7_224"
IMAGES, EPOCHS, VIEWS = 1_281_167, 300, 30
RATE = 200e12
"""Assumed FLOP/s of an H100 in bf16 on these models, 20% of its peak. It cancels out in ratios."""


def command(name: str, options: Mapping[str, object]) -> None:
    """Run one whole command without its output."""
    run_python("-m", f"pipelines.{name}", *option_words(options))


def measure(folder: Path, data: Path, students: Sequence[str], epochs: int, batch: int) -> dict[str, float]:
    """Wall seconds of every command."""
    cache, weights = str(folder / "cache"), str(folder / "teacher.safetensors")
    random_weights(Path(weights), data)
    options = {
        "recipe": "traditional",
        "data.source": str(data),
        "cache.path": cache,
        "teacher.name": TEACHER,
        "teacher.weights": weights,
        "teacher.check_classes": "false",
        "cache.num_views": epochs,
        "cache.views_per_group": epochs,
    }
    seconds = {"cache": timed(lambda: command("cache_teacher", options))}
    for student in students:
        for targets in ("cached", "live"):
            options = {
                "recipe": "traditional",
                "cache": cache,
                "student.name": student,
                "run": str(folder / f"{student}-{targets}"),
                "train.targets": targets,
                "train.epochs": epochs,
                "train.global_batch_size": batch,
                "train.micro_batch_size": batch,
            }
            options |= {"teacher_weights": weights} if targets == "live" else {}
            seconds[f"{student} {targets}"] = timed(lambda chosen=options: command("distill", chosen))  # type: ignore[misc]
    return seconds


def random_weights(file: Path, data: Path) -> None:
    """Write one randomly initialized teacher for cached and live runs; its accuracy does not affect timing."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    classes = len(list((data / "train").iterdir()))
    model = timm.create_model(TEACHER, num_classes=classes)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(file))


def imagenet() -> list[dict[str, float]]:
    """GPU-hours of 1 to 10 students, cached and live: FLOPs divided by the assumed rate."""
    rows = []
    costs = [pair_costs(BIG_TEACHER, student) for student in BIG]
    teacher = costs[0].teacher.total
    for count in range(1, 11):
        students = [costs[number % len(costs)] for number in range(count)]
        steps = sum(pair.student.total + pair.heads_total for pair in students) * IMAGES * EPOCHS
        live = steps + count * teacher * IMAGES * EPOCHS
        cached = steps + teacher * IMAGES * VIEWS
        rows.append({"students": count, "live_gpu_hours": live / RATE / 3600, "cached_gpu_hours": cached / RATE / 3600})
    return rows


def chart(rows: list[dict[str, float]], file: Path) -> None:
    """Plot GPU-hours against the number of students."""
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(6.4, 4))
    numbers = [row["students"] for row in rows]
    for name, label, marker in (
        ("live_gpu_hours", "live teacher in every training", "s"),
        ("cached_gpu_hours", f"one cache of {VIEWS} views", "o"),
    ):
        axes.plot(numbers, [row[name] for row in rows], marker=marker, label=label)
    axes.set(
        xlabel="students (ResNet-50, MobileNet-V1, ViT-S in turn), 300 epochs of ImageNet",
        ylabel="H100 hours at 200 TFLOP/s (assumed)",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, extrapolate, write, print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--students", nargs="+", default=STUDENTS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--data", type=Path, help="class folders under train/ and val/ (default: generated photographs)"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        data = options.data or write_photographs(Path(name) / "data", options.images)
        seconds = measure(Path(name), data, options.students, options.epochs, options.batch)
    cached = [seconds[f"{student} cached"] for student in options.students]
    live = [seconds[f"{student} live"] for student in options.students]
    total = seconds["cache"] + sum(cached)
    rows = imagenet()
    chart(rows, RESULTS / "whole-job.png")
    after = next((row["students"] for row in rows if row["cached_gpu_hours"] < row["live_gpu_hours"]), None)
    many = rows[7]
    each = ", ".join(f"{n} {a:.0f} and {b:.0f} s" for n, a, b in zip(options.students, live, cached, strict=True))
    gains = [a / b for a, b in zip(live, cached, strict=True)]
    size = f"{counted(options.epochs, 'epoch')} of {options.images} images, {counted(options.epochs, 'view')}"
    figures = [
        Measurement(
            f"{counted(len(live), 'student')}: live / one cache plus cached, wall time",
            sum(live) / total,
            None,
            "x",
            f"{sum(live):.0f} s vs {seconds['cache']:.0f} + {sum(cached):.0f} s; {size}",
            "",
            "both include imports, evaluation and export; each epoch has its own view, so one student reuses nothing",
        ),
        Measurement("median student: live / cached", statistics.median(gains), None, "x", each, "", ""),
        Measurement(
            "extrapolated: 8 students on ImageNet with Swin-L, live / cached",
            many["live_gpu_hours"] / many["cached_gpu_hours"],
            None,
            "x",
            f"{many['live_gpu_hours']:,.0f} vs {many['cached_gpu_hours']:,.0f} H100 hours",
            "",
            f"300 epochs, {VIEWS} views, all at 200 TFLOP/s; breaks even at student {after}",
        ),
    ]
    raw = {"options": {name: str(value) for name, value in vars(options).items()}, "seconds": seconds, "imagenet": rows}
    publish_table("whole-job", figures, raw, note="![GPU-hours](../benchmarks/results/whole-job.png)")


if __name__ == "__main__":
    main()
