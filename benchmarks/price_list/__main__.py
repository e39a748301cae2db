"""The price list: accuracy versus the cost of training, for heads, feature shares and numbers of epochs.

    python -m benchmarks.price_list --setting demo [--hours 1]
    python -m benchmarks.price_list --setting demo --plan            # cost of a step and estimated hours only
    python -m benchmarks.price_list --setting cifar10 --data data/cifar10 --teacher-weights teachers/file.safetensors

In: the plan in `plan.py`. Out: one JSON line per run in benchmarks/results/price-list/<setting>.jsonl, the cost of a
step of every arm in <setting>-steps.json, then the figures and tables of `figures.py`. Runs work as in the study
(`benchmarks/study`): they are resumable and write one line per finished run.
"""

import sys
from pathlib import Path

from benchmarks.harness import RESULTS, argument_parser
from benchmarks.price_list.costs import measure
from benchmarks.price_list.figures import draw
from benchmarks.price_list.plan import SETTINGS
from benchmarks.study.__main__ import (
    StudyPaths,
    add_study_options,
    exit_with_code,
    make_cache,
    pending,
    run_in_parallel,
    run_pending,
)
from benchmarks.study.estimate import START_S, images_of
from benchmarks.study.plan import Setting
from benchmarks.study.statistics import read_lines
from scalekd_cache.errors import UserError, counted

PRICE_RESULTS = RESULTS / "price-list"


def print_estimate(setting: Setting, paths: StudyPaths, seconds: dict[str, float]) -> float:
    """Print cost and length of every arm; returns the estimated hours of the runs without result line."""
    from benchmarks.price_list.costs import config_of

    todo = [run.arm for run in pending(setting, paths)]
    lines = read_lines(paths.results / f"{setting.name}.jsonl")
    images, total = images_of(setting, paths.data), 0.0
    for arm, cost in seconds.items():
        steps = setting.epochs_of(arm) * (images // config_of(setting, setting.arms[arm]).train.global_batch_size)
        walls = [line["wall_s"] for line in lines if line["arm"] == arm]
        each = sum(walls) / len(walls) if walls else START_S + steps * cost
        total += todo.count(arm) * each
        print(
            f"  {arm:26} {1000 * cost:6.1f} ms per step, {cost / seconds['baseline']:.2f} x baseline, {steps:5} steps, "
            f"about {each:4.0f} s per run, {counted(todo.count(arm), 'run')} left"
        )
    print(f"{setting.name}: {counted(len(todo), 'run')} left, about {total / 3600:.2f} hours", flush=True)
    return total / 3600


def chosen(setting: Setting, names: list[str] | None, seeds: int) -> Setting:
    """A setting with some of its questions and seeds.

    Raises:
        UserError: no question has this name.
    """
    known = {question.name: question for question in setting.questions}
    if unknown := [name for name in names or () if name not in known]:
        raise UserError("no question has this name", got=unknown[0], expected=", ".join(known))
    asked = [known[name] for name in names or known]
    return setting._replace(questions=tuple(one._replace(seeds=min(one.seeds, seeds)) for one in asked))


def main() -> None:
    """Parse options, print the estimate, run, and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="demo")
    add_study_options(parser, Path("runs/price-list"), PRICE_RESULTS)
    parser.add_argument("--questions", nargs="+", help="only these questions of the plan, in this order")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time (on one GPU; default 1)")
    parser.add_argument("--seeds", type=int, default=100, help="at most this many seeds per question")
    options = parser.parse_args()
    setting = chosen(SETTINGS[options.setting], options.questions, options.seeds)
    paths = StudyPaths(options.work, options.results, options.data, options.teacher_weights)
    if setting.given and not (paths.data and paths.teacher_weights):
        raise UserError(f"{setting.name} needs --data and --teacher-weights", fix="see docs/PRICE_LIST.md")
    seconds = measure(
        SETTINGS[options.setting], make_cache(setting, "default", paths), paths.results / f"{setting.name}-steps.json"
    )
    print_estimate(setting, paths, seconds)
    if options.plan:
        return
    if options.processes > 1:
        complete = run_in_parallel(setting, paths, options.processes, 3600 * options.hours)
    else:
        complete = run_pending([setting], paths, 3600 * options.hours)
    draw(paths.results)
    sys.exit(0 if complete else 75)


if __name__ == "__main__":
    exit_with_code(main, "resume")
