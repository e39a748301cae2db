"""Tables and charts of the price list, computed from its result lines and the cost of a step.

    python -m benchmarks.price_list.figures [--results benchmarks/results/price-list]

In: <setting>.jsonl, <setting>-steps.json. Out: <setting>.png (accuracy against the cost of a step and against the cost
of the training, one curve per method, and all paired differences), and tables.md, which is also printed. Invariant:
every number is in a line or in the cost file, or is a mean, standard deviation or paired interval of such numbers.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, argument_parser, pyplot
from benchmarks.price_list.costs import flops, kind_of_cost, read_costs
from benchmarks.price_list.plan import SETTINGS
from benchmarks.study.figures import draw_differences, load, table, text_of, verdict
from benchmarks.study.plan import Setting
from benchmarks.study.statistics import Difference, Line, interval, mean_and_std, paired
from scalekd_cache.errors import counted

METHODS = {
    "baseline": ("baseline", "baseline-2x", "baseline-3x", "baseline-4x", "baseline-7x"),
    "cap": ("cap-0.125", "cap-0.25", "cap-0.5", "cap-1"),
    "lite": ("lite-0.25", "lite"),
    "linear": ("linear",),
    "logits only": ("logits-only",),
}
"""The curves: arms of one method with the setting's epochs, cheapest step first. Baselines differ in epochs only."""
LONGER = {
    "baseline": (METHODS["baseline"],),
    "cap": (("cap-1", "cap-2x"), ("cap-0.25", "cap-0.25-equal-cost")),
    "lite": (("lite", "lite-2x", "lite-equal-cost"),),
    "linear": (("linear", "linear-2x", "linear-3x", "linear-4x", "linear-equal-cost"),),
    "logits only": (("logits-only", "logits-only-2x", "logits-only-equal-cost"),),
}
"""The curves of a method with more epochs: one set of options each."""
FEATURES = "held_out_features"
LEAST_SEEDS = 3
"""Arms with fewer seeds are in the table of means only."""


def differences(setting: Setting, lines: Sequence[Line]) -> dict[tuple[str, str], Difference]:
    """Paired differences of top-1 of the setting's questions, by (arm, reference); also those from the baseline."""
    found: dict[tuple[str, str], Difference] = {}
    for question in setting.questions:
        for arm in (question.against, *question.arms):
            for reference in (question.against, "baseline"):
                pairs = paired(lines, arm, reference, same_steps=False) if arm != reference else []
                if len(pairs) >= LEAST_SEEDS:
                    found[arm, reference] = interval(pairs)
    return found


def tables_of(setting: Setting, lines: list[Line], costs: dict[str, float], kind: str) -> str:
    """Cost and accuracy of all arms, and all paired differences."""
    rows = []
    for arm in costs:
        mine = [line for line in lines if line["arm"] == arm]
        if mine:
            (top1, spread, count), (loss, _, losses) = (mean_and_std(mine, arm, name) for name in ("top1", FEATURES))
            cpu, steps = mean_and_std(mine, arm, "cpu_s")[0], mine[0]["steps"]
            rows.append([arm, str(mine[0]["epochs"]), str(steps), f"{costs[arm] / costs['baseline']:.2f}",
                         f"{training_cost(lines, costs, arm):.2f}", f"{cpu:.0f}", str(count),
                         f"{top1:.2f} ± {spread:.2f}", f"{loss:.4f}" if losses else "-"])  # fmt: skip
    head = ["arm", "epochs", "steps", "cost of a step", "cost of the training", "CPU s per run", "seeds", "top-1 (%)",
            "held-out feature loss"]  # fmt: skip
    parts = [f"## {setting.name}\n", f"Costs: {kind}, baseline = 1.\n", table(head, rows)]
    rows = [
        [f"{arm} - {reference}", str(one.pairs), text_of(one, 2), verdict(one)]
        for (arm, reference), one in differences(setting, lines).items()
    ]
    return "\n".join([*parts, table(["difference", "pairs", "top-1, points [95%]", "verdict"], rows)])


def training_cost(lines: Sequence[Line], costs: dict[str, float], arm: str) -> float:
    """Cost of all steps of an arm over that of the baseline's, which has the fewest steps."""
    steps = {line["arm"]: line["steps"] for line in lines}
    return costs[arm] * steps[arm] / (costs["baseline"] * min(steps.values()))


def flops_table(file: Path) -> str:
    """Cost of a cached step of Swin-L -> ResNet-50 over the baseline's, by heads and share; counted once."""
    if not file.exists():
        file.write_text(json.dumps(flops(), indent=1) + "\n", encoding="utf-8")
    ratios = json.loads(file.read_text(encoding="utf-8"))
    rows = [[name, *(f"{value:.2f}" for value in shares.values())] for name, shares in ratios.items()]
    head = ["heads", *(f"share {share}" for share in ratios["cap"])]
    return f"## FLOPs of a step, Swin-L -> ResNet-50, baseline = 1\n\n{table(head, rows)}"


def comparable(lines: list[Line], arms: Iterable[str]) -> list[Line]:
    """The lines of some arms with enough seeds, for the seeds that all of them have; other means do not compare."""
    seeds = {arm: {line["seed"] for line in lines if line["arm"] == arm} for arm in arms}
    seeds = {arm: found for arm, found in seeds.items() if len(found) >= LEAST_SEEDS}
    common = set.intersection(*seeds.values())
    return [line for line in lines if line["arm"] in seeds and line["seed"] in common]


def chart(setting: Setting, lines: list[Line], costs: dict[str, float], kind: str, file: Path) -> None:
    """Accuracy versus cost of a step and of the training, and paired differences."""
    plt, found = pyplot(), differences(setting, lines)
    rows = [(f"{arm} - {reference} ({one.pairs})", one) for (arm, reference), one in found.items()
            if arm != "baseline"]  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(16, max(5, 1.2 + 0.24 * len(rows))), layout="constrained")
    step = {method: (group[:1] if method == "baseline" else group,) for method, group in METHODS.items()}
    for axis, groups in ((axes[0], step), (axes[1], LONGER)):
        shown = comparable(lines, {arm for curves in groups.values() for group in curves for arm in group})
        have = {line["arm"] for line in shown}
        for number, (method, curves) in enumerate(groups.items()):
            for group in curves:
                at = {
                    arm: training_cost(shown, costs, arm) if axis is axes[1] else costs[arm] / costs["baseline"]
                    for arm in group
                    if arm in have
                }
                curve(axis, shown, at, f"C{number}", method)
        axis.set_ylabel(f"top-1 (%), mean and standard error over {len({line['seed'] for line in shown})} seeds")
        axis.margins(x=0.2)
        axis.grid(alpha=0.3)
    axes[0].set_xlabel(f"cost of a step ({kind.partition(',')[0]}, baseline = 1)")
    axes[1].set_xlabel(f"cost of the training ({kind.partition(',')[0]}, baseline = 1)\nlines: more epochs")
    axes[0].legend(fontsize=8)
    draw_differences(axes[2], rows)
    figure.suptitle(
        f"{setting.name}: {counted(setting.epochs, 'epoch')}, {lines[0]['student']}, "
        f"teacher {lines[0]['teacher_top1']:.1f}%"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def curve(axis: Any, lines: list[Line], costs: dict[str, float], color: str, label: str) -> None:
    """One method: a point with its standard error per arm."""
    if not costs:
        return
    points = [(cost, *mean_and_std(lines, arm)) for arm, cost in costs.items()]
    errors = [spread / max(count, 1) ** 0.5 for _, _, spread, count in points]
    axis.errorbar([one[0] for one in points], [one[1] for one in points], errors, marker="o", capsize=3, color=color,
                  label=label)  # fmt: skip
    for (cost, mean, _, _), arm in zip(points, costs, strict=True):
        axis.annotate(arm, (cost, mean), textcoords="offset points", xytext=(5, 5), fontsize=7, color=color)


def draw(results: Path) -> None:
    """Draw all settings that have lines and write the tables."""
    texts = [flops_table(results / "flops.json")]
    for name, setting in SETTINGS.items():
        lines = load(results, name)
        if lines:
            file = results / f"{name}-steps.json"
            costs, kind = read_costs(setting, file), kind_of_cost(file)
            texts.append(tables_of(setting, lines, costs, kind))
            if any(line["arm"] == "baseline" for line in lines):
                chart(setting, lines, costs, kind, results / f"{name}.png")
    text = "\n".join(texts)
    (results / "tables.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Parse options and draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "price-list")
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
