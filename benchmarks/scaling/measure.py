"""Compares demo runs on one and two processes with the simulation of `simulate.py`.

In: this machine. Out: rows of (what, measured seconds, simulated seconds). Invariant: the runs that are compared were
not used to set the parameters of the simulation. Unit and step times come from two concurrent one-process jobs, so they
include contention on the machine. The all-reduce time comes from two otherwise idle processes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import ROOT, option_words, run_python
from scalekd_cache.errors import counted

IMAGES, SHARD, VIEWS = 768, 16, 2
MICRO, GLOBAL, EPOCHS = 16, 64, 2
STUDENT = "resnet10t"


def start(module: str, words: dict[str, Any], processes: int = 1) -> subprocess.Popen[str]:
    """Start `python -m <module>` in the background, with torchrun for more than one process."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", *(["--"] if torchrun else []), module, *option_words(words)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the process; returns its output, or raises if it failed."""
    output, _ = process.communicate(timeout=900)
    if process.returncode:
        raise RuntimeError(output[-3000:])
    return output


def stage1(folder: Path) -> dict[str, Any]:
    return {"recipe": "demo", "data.source": "demo", "data.max_samples": IMAGES, "cache.path": folder,
            "cache.samples_per_shard": SHARD, "cache.num_views": VIEWS, "cache.views_per_group": VIEWS,
            "teacher.pretrained": "false", "workers": 0}  # fmt: skip


def stage2(cache: Path, folder: Path, global_batch: int, **more: Any) -> dict[str, Any]:
    return {
        "cache": cache,
        "run": folder,
        "student.name": STUDENT,
        "train.epochs": EPOCHS,
        "train.log_every": 1,
        "train.global_batch_size": global_batch,
        "train.micro_batch_size": MICRO,
        **more,
    }


def commits(folder: Path) -> np.ndarray:
    """Commit times of the units, sorted."""
    return np.sort([path.stat().st_mtime for path in (folder / "units").glob("g*/unit.json")])


def run_concurrently(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    running = [start(module, words) for module, words in jobs]
    for process in running:
        finish(process)


def steps(run: Path) -> list[float]:
    """Seconds of every step except the first two."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    batch = json.loads((run / "batch.json").read_text())
    return [batch / line["images_per_s"] for line in lines if "loss" in line][2:]


def train(jobs: list[dict[str, Any]], processes: int = 1) -> None:
    """Run stage-2 jobs concurrently."""
    running = [start("pipelines.distill", words, processes) for words in jobs]
    for words, process in zip(jobs, running, strict=True):
        finish(process)
        (words["run"] / "batch.json").write_text(str(words["train.global_batch_size"]))


ALL_REDUCE = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.ones(int(sys.argv[1]) // 4)
times = []
for _ in range(12):
    dist.barrier(); begin = time.perf_counter(); dist.all_reduce(x); times.append(time.perf_counter() - begin)
if dist.get_rank() == 0: print("seconds", sorted(times)[len(times) // 2])
"""


def all_reduce_seconds(count: int, folder: Path) -> float:
    """Seconds of an all-reduce of `count` bytes of float32 over two processes."""
    file = folder / "all_reduce.py"
    file.write_text(ALL_REDUCE)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return float(run_python(*torchrun, str(file), str(count)).split("seconds")[1])


def check_stage1(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Time from the first to the last commit, on one process and on two."""
    from benchmarks.scaling.simulate import CacheJob, Cluster, cache_job

    units = IMAGES // SHARD
    # Two one-process jobs load the machine like one job with two processes.
    run_concurrently([("pipelines.cache_teacher", stage1(folder / name)) for name in ("left", "right")])
    durations = np.concatenate([np.diff(commits(folder / name)) for name in ("left", "right")])
    finish(start("pipelines.cache_teacher", stage1(folder / "pair"), 2))
    finish(start("pipelines.cache_teacher", stage1(folder / "single")))
    single = np.diff(commits(folder / "single"))
    times = {1: commits(folder / "single"), 2: commits(folder / "pair")}
    still = Cluster(slow_share=0.0, storage=1e15)
    for processes, known in ((1, single[: units // 2]), (2, durations)):
        job = CacheJob(units=units, unit_s=float(known.mean()), unit_spread=float(known.std() / known.mean()),
                       unit_bytes=0.0, start_s=0.0)  # fmt: skip
        whole = [cache_job(job, still, processes, np.random.default_rng(seed)).seconds for seed in range(50)]
        simulated = float(np.mean(whole)) - job.unit_s  # the first commit happens one unit after the start
        measured = float(times[processes][-1] - times[processes][0])
        rows.append(
            {
                "what": f"stage 1, {counted(processes, 'process')}, first to last of {units} commits",
                "measured_s": measured,
                "simulated_s": simulated,
                "unit_s": job.unit_s,
                "unit_spread": job.unit_spread,
            }
        )


def check_stage2(folder: Path, rows: list[dict[str, Any]]) -> None:
    """One step on two processes with two micro-batches each and one gradient all-reduce.

    The compute time comes from two concurrent one-process jobs with two micro-batches per step each.
    """
    from benchmarks.scaling.simulate import Cluster, TrainJob, step_seconds

    cache, micros = folder / "single", GLOBAL // MICRO
    half = [stage2(cache, folder / name, GLOBAL // 2) for name in ("left-half", "right-half")]
    train(half)
    known = [second for words in half for second in steps(words["run"])]
    (weights,) = (folder / "left-half" / "checkpoints").glob(f"step-{EPOCHS * (IMAGES // (GLOBAL // 2)):08d}/model.*")
    gradient_bytes = weights.stat().st_size
    exchange = all_reduce_seconds(gradient_bytes, folder)
    job = TrainJob(steps=1, micros=micros, micro_s=statistics.median(known) / (micros // 2), micro_spread=0.0,
                   update_s=0.0, gradient_bytes=gradient_bytes, micro_bytes=0, start_s=0, save_s=0,
                   save_every=1)  # fmt: skip
    cluster = Cluster(slow_share=0.0, storage=1e15, link=gradient_bytes / exchange, latency_s=0.0)
    words = stage2(cache, folder / "two", GLOBAL)
    train([words], 2)
    rows.append(
        {
            "what": f"stage 2, 2 processes, a step of {micros} micro-batches",
            "measured_s": statistics.median(steps(words["run"])),
            "simulated_s": float(np.median(step_seconds(job, cluster, 2, np.random.default_rng(0)))),
            "half_step_s": statistics.median(known),
            "all_reduce_s": exchange,
            "gradient_bytes": gradient_bytes,
        }
    )


def measure(repeats: int) -> dict[str, Any]:
    """Run all comparisons `repeats` times."""
    rows: list[dict[str, Any]] = []
    before = os.getloadavg()
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            folder, own = Path(name), []
            check_stage1(folder, own)
            check_stage2(folder, own)
            rows += [{"repeat": repeat, "ratio": row["simulated_s"] / row["measured_s"], **row} for row in own]
            print(*rows[-len(own) :], sep="\n", flush=True)
    return {"cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg(), "rows": rows}
