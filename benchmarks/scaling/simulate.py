"""How far do both stages scale? Simulates 1 to 1,024 processes; compared with runs on one and two processes.

    python -m benchmarks.scaling [--check] [--repeats 3]

`--check` first measures the demo (`measure.py`, a few minutes on two cores) and compares it with the simulation.
Without it, the results file keeps its previous check. Stage 1 is simulated unit by unit, stage 2 step by step between
failures. The clusters are assumptions, recorded in the results. Durations follow from FLOPs (docs/COSTS.md) and an
assumed utilization of the GPU; sizes are those of a default cache (docs/BENCHMARKS.md).
Writes benchmarks/results/scale-model.json and .png.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from scalekd_cache.planning.gpus import GPUS

RANKS = tuple(2**power for power in range(11))
FORWARD_UTILIZATION, TRAINING_UTILIZATION = 0.35, 0.25
"""Assumed before a GPU was available; docs/SCALE.md has the measured values."""
DRAWS = {"cache_job": 10, "train_job": 100}
"""Simulations per point; the mean is reported."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The simulated hardware. Rates are in bytes per second."""

    ranks_per_node: int = 8
    slow_share: float = 0.02
    """Fraction of processes that are slow throughout the run."""
    slow_factor: float = 1.3
    node_mtbf_h: float = float("inf")
    """Mean time between failures of one node, hours."""
    detect_s: float = 30.0
    """Seconds from a failure to the restart of all processes."""
    storage: float = 20e9
    """Bandwidth shared by all processes."""
    link: float = 25e9
    """Bandwidth per process in the gradient all-reduce."""
    latency_s: float = 10e-6


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """A stage-1 job."""

    units: int
    unit_s: float
    unit_spread: float
    """Standard deviation of a unit's duration divided by its mean."""
    unit_bytes: float
    start_s: float
    """Seconds from the command to the first unit: imports, listing, loading the teacher."""
    finish_unit_s: float = 0.0
    """Seconds per unit on process 0 at the end: adds its sidecar to the manifest."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A stage-2 job."""

    steps: int
    micros: int
    """Micro-batches per global batch: the largest useful number of processes."""
    micro_s: float
    micro_spread: float
    update_s: float
    gradient_bytes: float
    micro_bytes: float
    start_s: float
    save_s: float
    save_every: int


class Outcome(NamedTuple):
    """Result of one simulated job."""

    seconds: float
    useful: float
    """Fraction of all processes' time spent on work that was kept."""
    lost: float
    """Fraction spent on work that a failure discarded."""
    restarts: int


def failures(cluster: Cluster, ranks: int, draw: np.random.Generator) -> Iterator[float]:
    """Endless sequence of failure times of any node."""
    nodes, at = -(-ranks // cluster.ranks_per_node), 0.0
    if not np.isfinite(cluster.node_mtbf_h):
        while True:
            yield float("inf")
    while True:
        at += draw.exponential(3600 * cluster.node_mtbf_h / nodes)
        yield at


def speeds(cluster: Cluster, ranks: int, draw: np.random.Generator) -> np.ndarray:
    """Slowdown factor of each process."""
    return np.where(draw.random(ranks) < cluster.slow_share, cluster.slow_factor, 1.0)


def cache_job(
    job: CacheJob, cluster: Cluster, ranks: int, draw: np.random.Generator, killed: Sequence[float] | None = None
) -> Outcome:
    """Processes claim units one at a time; a failure restarts all of them (`NNODES=1:16`) and discards open units."""
    slow, cuts = speeds(cluster, ranks, draw).tolist(), iter(killed) if killed else failures(cluster, ranks, draw)
    left, useful, lost, restarts, now = job.units, 0.0, 0.0, 0, 0.0
    floor = job.unit_bytes * ranks / cluster.storage  # all processes write at once
    sigma = np.sqrt(np.log1p(job.unit_spread**2))
    drawn: list[float] = []
    cut = next(cuts, float("inf"))
    while True:
        free = [(now + job.start_s, rank) for rank in range(ranks)]
        heapq.heapify(free)
        held: list[tuple[float, float]] = []  # (end, begin) of units that are unfinished when the failure happens
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
    """Durations (sample,) of steps: the slowest process, then the all-reduce, then the update."""
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
    """Synchronous steps; after a failure all processes resume from the last checkpoint."""
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
    """Stage 1 on ImageNet with 8 views and Swin-L; one unit holds 512 images and 4 views."""
    views = 512 * 4
    teacher_s = views * 69e9 / (GPUS[gpu].peak_tflops * 1e12 * FORWARD_UTILIZATION)
    drawing_s = views * 4e-3 / 12  # 4 ms per view and core (docs/COSTS.md), 12 cores per GPU
    return CacheJob(units=2 * 2503, unit_s=max(teacher_s, drawing_s), unit_spread=0.1, unit_bytes=views * 100_308.0,
                    start_s=60.0, finish_unit_s=0.002)  # fmt: skip


def imagenet_train(micros: int = 32, gpu: str = "h100") -> TrainJob:
    """Stage 2 with the advanced recipe for ResNet-50d: 300 epochs, micro-batches of 64, 202M parameters, LAMB."""
    parameters = 202e6
    micro_s = 64 * 130.6e9 / (GPUS[gpu].peak_tflops * 1e12 * TRAINING_UTILIZATION)
    return TrainJob(
        steps=300 * 1_281_167 // (64 * micros),
        micros=micros,
        micro_s=micro_s,
        micro_spread=0.05,
        update_s=0.003,
        gradient_bytes=4 * parameters,
        micro_bytes=64 * 100_308.0,
        start_s=90.0,
        save_s=12 * parameters / 1e9,
        save_every=500,
    )


def sweep(simulate: Any, job: Any, cluster: Cluster, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """One row per number of processes, with means over the simulations."""
    rows = []
    for count in ranks:
        draws = [
            simulate(job, cluster, count, np.random.default_rng([seed, count]))
            for seed in range(DRAWS[simulate.__name__])
        ]
        means = {name: float(np.mean([getattr(one, name) for one in draws])) for name in Outcome._fields}
        rows.append({"ranks": count, **means})
    return rows
