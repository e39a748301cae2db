"""The whole study: is offline as good as online? Resumable run by run, with an estimate first.

    make study [FORM=cpu|cpu-long|full] [DATA=data/cifar10-small TEACHER_WEIGHTS=teachers/file.safetensors] [HOURS=1.5]
    python -m benchmarks.study --form cpu --plan            # the estimate alone

In: the plan in `plan.py`. Out: a JSON line a run in benchmarks/results/study/<setting>.jsonl, and a line a cache
in <setting>-caches.jsonl; then the figures and tables of `figures.py`.
Everything is done by the project's own commands (`pipelines.cache_teacher`, `pipelines.distill`), called in this
process to save their start. Invariant: a line is written when its run is finished and judged; a killed study, started
again, goes on with the run it was in, from its last checkpoint. The folder of a run that has its line is removed.
"""

import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import RESULTS, argument_parser, machine
from benchmarks.study.demo_teachers import WIDTHS
from benchmarks.study.plan import ARMS, CACHES, FORMS, Arm, Run, Setting, runs_of
from benchmarks.study.statistics import Line, append_line, read_lines
from scalekd_cache.errors import RunInterrupted, UserError
from scalekd_cache.store.manifest import read_manifest
from scalekd_cache.store.reader import Cache

STUDY_RESULTS = RESULTS / "study"


FROM_SUMMARY = (
    "top1", "top5", "val_images", "teacher", "teacher_top1", "steps", "epochs", "views", "codec", "bytes_per_view",
    "cache_fingerprint", "minutes", "images_per_s",
)  # fmt: skip
"""What a run's line takes over from its summary.json."""


class Places(NamedTuple):
    """Paths and teacher of a study."""

    work: Path
    """Caches and runs."""
    results: Path
    data: str | None
    teacher_weights: str | None
    teacher: str | None = None
    """Its timm name (None: the recipe's)."""


def dotted(options: tuple[str, ...]) -> list[str]:
    """key=value -> --key value."""
    return [word for option in options for word in (f"--{option.partition('=')[0]}", option.partition("=")[2])]


def teacher_options(setting: Setting, name: str, places: Places) -> list[str]:
    """The weights of a teacher that the user gives, or that this study has trained for a cache of its own."""
    own = CACHES[name].teacher
    if own:
        file = places.work / setting.name / "teachers" / f"{name}.safetensors"
        return ["--teacher.weights", str(file), "--teacher.name", own.name]
    if not setting.given or places.teacher_weights is None:
        return []
    timm_name = ["--teacher.name", places.teacher] if places.teacher else []
    return ["--teacher.weights", places.teacher_weights, *timm_name]


def stage1_command(setting: Setting, name: str, places: Places, options: tuple[str, ...]) -> list[str]:
    """Arguments of `pipelines.cache_teacher` for one of `CACHES`; `options` are its own, resolved."""
    folder = places.work / setting.name / "caches"
    words = ["--cache.path", str(folder / name), *teacher_options(setting, name, places)]
    if CACHES[name].own_pixels:
        words += ["--recipe", setting.recipe, "--cache.num_views", str(setting.epochs), *dotted(setting.stage1)]
        words += ["--data.source", places.data] if setting.given and places.data else []
    else:
        words += ["--cache.pixels_from", str(folder / "default")]
        words += dotted(tuple(option for option in setting.stage1 if not option.startswith("data.")))
    return words + dotted(options)


def stage2_command(setting: Setting, run: Run, places: Places) -> list[str]:
    """Arguments of `pipelines.distill` for a run."""
    arm = ARMS[run.arm]
    return [
        "--cache", str(places.work / setting.name / "caches" / arm.cache), "--run", str(run_folder(run, places)),
        "--student.name", run.student, "--train.targets", arm.targets, "--train.seed", str(run.seed),
        "--train.epochs", str(setting.epochs), "--train.eval_epochs", str(setting.epochs),
        "--train.checkpoint_epochs", str(max(setting.epochs // 2, 1)), "--train.keep_checkpoints", "1",
        *(["--train.views", str(arm.views)] if arm.views else []),
        *(["--teacher_weights", places.teacher_weights] if setting.given and places.teacher_weights else []),
        *dotted(setting.stage2), *dotted(arm.options),
    ]  # fmt: skip


def run_folder(run: Run, places: Places) -> Path:
    """Where a run lives until it has its line."""
    return places.work / run.setting / "runs" / f"{run.student}-{run.arm}-{run.seed}"


@contextmanager
def reading(arm: Arm) -> Iterator[None]:
    """The ways of making and reading that no option of the commands offers (`judge.py`)."""
    from benchmarks.study.judge import norms_of_what_is_decoded, without_dither

    with ExitStack() as stack:
        if not CACHES[arm.cache].dither:
            stack.enter_context(without_dither())
        if arm.norms == "decoded":
            stack.enter_context(norms_of_what_is_decoded())
        yield


class Clock:
    """Seconds of a block, of the wall and of this process's processor time."""

    def __enter__(self) -> "Clock":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = {
            "wall_s": round(time.perf_counter() - self._wall, 2),
            "cpu_s": round(time.process_time() - self._cpu, 2),
        }


def quietly(log: Path, command: Any, argv: list[str]) -> None:
    """Run one of the project's commands in this process, what it prints going to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        command(argv)


def make_cache(setting: Setting, name: str, places: Places) -> Path:
    """The cache called `name`, made when it is not there; a new one gets its line."""
    root = places.work / setting.name / "caches" / name
    file = places.results / f"{setting.name}-caches.jsonl"
    if (root / "manifest.json").exists() and any(line["cache"] == name for line in read_lines(file)):
        return root
    if not CACHES[name].own_pixels:
        make_cache(setting, "default", places)
    from pipelines import cache_teacher

    print(f"  making the cache {setting.name}/{name}", flush=True)
    train_teacher(setting, name, places)
    with Clock() as clock, reading(Arm(cache=name)):
        options = resolve(setting, name, places)
        argv = stage1_command(setting, name, places, options)
        quietly(places.work / setting.name / "logs" / f"cache-{name}.log", cache_teacher.main, argv)
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
            **clock.seconds, **machine_facts(),
        },
    )  # fmt: skip
    return root


def train_teacher(setting: Setting, name: str, places: Places) -> None:
    """The demo's teacher of a cache that wants one of its own."""
    own = CACHES[name].teacher
    if not own:
        return
    from scalekd_cache.config.stage1 import DataConfig
    from scalekd_cache.models.demo_teacher import train_demo_teacher

    file = Path(teacher_options(setting, name, places)[1])
    if not file.exists():
        train_demo_teacher(file, DataConfig(source="demo"), epochs=own.epochs, model_args=WIDTHS.get(own.name))


def resolve(setting: Setting, name: str, places: Places) -> tuple[str, ...]:
    """Options of a cache; so many bits a value become the noise at which records have that size."""
    options = CACHES[name].options
    bits = next(
        (option.rpartition(":")[2] for option in options if option.startswith("cache.codec_target=bits:")), None
    )
    if bits is None:
        return options
    from benchmarks.study.judge import first_views, noise_for_bytes

    weights = places.teacher_weights if setting.given else None
    features = first_views(places.work / setting.name / "caches" / "default", weights)
    wanted = float(bits) * features[0].numel() / 8
    return ("cache.codec=transform", f"cache.codec_noise={noise_for_bytes(features, wanted)}")


def train(setting: Setting, run: Run, places: Places, judges: dict[str, Any]) -> Line:
    """Train, judge, and return the run's line."""
    from benchmarks.study.judge import Judge
    from pipelines import distill

    arm, folder = ARMS[run.arm], run_folder(run, places)
    cache = make_cache(setting, arm.cache, places)
    argv = stage2_command(setting, run, places)
    resumed = (folder / "metrics.jsonl").exists()
    with Clock() as clock, reading(arm):
        quietly(places.work / setting.name / "logs" / f"{folder.name}.log", distill.main, argv)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if setting.name not in judges:
        weights = places.teacher_weights if setting.given else None
        judges[setting.name] = Judge(make_cache(setting, "default", places), weights, setting.judged)
    same_teacher = CACHES[arm.cache].teacher is None
    held_out = judges[setting.name].losses(folder) if same_teacher and arm.targets != "none" else None
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line["loss"] for line in metrics if line.get("epoch") == setting.epochs - 1 and "loss" in line]
    return {
        "key": run.key, **run._asdict(), **{name: summary[name] for name in FROM_SUMMARY},
        "feature_bytes": read_manifest(cache).bytes_per_view["features"],
        "train_loss": round(sum(last) / len(last), 5) if last else None, "held_out": held_out,
        "held_out_loss": round(sum(held_out.values()), 5) if held_out else None,
        "resumed": resumed, **clock.seconds, **machine_facts(),
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


def go(settings: list[Setting], places: Places, budget_s: float) -> bool:
    """Run what has no line yet; false when the time is used up before the end."""
    from benchmarks.study.estimate import seconds_of

    todo = [(setting, run) for setting in settings for run in pending(setting, places)]
    judges: dict[str, Any] = {}
    started = time.monotonic()
    for number, (setting, run) in enumerate(todo):
        spent = time.monotonic() - started
        ahead = [seconds_of(later, read_lines(places.results / f"{one.name}.jsonl")) for one, later in todo[number:]]
        if spent + (ahead[0] or 0) > budget_s:
            print(
                f"time limit reached: {len(todo) - number} runs remain; rerun the same command to continue", flush=True
            )
            return False
        line = train(setting, run, places, judges)
        append_line(places.results / f"{setting.name}.jsonl", line)
        shutil.rmtree(run_folder(run, places))
        left = sum(seconds or 0.0 for seconds in ahead[1:]) / 60
        print(
            f"[{number + 1}/{len(todo)}] {run.key}: top-1 {line['top1']:.2f} %, held-out loss {line['held_out_loss']}, "
            f"{line['wall_s']:.0f} s; {(time.monotonic() - started) / 60:.0f} min done, about {left:.0f} min left",
            flush=True,
        )
    return True


def pending(setting: Setting, places: Places) -> list[Run]:
    """Runs of a setting that have no line."""
    done = {line["key"] for line in read_lines(places.results / f"{setting.name}.jsonl")}
    return [run for run in runs_of(setting) if run.key not in done]


def main() -> None:
    """Parse, estimate, run, draw."""
    parser = argument_parser(__doc__)
    parser.add_argument("--form", choices=("auto", *FORMS), default="auto", help="auto: full with a GPU, else cpu")
    parser.add_argument("--settings", nargs="+", help="only these settings of the form, in this order")
    parser.add_argument(
        "--data", help="CIFAR-10 as an image folder (benchmarks/study/cifar10.py), for settings but the demo"
    )
    parser.add_argument("--teacher-weights", help="its teacher (benchmarks/study/finetune_teacher.py)")
    parser.add_argument("--teacher", help="its timm name, where it is not the recipe's (then give --work, --results)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="caches and runs")
    parser.add_argument("--results", type=Path, default=STUDY_RESULTS)
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="start no run that would end after this many hours"
    )
    parser.add_argument("--plan", action="store_true", help="print the estimate and stop")
    options = parser.parse_args()
    from benchmarks.study.estimate import print_estimate
    from benchmarks.study.figures import draw

    form = options.form if options.form != "auto" else ("full" if torch.cuda.is_available() else "cpu")
    places = Places(options.work, options.results, options.data, options.teacher_weights, options.teacher)
    known = {setting.name: setting for setting in FORMS[form]}
    settings = [known[name] for name in options.settings or known]
    without = [setting.name for setting in settings if setting.given and not (places.data and places.teacher_weights)]
    settings = [setting for setting in settings if setting.name not in without]
    for name in without:
        print(f"{name} is skipped: give DATA= and TEACHER_WEIGHTS= (pipelines/recipes/{name}.yaml says how)")
    if places.data and not any(setting.given for setting in known.values()):
        print(f"form {form} uses only the demo: DATA= is for FORM=cpu-long and FORM=full")
    print(f"form {form}; results in {places.results}")
    print_estimate(settings, places)
    if options.plan:
        return
    complete = go(settings, places, 3600 * options.hours)
    draw(places.results)
    sys.exit(0 if complete else 75)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as stop:
        print(f"{stop}\nrerun the same command to resume the study", file=sys.stderr)
        sys.exit(stop.exit_code)
