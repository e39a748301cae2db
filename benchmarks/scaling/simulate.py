"""How far do both stages scale? A simulation of 1 to 1,024 processes, checked against runs of one and two.

    python benchmarks/scaling/simulate.py [--check] [--repeats 3]

`--check` measures the demo first (`scale_measure.py`, some minutes on two cores) and holds the simulation against
it; without it the check of the results file stays. Stage 1 is simulated unit by unit, stage 2 step by step
between failures. The clusters are assumptions, written into the results: durations follow from FLOPs (docs/COSTS.md)
at the shares of a GPU's peak that `make plan` assumes, bytes are those of a default cache (docs/BENCHMARKS.md).
Writes benchmarks/results/scale-model.json and .png.
"""

import argparse
import heapq
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scalekd_cache.planning.gpus import FORWARD_UTILISATION, GPUS, TRAINING_UTILISATION

RESULTS = Path(__file__).parents[1] / "results"
RANKS = tuple(2**power for power in range(11))
DRAWS = {"cache_job": 10, "train_job": 100}
"""Simulations a point; the mean is shown."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the processes run on. Seconds and bytes a second."""

    ranks_per_node: int = 8
    slow_share: float = 0.02
    """Share of processes that are slow from beginning to end."""
    slow_factor: float = 1.3
    node_mtbf_h: float = float("inf")
    """Mean time between failures of one machine, hours."""
    detect_s: float = 30.0
    """From a failure to the new start of all processes."""
    storage: float = 20e9
    """All processes together."""
    link: float = 25e9
    """Each process, in an exchange of gradients."""
    latency_s: float = 10e-6


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """Stage 1."""

    units: int
    unit_s: float
    unit_spread: float
    """Standard deviation of a unit's duration over its mean."""
    unit_bytes: float
    start_s: float
    """From the command to the first unit: imports, listing, the teacher's weights."""
    finish_unit_s: float = 0.0
    """Process 0, at the end, a unit: its sidecar into the manifest."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Stage 2."""

    steps: int
    micros: int
    """Micro-batches of a global batch; more processes than this have nothing to do."""
    micro_s: float
    micro_spread: float
    update_s: float
    gradient_bytes: float
    micro_bytes: float
    start_s: float
    save_s: float
    save_every: int


class Outcome(NamedTuple):
    """One simulated job."""

    seconds: float
    useful: float
    """Of all processes' seconds, the share in work that was kept."""
    lost: float
    """The share in work that was thrown away."""
    restarts: int


def failures(cluster: Cluster, ranks: int, draw: np.random.Generator) -> Iterator[float]:
    """Times of failures of any machine, without end."""
    nodes, at = -(-ranks // cluster.ranks_per_node), 0.0
    if not np.isfinite(cluster.node_mtbf_h):
        while True:
            yield float("inf")
    while True:
        at += draw.exponential(3600 * cluster.node_mtbf_h / nodes)
        yield at


def speeds(cluster: Cluster, ranks: int, draw: np.random.Generator) -> np.ndarray:
    """Factor on every duration, a process."""
    return np.where(draw.random(ranks) < cluster.slow_share, cluster.slow_factor, 1.0)


def cache_job(
    job: CacheJob, cluster: Cluster, ranks: int, draw: np.random.Generator, killed: Sequence[float] | None = None
) -> Outcome:
    """Units handed out one at a time; a failure starts all processes anew (`NNODES=1:16`) and loses what they hold."""
    slow, cuts = speeds(cluster, ranks, draw).tolist(), iter(killed) if killed else failures(cluster, ranks, draw)
    left, useful, lost, restarts, now = job.units, 0.0, 0.0, 0, 0.0
    floor = job.unit_bytes * ranks / cluster.storage  # all write at once
    sigma = np.sqrt(np.log1p(job.unit_spread**2))
    drawn: list[float] = []
    cut = next(cuts, float("inf"))
    while True:
        free = [(now + job.start_s, rank) for rank in range(ranks)]
        heapq.heapify(free)
        held: list[tuple[float, float]] = []  # (end, begin) of units that are not finished at the cut
        end = now
        while left and free[0][0] < cut:
            begin, rank = heapq.heappop(free)
            drawn = drawn or draw.lognormal(-(sigma**2) / 2, sigma, 4096).tolist()
            work = job.unit_s * drawn.pop()
            done = begin + max(work * slow[rank], floor)
            left -= 1
            if done > cut:
                held.append((done, begin))
            else:
                useful += work
                end = max(end, done)
            heapq.heappush(free, (done, rank))
        if not left and not held:
            break
        left += len(held)
        lost += sum(cut - begin for _, begin in held)
        now, restarts = cut + cluster.detect_s, restarts + 1
        cut = next(time for time in cuts if time > now) if killed is None else next(cuts, float("inf"))
    seconds = end + job.units * job.finish_unit_s
    return Outcome(seconds, useful / (seconds * ranks), lost / (seconds * ranks), restarts)


def step_seconds(
    job: TrainJob, cluster: Cluster, ranks: int, draw: np.random.Generator, sample: int = 400
) -> np.ndarray:
    """Durations (sample,) of steps: the slowest process, then the exchange, then the update."""
    each = job.micros // ranks
    noise = draw.normal(1.0, job.micro_spread / np.sqrt(each), (sample, ranks)).clip(min=0.2)
    slowest = (job.micro_s * each * speeds(cluster, ranks, draw) * noise).max(1)
    read = job.micros * job.micro_bytes / cluster.storage  # loader workers read ahead
    return np.maximum(slowest, read) + exchange_seconds(job, cluster, ranks) + job.update_s


def exchange_seconds(job: TrainJob, cluster: Cluster, ranks: int) -> float:
    """A ring all-reduce of the gradients, after the last micro-batch."""
    if ranks == 1:
        return 0.0
    return 2 * (ranks - 1) / ranks * job.gradient_bytes / cluster.link + 2 * (ranks - 1) * cluster.latency_s


def train_job(
    job: TrainJob, cluster: Cluster, ranks: int, draw: np.random.Generator, killed: Sequence[float] | None = None
) -> Outcome:
    """Steps together; a failure takes all processes back to the last checkpoint."""
    steps = step_seconds(job, cluster, ranks, draw)
    step = float(steps.mean())
    cuts = iter(killed) if killed else failures(cluster, ranks, draw)
    cut, now, done, lost, restarts = next(cuts, float("inf")), 0.0, 0, 0.0, 0
    period = job.save_every * step + job.save_s
    while True:
        begin = now + job.start_s
        rest = job.steps - done
        end = begin + rest * step + rest // job.save_every * job.save_s
        if end <= cut:
            break
        whole = int(max(0.0, cut - begin) // period)
        done += whole * job.save_every
        lost += max(0.0, cut - begin - whole * period)
        now, restarts = cut + cluster.detect_s, restarts + 1
        cut = next(time for time in cuts if time > now) if killed is None else next(cuts, float("inf"))
        if end > 1e10:
            return Outcome(float("inf"), 0.0, 1.0, restarts)
    useful = job.steps * (job.micros * job.micro_s + job.update_s * ranks)
    return Outcome(end, useful / (end * ranks), lost / end, restarts)


def imagenet_cache(gpu: str = "h100") -> CacheJob:
    """ImageNet, 8 views, Swin-L: units of 512 images and 4 views."""
    views = 512 * 4
    teacher_s = views * 69e9 / (GPUS[gpu].peak_tflops * 1e12 * FORWARD_UTILISATION)
    drawing_s = views * 4e-3 / 12  # 4 ms a view a core (docs/COSTS.md), 12 cores a GPU
    return CacheJob(units=2 * 2503, unit_s=max(teacher_s, drawing_s), unit_spread=0.1, unit_bytes=views * 100_308.0,
                    start_s=60.0, finish_unit_s=0.002)  # fmt: skip


def imagenet_train(micros: int = 32, gpu: str = "h100") -> TrainJob:
    """The advanced recipe of ResNet-50d: 300 epochs, micro-batches of 64, 202 M trained parameters, LAMB."""
    parameters = 202e6
    micro_s = 64 * 130.6e9 / (GPUS[gpu].peak_tflops * 1e12 * TRAINING_UTILISATION)
    return TrainJob(steps=300 * 1_281_167 // (64 * micros), micros=micros, micro_s=micro_s, micro_spread=0.05,
                    update_s=0.003, gradient_bytes=4 * parameters, micro_bytes=64 * 100_308.0, start_s=90.0,
                    save_s=12 * parameters / 1e9, save_every=500)  # fmt: skip


def sweep(simulate: Any, job: Any, cluster: Cluster, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A row a number of processes: means over simulations."""
    rows = []
    for count in ranks:
        draws = [
            simulate(job, cluster, count, np.random.default_rng([seed, count]))
            for seed in range(DRAWS[simulate.__name__])
        ]
        means = {name: float(np.mean([getattr(one, name) for one in draws])) for name in Outcome._fields}
        rows.append({"ranks": count, **means})
    return rows


def curves() -> dict[str, dict[str, Any]]:
    """Everything that is plotted."""
    cache, train, result = imagenet_cache(), imagenet_train(), {}
    for name, storage in (("5 GB/s", 5e9), ("20 GB/s", 20e9), ("100 GB/s", 100e9), ("unlimited", 1e15)):
        result[f"stage 1, storage {name}"] = (cache_job, cache, Cluster(storage=storage), RANKS)
    large = replace(cache, units=11 * cache.units)  # 14 million images, as ImageNet-21k
    result["stage 1, 11 times ImageNet, storage 100 GB/s"] = (cache_job, large, Cluster(storage=100e9), RANKS)
    for hours in (100.0, 10.0, 1.0):
        cluster = Cluster(storage=100e9, node_mtbf_h=hours)
        result[f"stage 1, 11 times ImageNet, 100 GB/s, a machine fails every {hours:g} h"] = (
            cache_job, large, cluster, RANKS,
        )  # fmt: skip
    up_to = [count for count in RANKS if count <= train.micros]
    for name, link in (("25 GB/s", 25e9), ("100 GB/s", 100e9), ("400 GB/s", 400e9)):
        result[f"stage 2, global batch 2048, link {name}"] = (train_job, train, Cluster(link=link), up_to)
    for hours, every in ((5000.0, 500), (100.0, 500), (10.0, 500), (10.0, 50)):
        job = replace(imagenet_train(micros=1024), save_every=every)
        cluster = Cluster(link=100e9, storage=1e12, node_mtbf_h=hours)
        result[f"stage 2, global batch 65,536, 100 GB/s, fails every {hours:g} h, saves every {every}"] = (
            train_job, job, cluster, RANKS,
        )  # fmt: skip
    return {
        name: {"job": asdict(job), "cluster": asdict(cluster), "rows": sweep(simulate, job, cluster, ranks)}
        for name, (simulate, job, cluster, ranks) in result.items()
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Efficiency and lost work of both stages over the number of processes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9))
    panels = (
        (axes[0, 0], "useful", "stage 1, ", "kept work / all processes' time", lambda name: "fails" not in name),
        (axes[0, 1], "lost", "stage 1, ", "work thrown away / all processes' time", lambda name: "fails" in name),
        (axes[1, 0], "useful", "stage 2, ", "kept work / all processes' time", lambda name: True),
        (axes[1, 1], "lost", "stage 2, ", "work thrown away / all processes' time", lambda name: "fails" in name),
    )
    for axis, field, stage, label, chosen in panels:
        for number, (name, curve) in enumerate(
            item for item in found.items() if item[0].startswith(stage) and chosen(item[0])
        ):
            rows = curve["rows"]
            axis.plot([row["ranks"] for row in rows], [row[field] for row in rows], "o-" if number < 5 else "s--",
                      markersize=3.5, label=name.removeprefix(stage))  # fmt: skip
        axis.set(xscale="log", xlabel="processes", ylabel=label, title=stage.strip(", "), ylim=(0, None))
        axis.set_xticks(RANKS, [str(count) for count in RANKS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Simulate, check, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure the demo on one and two processes")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    file = RESULTS / "scale-model.json"
    check = json.loads(file.read_text())["check"] if file.exists() else None
    if options.check:
        from benchmarks.scaling.measure import measure

        check = measure(options.repeats)
    found = curves()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    content = {
        "command": f"python -m benchmarks.scaling.simulate{' --check' if options.check else ''} --repeats {options.repeats}",
        "commit": commit.stdout.strip(),
        "machine": {"cpu": platform.machine(), "python": platform.python_version(), "numpy": np.__version__},
        "draws": DRAWS, "check": check, "curves": found,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    plot(found, RESULTS / "scale-model.png")
    for name, curve in found.items():
        print(name, " ".join(f"{row['ranks']}: {row['useful']:.2f}/{row['lost']:.3f}" for row in curve["rows"]))
    for row in (check or {}).get("rows", ()):
        print(row)


if __name__ == "__main__":
    main()
