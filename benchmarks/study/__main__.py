"""Runs the study: is training from a cache as accurate as training with a live teacher?

    make study [SUITE=cpu|cpu-long|full] [DATA=data/cifar10-small TEACHER_WEIGHTS=teachers/file.safetensors] [HOURS=1.5]
    python -m benchmarks.study --suite cpu --plan            # print the estimate only

In: the plan in `plan.py`. Out: one JSON line per run in benchmarks/results/study/<setting>.jsonl, one per cache in
<setting>-caches.jsonl, then the figures and tables of `figures.py`. The study calls the normal commands
(`pipelines.cache_teacher`, `pipelines.distill`) in this process, which saves their startup time. Invariant: a run's
line is written after the run is finished and evaluated, and then its folder is removed. A study that was killed resumes
the interrupted run from its last checkpoint.
"""

import itertools
import json
import multiprocessing
import shlex
import shutil
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import RESULTS, argument_parser, machine
from benchmarks.study.demo_teachers import WIDTHS
from benchmarks.study.plan import CACHES, SUITES, Arm, Run, Setting, runs_of
from benchmarks.study.statistics import Line, append_line, read_lines
from scalekd_cache.errors import RunInterrupted, UserError, counted
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache

STUDY_RESULTS = RESULTS / "study"


FROM_SUMMARY = (
    "top1", "top5", "val_images", "teacher", "teacher_top1", "steps", "epochs", "views", "codec", "bytes_per_view",
    "cache_fingerprint", "minutes", "images_per_s",
)  # fmt: skip
"""Fields that a result line copies from summary.json."""


class StudyPaths(NamedTuple):
    """Paths and teacher of a study."""

    work: Path
    """Caches and runs."""
    results: Path
    data: str | None
    teacher_weights: str | None
    teacher: str | None = None
    """timm name of the teacher (None: the recipe's teacher)."""


def dotted(options: tuple[str, ...]) -> list[str]:
    """Options key=value as command-line words --key value."""
    return [word for option in options for word in (f"--{option.partition('=')[0]}", option.partition("=")[2])]


def teacher_options(setting: Setting, name: str, paths: StudyPaths) -> list[str]:
    """Options for the teacher of a cache: one trained by this study, or the one the user passed."""
    own = CACHES[name].teacher
    if own:
        file = paths.work / setting.name / "teachers" / f"{name}.safetensors"
        return ["--teacher.weights", str(file), "--teacher.name", own.name]
    if not setting.given or paths.teacher_weights is None:
        return []
    timm_name = ["--teacher.name", paths.teacher] if paths.teacher else []
    return ["--teacher.weights", paths.teacher_weights, *timm_name]


def stage1_command(setting: Setting, name: str, paths: StudyPaths, options: tuple[str, ...]) -> list[str]:
    """Arguments of `pipelines.cache_teacher` for one of `CACHES`, with its resolved `options`."""
    folder = paths.work / setting.name / "caches"
    words = ["--cache.path", str(folder / name), *teacher_options(setting, name, paths)]
    if CACHES[name].own_pixels:
        words += [
            "--recipe",
            setting.recipe,
            "--cache.num_views",
            str(setting.views or setting.epochs),
            *dotted(setting.stage1),
        ]
        words += ["--data.source", paths.data] if setting.given and paths.data else []
    else:
        words += ["--cache.pixels_from", str(folder / "default")]
        words += dotted(tuple(option for option in setting.stage1 if not option.startswith("data.")))
    return words + dotted(options)


def stage2_command(setting: Setting, run: Run, paths: StudyPaths) -> list[str]:
    """Arguments of `pipelines.distill` for a run."""
    arm, epochs = setting.arms[run.arm], setting.epochs_of(run.arm)
    return [
        "--cache", str(paths.work / setting.name / "caches" / arm.cache), "--run", str(run_folder(run, paths)),
        "--student.name", run.student, "--train.targets", arm.targets, "--train.seed", str(run.seed),
        "--train.epochs", str(epochs), "--train.eval_epochs", str(epochs),
        "--train.checkpoint_epochs", str(max(epochs // 2, 1)), "--train.keep_checkpoints", "1",
        *(["--train.views", str(arm.views)] if arm.views else []),
        *(["--teacher_weights", paths.teacher_weights] if setting.given and paths.teacher_weights else []),
        *dotted(setting.stage2), *dotted(arm.options),
    ]  # fmt: skip


def run_folder(run: Run, paths: StudyPaths) -> Path:
    """The run folder; removed when the result line is written."""
    return paths.work / run.setting / "runs" / f"{run.student}-{run.arm}-{run.seed}"


@contextmanager
def ablations(arm: Arm) -> Iterator[None]:
    """Apply the ablations of an arm that have no command-line option (`evaluation.py`)."""
    from benchmarks.study.evaluation import decoded_norms, heads_on_one_of, without_dither

    with ExitStack() as stack:
        if not CACHES[arm.cache].dither:
            stack.enter_context(without_dither())
        if arm.norms == "decoded":
            stack.enter_context(decoded_norms())
        if arm.heads_every > 1:
            stack.enter_context(heads_on_one_of(arm.heads_every))
        yield


class Timer:
    """Wall time and CPU time of a block, in seconds."""

    def __enter__(self) -> "Timer":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = {
            "wall_s": round(time.perf_counter() - self._wall, 2),
            "cpu_s": round(time.process_time() - self._cpu, 2),
        }


def run_logged(log: Path, command: Any, argv: list[str]) -> None:
    """Run a command in this process and append its output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        command.run_here(argv)


def make_cache(setting: Setting, name: str, paths: StudyPaths) -> Path:
    """Return the cache called `name`; if it is missing, make it and write its result line."""
    root = paths.work / setting.name / "caches" / name
    file = paths.results / f"{setting.name}-caches.jsonl"
    if (root / "manifest.json").exists() and any(line["cache"] == name for line in read_lines(file)):
        return root
    if not CACHES[name].own_pixels:
        make_cache(setting, "default", paths)
    from pipelines import cache_teacher

    print(f"  making the cache {setting.name}/{name}", flush=True)
    train_teacher(setting, name, paths)
    with Timer() as timer, ablations(Arm(cache=name)):
        options = resolve_options(setting, name, paths)
        argv = stage1_command(setting, name, paths, options)
        run_logged(paths.work / setting.name / "logs" / f"cache-{name}.log", cache_teacher.COMMAND, argv)
    manifest = read_manifest(root)
    append_line(
        file,
        {
            "cache": name, "codec": manifest.facts.codec, "options": list(options), "dither": CACHES[name].dither,
            "bytes_per_view": manifest.bytes_per_view, "views": manifest.num_views, "images": len(Cache.open(root)),
            "fidelity": manifest.fidelity, "teacher": manifest.facts.teacher["spec"]["name"],
            "teacher_top1": manifest.facts.teacher["top1"],
            "weights_sha256": manifest.facts.teacher["spec"]["weights_sha256"],
            "feature_shape": manifest.facts.teacher["spec"]["feature_shape"], "fingerprint": manifest.facts.fingerprint,
            "command": shlex.join(["python", "-m", "pipelines.cache_teacher", *argv]),
            **timer.seconds, **machine_facts(),
        },
    )  # fmt: skip
    return root


def train_teacher(setting: Setting, name: str, paths: StudyPaths) -> None:
    """Train a demo teacher for caches that have their own."""
    own = CACHES[name].teacher
    if not own:
        return
    from scalekd_cache.config.stage1 import DataConfig
    from scalekd_cache.models.demo_teacher import train_demo_teacher

    file = Path(teacher_options(setting, name, paths)[1])
    if not file.exists():
        train_demo_teacher(file, DataConfig(source="demo"), epochs=own.epochs, model_args=WIDTHS.get(own.name))


def resolve_options(setting: Setting, name: str, paths: StudyPaths) -> tuple[str, ...]:
    """Options of a cache; a target in bits per value becomes the codec noise that reaches it."""
    options = CACHES[name].options
    bits = next(
        (option.rpartition(":")[2] for option in options if option.startswith("cache.codec_target=bits:")), None
    )
    if bits is None:
        return options
    from benchmarks.study.evaluation import first_views, noise_for_bytes

    weights = paths.teacher_weights if setting.given else None
    features = first_views(paths.work / setting.name / "caches" / "default", weights)
    wanted = float(bits) * features[0].numel() / 8
    return ("cache.codec=transform", f"cache.codec_noise={noise_for_bytes(features, wanted)}")


def train(setting: Setting, run: Run, paths: StudyPaths, evaluators: dict[str, Any]) -> Line:
    """Train and evaluate a run; returns its result line."""
    from benchmarks.study.evaluation import HeldOutLosses
    from pipelines import distill

    arm, folder = setting.arms[run.arm], run_folder(run, paths)
    cache = make_cache(setting, arm.cache, paths)
    argv = stage2_command(setting, run, paths)
    resumed = (folder / "metrics.jsonl").exists()
    with Timer() as timer, ablations(arm):
        run_logged(paths.work / setting.name / "logs" / f"{folder.name}.log", distill.COMMAND, argv)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    held_out = None
    if setting.held_out and CACHES[arm.cache].teacher is None and arm.targets != "none":
        if setting.name not in evaluators:
            weights = paths.teacher_weights if setting.given else None
            evaluators[setting.name] = HeldOutLosses(make_cache(setting, "default", paths), weights, setting.held_out)
        held_out = evaluators[setting.name].losses(folder)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line["loss"] for line in metrics if line.get("epoch") == summary["epochs"] - 1 and "loss" in line]
    return {
        "key": run.key, **run._asdict(), **{name: summary[name] for name in FROM_SUMMARY},
        "feature_bytes": read_manifest(cache).bytes_per_view["features"],
        "train_loss": round(sum(last) / len(last), 5) if last else None, "held_out": held_out,
        "held_out_loss": round(sum(held_out.values()), 5) if held_out else None,
        "resumed": resumed, **timer.seconds, **machine_facts(),
        "command": shlex.join(["python", "-m", "pipelines.distill", *argv]),
    }  # fmt: skip


def machine_facts() -> Line:
    """The machine, versions and commit of a result line."""
    facts = machine()
    return {
        "machine": facts["accelerator"] or f"{facts['cpu']}, {facts['cores']} cores",
        **{name: facts[name] for name in ("threads", "commit", "python", "date")},
        "torch": torch.__version__,
    }


def run_pending(settings: list[Setting], paths: StudyPaths, budget_s: float) -> bool:
    """Run everything that has no result line yet; returns false if the time limit ends the study early."""
    from benchmarks.study.estimate import seconds_of

    todo = [(setting, run) for setting in settings for run in pending(setting, paths)]
    evaluators: dict[str, Any] = {}
    started = time.monotonic()
    for number, (setting, run) in enumerate(todo):
        spent = time.monotonic() - started
        ahead = [
            seconds_of(one, later, read_lines(paths.results / f"{one.name}.jsonl")) for one, later in todo[number:]
        ]
        if spent + (ahead[0] or 0) > budget_s:
            print(f"time limit reached: {counted(len(todo) - number, 'run')} left; rerun to resume", flush=True)
            return False
        line = train(setting, run, paths, evaluators)
        append_line(paths.results / f"{setting.name}.jsonl", line)
        shutil.rmtree(run_folder(run, paths))
        left = sum(seconds or 0.0 for seconds in ahead[1:]) / 60
        print(
            f"[{number + 1}/{len(todo)}] {run.key}: top-1 {line['top1']:.2f}%, held-out loss {line['held_out_loss']}, "
            f"{line['wall_s']:.0f} s; {(time.monotonic() - started) / 60:.0f} min done, about {left:.0f} min left",
            flush=True,
        )
    return True


def run_in_parallel(setting: Setting, paths: StudyPaths, processes: int, budget_s: float) -> bool:
    """As `run_pending`, with multiple processes that share the GPU. After `budget_s` seconds, no run is started."""
    todo, end = pending(setting, paths), time.monotonic() + budget_s
    waiting, running, done = iter(todo), set[Future[Line]](), 0
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        while done < len(todo):
            free = processes - len(running) if time.monotonic() < end else 0
            running |= {pool.submit(_train_one, setting, paths, run) for run in itertools.islice(waiting, free)}
            if not running:
                print(f"time limit reached: {counted(len(todo) - done, 'run')} left; rerun to resume", flush=True)
                return False
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for line in (one.result() for one in finished):
                done += 1
                append_line(paths.results / f"{setting.name}.jsonl", line)
                text = f"{line['key']}: top-1 {line['top1']:.2f}%, {line['wall_s']:.0f} s"
                print(f"[{done}/{len(todo)}] {text}", flush=True)
    return True


def _train_one(setting: Setting, paths: StudyPaths, run: Run) -> Line:
    """Train and evaluate a run in a process of the pool, and remove its folder."""
    line = train(setting, run, paths, {})
    shutil.rmtree(run_folder(run, paths))
    return line


def pending(setting: Setting, paths: StudyPaths) -> list[Run]:
    """Runs of a setting that have no result line."""
    done = {line["key"] for line in read_lines(paths.results / f"{setting.name}.jsonl")}
    return [run for run in runs_of(setting) if run.key not in done]


def main() -> None:
    """Parse options, print the estimate, run, and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--suite", choices=("auto", *SUITES), default="auto", help="auto: full if there is a GPU, else cpu"
    )
    parser.add_argument("--settings", nargs="+", help="only these settings of the suite, in this order")
    parser.add_argument("--teacher", help="timm name if not the recipe's teacher (then also set --work and --results)")
    add_study_options(parser, Path("runs/study"), STUDY_RESULTS)
    options = parser.parse_args()
    from benchmarks.study.estimate import print_estimate
    from benchmarks.study.figures import draw

    suite = options.suite if options.suite != "auto" else ("full" if torch.cuda.is_available() else "cpu")
    paths = StudyPaths(options.work, options.results, options.data, options.teacher_weights, options.teacher)
    known = {setting.name: setting for setting in SUITES[suite]}
    settings = [known[name] for name in options.settings or known]
    without = [setting.name for setting in settings if setting.given and not (paths.data and paths.teacher_weights)]
    settings = [setting for setting in settings if setting.name not in without]
    for name in without:
        print(f"skipping {name}: it needs DATA= and TEACHER_WEIGHTS= (see pipelines/recipes/{name}.yaml)")
    if paths.data and not any(setting.given for setting in known.values()):
        print(f"suite {suite} runs only the demo and ignores DATA=; use SUITE=cpu-long or SUITE=full")
    print(f"suite {suite}; results in {paths.results}")
    print_estimate(settings, paths)
    if options.plan:
        return
    complete = run_pending(settings, paths, 3600 * options.hours)
    draw(paths.results)
    sys.exit(0 if complete else 75)


def add_study_options(parser: ArgumentParser, work: Path, results: Path) -> None:
    """Add the options that every study has; `work` and `results` are its default folders."""
    parser.add_argument(
        "--data", help="image folder, such as that of benchmarks/study/cifar10.py (the demo needs none)"
    )
    parser.add_argument("--teacher-weights", help="teacher for --data (benchmarks/study/finetune_teacher.py)")
    parser.add_argument("--work", type=Path, default=work, help="folder for caches and runs")
    parser.add_argument("--results", type=Path, default=results, help="folder for result lines and figures")
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="start no run that would end after this many hours"
    )
    parser.add_argument("--plan", action="store_true", help="print the estimate and stop")


def exit_with_code(main: Callable[[], None], resume: str) -> None:
    """Run `main`; errors and interruptions become one message and an exit code, as for the project's commands."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as stop:
        print(f"{stop}\nrerun the same command to {resume}", file=sys.stderr)
        sys.exit(stop.exit_code)


if __name__ == "__main__":
    exit_with_code(main, "resume the study")
