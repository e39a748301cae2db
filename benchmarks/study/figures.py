"""Tables and figures of the study, computed from its result lines only.

    python -m benchmarks.study.figures [--results benchmarks/results/study]

In: <setting>.jsonl and <setting>-caches.jsonl. Out: <setting>.png (accuracy over views and over bytes per view, paired
differences with 95% confidence intervals), and tables.md, which is also printed. Invariant: every number is in a line,
or is a mean, standard deviation, sum or paired interval of numbers in lines.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, argument_parser, pyplot
from benchmarks.study.plan import SUITES, Question, Setting, canonical
from benchmarks.study.statistics import Difference, Line, interval, mean_and_std, paired, read_lines
from scalekd_cache.errors import counted

MARGIN = 0.5
"""Equivalence margin in points of top-1."""
SETTINGS = {setting.name: setting for suite in SUITES.values() for setting in suite}


def load(results: Path, setting: str) -> list[Line]:
    """A setting's lines, with the sum of the held-out feature losses as a separate value.

    The value is None for arms without some of these terms, because their sums are not comparable.
    """
    lines = read_lines(results / f"{setting}.jsonl")
    for line in lines:
        terms = line["held_out"] or {}
        values = [value for name, value in terms.items() if name.startswith("s")]
        line["held_out_features"] = sum(values) if values and all(values) else None
    return lines


def compare(lines: Sequence[Line], setting: Setting, question: Question) -> list[tuple[str, str, str, list[Line]]]:
    """(student, arm, baseline, lines of that student) for every pair of arms that has at least one pair of runs."""
    found = []
    baseline = canonical(question.against, setting.epochs)
    for student in question.students or (setting.student,):
        mine = [line for line in lines if line["student"] == student]
        for name in question.arms:
            arm = canonical(name, setting.epochs)
            if paired(mine, arm, baseline):
                found.append((student, arm, baseline, mine))
    return found


def verdict(difference: Difference) -> str:
    """Result of the equivalence test for a difference of accuracies."""
    if difference.inside(MARGIN):
        return f"within ±{MARGIN}"
    if difference.low > 0 or difference.high < 0:
        return "better" if difference.low > 0 else "worse"
    return "not established"


def text_of(difference: Difference, digits: int) -> str:
    """Text `mean [low, high]`."""
    if math.isinf(difference.low):
        return f"{difference.mean:+.{digits}f} (one pair)"
    return f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in ([*head], ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def tables_of(setting: Setting, lines: list[Line], caches: list[Line]) -> str:
    """All tables of a setting."""
    parts = [f"## {setting.name}\n"]
    rows = []
    for cache in caches:
        noise, sizes = cache["codec"].get("noise"), cache["bytes_per_view"]
        name = cache["codec"]["id"] + (f", noise {noise:g}" if noise else "") + ("" if cache["dither"] else ", rounded")
        cosine = cache["fidelity"]["cosine_mean_removed"]["p1"]
        counts = [f"{sizes[part]:,.0f}" for part in ("features", "pixels", "total")]
        top1 = cache["teacher_top1"]
        times = [f"{cache[clock]:.0f}" for clock in ("wall_s", "cpu_s")]
        rows.append([cache["cache"], name, "-" if top1 is None else f"{top1:.2f}", *counts, f"{cosine:.5f}", *times])
    head = ["cache", "codec", "teacher %", "features, bytes", "pixels", "total", "AC cosine p1", "time s", "CPU s"]
    parts.append(table(head, rows))
    rows = []
    for student in dict.fromkeys(line["student"] for line in lines):
        mine = [line for line in lines if line["student"] == student]
        for arm in dict.fromkeys(line["arm"] for line in mine):
            top1, spread, count = mean_and_std(mine, arm)
            loss, loss_spread, losses_count = mean_and_std(mine, arm, "held_out_features")
            some = next(line for line in mine if line["arm"] == arm)
            wall, cpu = (mean_and_std(mine, arm, name)[0] for name in ("wall_s", "cpu_s"))
            kept = f"{some['feature_bytes']:,.0f}" if setting.arms[arm].targets == "cached" else "-"
            rows.append([student, arm, str(count), f"{top1:.2f} ± {spread:.2f}",
                         f"{loss:.4f} ± {loss_spread:.4f}" if losses_count else "-", str(some["views"]), kept,
                         f"{wall:.0f}", f"{cpu:.0f}"])  # fmt: skip
    head = ["student", "arm", "seeds", "top-1 (%)", "held-out feature loss", "V", "features, bytes", "s", "CPU s"]
    parts.append(table(head, rows))
    rows = []
    for question in (one for one in setting.questions if one.name != "reuse"):  # other questions have its pairs
        for student, arm, baseline, mine in compare(lines, setting, question):
            top1, loss = interval(paired(mine, arm, baseline)), "-"
            losses = paired(mine, arm, baseline, "held_out_features")
            if losses:
                loss = text_of(interval(losses), 4)
            names = [question.name, student, f"{arm} - {baseline}"]
            rows.append([*names, str(top1.pairs), text_of(top1, 2), verdict(top1), loss])
    head = ["question", "student", "difference", "pairs", "top-1, points [95%]", "verdict", "feature loss [95%]"]
    parts.append(table(head, rows))
    return "\n".join(parts) + reuse(setting, lines, caches)


def reuse(setting: Setting, lines: Sequence[Line], caches: Sequence[Line]) -> str:
    """Compare the time of one cache plus its students with as many live trainings (seed 0)."""
    question = next((one for one in setting.questions if one.name == "reuse"), None)
    made = next((cache for cache in caches if cache["cache"] == "default"), None)
    if question is None or made is None:
        return ""
    students = question.students
    found = {(line["student"], line["arm"]): line for line in lines if line["seed"] == 0}
    if not all((student, arm) in found for student in students for arm in ("live", "cached")):
        return ""
    rows = []
    for name in ("wall_s", "cpu_s"):
        live = sum(found[student, "live"][name] for student in students)
        cached = sum(found[student, "cached"][name] for student in students)
        rows.append([name, f"{live:.0f}", f"{made[name]:.0f} + {cached:.0f}", f"{live / (made[name] + cached):.2f}"])
    head = ["seconds", f"{len(students)} live", f"cache + {len(students)} cached", "ratio"]
    return f"\nReuse, {', '.join(students)}:\n\n" + table(head, rows)


def figure_of(setting: Setting, lines: list[Line], file: Path) -> None:
    """Plot accuracy over V and over bytes (one color per student), and all paired differences."""
    plt = pyplot()

    rows = differences_of(setting, lines)
    figure, axes = plt.subplots(
        1, 3, figsize=(15, max(4.6, 1.2 + 0.24 * len(rows))), width_ratios=(1, 1, 1.5), layout="constrained"
    )
    for number, student in enumerate(dict.fromkeys(line["student"] for line in lines)):
        mine = common_seeds([line for line in lines if line["student"] == student])
        if len({line["arm"] for line in mine}) > 2:
            _views(axes[0], mine, f"C{number}")
            _bytes(axes[1], mine, f"C{number}")
    axes[0].legend(fontsize=8)
    axes[0].set_xscale("log", base=2)
    views = sorted({line["views"] for line in lines})
    axes[0].set_xticks(views, [str(count) for count in views])
    axes[0].set_xlabel("views V in the cache (int8)")
    axes[1].set_xscale("log")
    low, high = axes[1].get_xlim()
    steps = [step * 10**power for power in range(1, 7) for step in (1, 2, 5)]
    axes[1].set_xticks(steps, [f"{step:,}" for step in steps])
    axes[1].set_xticks([], minor=True)
    axes[1].set_xlim(low, high)
    axes[1].set_xlabel("feature bytes per view (x: no dither)")
    for axis in axes[:2]:
        axis.set_ylabel("top-1 (%), mean ± std over seeds common to all arms")
    draw_differences(axes[2], rows)
    figure.suptitle(f"{setting.name}: {counted(setting.epochs, 'epoch')}, teacher {lines[0]['teacher_top1']:.1f}%")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def common_seeds(lines: list[Line]) -> list[Line]:
    """Lines of the seeds that all arms of a student have; means over different seeds are not comparable."""
    seeds = [{line["seed"] for line in lines if line["arm"] == arm} for arm in {line["arm"] for line in lines}]
    common = set.intersection(*seeds)
    return [line for line in lines if line["seed"] in common]


def _references(axis: Any, lines: list[Line], color: str) -> None:
    for arm, style in (("live", "--"), ("baseline", ":")):
        mean, _, count = mean_and_std(lines, arm)
        if count:
            axis.axhline(mean, color=color, linestyle=style, label=f"{lines[0]['student']}, {arm} ({count} seeds)")


def _views(axis: Any, lines: list[Line], color: str) -> None:
    _references(axis, lines, color)
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm == "cached" or arm.startswith("V=")]
    points = sorted(
        (next(line["views"] for line in lines if line["arm"] == arm), *mean_and_std(lines, arm)) for arm in arms
    )
    if points:
        views, means, spreads, counts = zip(*points, strict=True)
        label = f"{lines[0]['student']}, cached ({counts[0]} seeds)"
        axis.errorbar(views, means, spreads, marker="o", capsize=3, color=color, label=label)


def _bytes(axis: Any, lines: list[Line], color: str) -> None:
    _references(axis, lines, color)
    whole = {"cached", "float16", "int4", "transform", "economy"}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        if arm in whole or ("-bit-" in arm and not arm.endswith("norms")):
            mean, spread, _ = mean_and_std(lines, arm)
            size, rounded = next(line["feature_bytes"] for line in lines if line["arm"] == arm), arm.endswith("rounded")
            axis.errorbar(size, mean, spread, marker="x" if rounded else "o", capsize=3, color=color)
            name = "int8" if arm == "cached" else arm.partition("-rounded")[0].partition("-dithered")[0]
            place = (5, -12 if rounded else 6)
            axis.annotate(name, (size, mean), textcoords="offset points", xytext=place, fontsize=8)


def differences_of(setting: Setting, lines: list[Line]) -> list[tuple[str, Difference]]:
    """Each comparison of the setting's questions with more than one pair, without duplicates."""
    rows: dict[str, Difference] = {}
    for question in setting.questions:
        for student, arm, baseline, mine in compare(lines, setting, question):
            difference = interval(paired(mine, arm, baseline))
            if difference.pairs > 1:
                rows[f"{arm} - {baseline}, {student} ({difference.pairs} pairs)"] = difference
    return list(rows.items())


def draw_differences(axis: Any, rows: list[tuple[str, Difference]]) -> None:
    """One interval per row, and the margin."""
    for place, (_, difference) in enumerate(rows):
        low, high = difference.mean - difference.low, difference.high - difference.mean
        color = "tab:green" if difference.inside(MARGIN) else "tab:blue"
        axis.errorbar(difference.mean, -place, xerr=[[low], [high]], marker="o", capsize=3, color=color)
    axis.axvspan(-MARGIN, MARGIN, color="tab:green", alpha=0.15)
    axis.axvline(0, color="black", linewidth=0.5)
    axis.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows], fontsize=8)
    axis.set_xlabel(f"top-1 difference in points, 95% interval (band: ±{MARGIN})")


def draw(results: Path) -> None:
    """Plot all settings that have lines and write the tables."""
    texts = []
    for name, setting in SETTINGS.items():
        lines = load(results, name)
        if lines:
            texts.append(tables_of(setting, lines, read_lines(results / f"{name}-caches.jsonl")))
            figure_of(setting, lines, results / f"{name}.png")
    text = "\n".join(texts)
    if text:
        (results / "tables.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Parse options and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "study")
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
