"""How much does distillation gain on the demo? Compares a distilled student with a labels-only baseline.

    python -m benchmarks.training.demo_table [--student resnet18] [--seeds 0 1 2] [--epochs 3]

Both run the same number of steps with the normal commands. Writes benchmarks/results/demo-<student>.json and prints a
Markdown table.
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import argument_parser, write_results


def run(student: str, targets: str, seed: int, epochs: int, cache: str, folder: Path) -> dict[str, object]:
    """Run `pipelines.distill` once; a finished run is reused."""
    command = [
        sys.executable, "-m", "pipelines.distill", "--student.name", student, "--cache", cache, "--run", str(folder),
        "--train.targets", targets, "--train.seed", str(seed), "--train.epochs", str(epochs),
        "--train.eval_epochs", str(epochs),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return {**summary, "command": shlex.join(["python", *command[1:]])}


def row(name: str, runs: list[dict[str, float]]) -> str:
    """One table row: mean and standard deviation over seeds."""
    top1 = [summary["top1"] for summary in runs]
    rate = statistics.median(summary["images_per_s"] for summary in runs)
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    each = ", ".join(f"{value:.2f}" for value in top1)
    return f"| {name} | {statistics.mean(top1):.2f} | {spread:.2f} | {each} | {runs[0]['steps']} | {rate:.0f} |"


def main() -> None:
    """Run, write, print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cache", default="caches/demo")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-table"))
    options = parser.parse_args()
    table: dict[str, list[dict[str, object]]] = {"none": [], "cached": []}
    for seed in options.seeds:
        for targets, summaries in table.items():
            folder = options.runs / f"{options.student}-{targets}-{options.epochs}-{seed}"
            summaries.append(run(options.student, targets, seed, options.epochs, options.cache, folder))
    file = write_results(f"demo-{options.student}", {"runs": table})
    print("| targets | top-1 (%) | std | each seed | steps | images/s |\n|---|---|---|---|---|---|")
    print(row(f"{options.student}, labels only (`TARGETS=none`)", table["none"]))  # type: ignore[arg-type]
    print(row(f"{options.student}, distilled from the cache", table["cached"]))  # type: ignore[arg-type]
    print(f"\nteacher {table['cached'][0]['teacher']}: {table['cached'][0]['teacher_top1']:.2f}%; {file}")


if __name__ == "__main__":
    main()
