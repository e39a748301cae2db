"""How long does startup take: imports, light commands, the first step of another student?

    python -m benchmarks.training.startup [--repeats 5]

Times whole processes alternately with an empty interpreter. Makes a demo cache and a demo run in a temporary folder.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import (
    ROOT,
    Measurement,
    argument_parser,
    option_words,
    publish_table,
    run_python,
    time_interleaved,
)

LIGHT = {
    "plan --help": ["-m", "pipelines.plan", "--help"],
    "verify --help": ["-m", "pipelines.verify", "--help"],
    "distill --help": ["-m", "pipelines.distill", "--help"],
}


def first_step(cache: Path, run: Path) -> tuple[float, float]:
    """Seconds from the start of `distill` to its first logged step, and seconds of its imports."""
    command = [sys.executable, "-m", "pipelines.distill", "--cache", str(cache), "--student.name", "resnet18",
               "--run", str(run), "--train.epochs", "1", "--train.log_every", "1"]  # fmt: skip
    started = time.perf_counter()
    metrics = run / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() in (None, 0), "distill failed"
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    process.terminate()
    process.wait()
    started = time.perf_counter()
    run_python("-c", "import scalekd_cache.training.run")
    return seconds, time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args(argv).repeats
    actions = {"bare": lambda: run_python("-c", "pass"), "package": lambda: run_python("-c", "import scalekd_cache")}
    actions |= {name: (lambda arguments=arguments: run_python(*arguments)) for name, arguments in LIGHT.items()}  # type: ignore[misc]
    seconds = time_interleaved(repeats, **actions)
    figures = []
    for name in ("package", *LIGHT):
        spent = [a - b for a, b in zip(seconds[name], seconds["bare"], strict=True)]
        goal = "0.3 s, without torch" if name == "package" else "without torch and deepspeed"
        what = "import scalekd_cache" if name == "package" else name
        rates = f"minus an empty interpreter, {statistics.median(seconds['bare']):.2f} s"
        figures.append(Measurement(what, statistics.median(spent), (min(spent), max(spent)), "s", rates, goal, ""))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        options = {
            "recipe": "demo",
            "data.source": "demo",
            "cache.path": cache,
            "cache.num_views": 1,
            "data.max_samples": 128,
        }
        run_python("-m", "pipelines.cache_teacher", *option_words(options))
        steps = [first_step(cache, Path(folder) / f"run{number}") for number in range(1 + min(2, repeats))][1:]
    after = [total - imports for total, imports in steps]
    figures.append(
        Measurement(
            "second `make distill`, ResNet-18, to its first logged step, after imports",
            statistics.median(after),
            (min(after), max(after)),
            "s",
            f"imports {statistics.median([imports for _, imports in steps]):.1f} s extra",
            "15 s",
            "the first step, DeepSpeed's engine",
        )
    )
    publish_table("startup", figures, {"repeats": repeats, "seconds": seconds, "first_step": steps})


if __name__ == "__main__":
    main()
