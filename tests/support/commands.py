"""Run the user's commands from tests, and read back their output files."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scalekd_cache.config.plain_names import PLAIN_NAMES

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = max(600.0, float(os.environ.get("TEST_LIMIT_S", "0")))
"""Seconds after which anything that a test waits for (a process, a state, a reply) counts as a hang. Not a measure of
speed: on a busy machine a command takes ten times as long. TEST_LIMIT_S raises it."""
TEST_LIMITS = 3
"""A test, including fixtures that it creates, may take this many times `LIMIT_S` (conftest.py)."""
# The environment's programs come first, as in the Makefile.
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PATH": PATH, "DS_ACCELERATOR": "cpu"}
# Processes started here must not inherit variables of a launcher around the tests.
for name in (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MAKEFLAGS",
    "MAKELEVEL",
    "CACHE",
    "DATA",
):
    ENV.pop(name, None)

CACHE_OPTIONS = {
    "data.max_samples": 96,
    "cache.num_views": 2,
    "cache.samples_per_shard": 32,
    "teacher.check_classes": "false",  # the teacher of the tests has random weights
}
"""A small cache of the demo set: three units of two views."""
TRAIN_OPTIONS = {
    "optim.lr": 1e-4,  # the recipe's 1e-3 would amplify rounding differences between numbers of processes
    "train.epochs": 2,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 16,
    "train.log_every": 1,
}
"""A small run: two epochs of three steps of two micro-batches."""
STEPS = 6
STUDENT = "test_resnet"
TERMS = ("label", "logit", "s3_spatial", "s3_frequency", "s4_spatial", "s4_frequency", "pooled")


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def execute(*command, status=0):
    """Run a command in the repository's root and return its output; fails with its last lines on a wrong exit code."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env=ENV, timeout=LIMIT_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return checked(" ".join(words), done.returncode, status, done.stdout)


def checked(command, returned, status, output):
    """The output of a command, which must have returned this exit code."""
    if returned != status:
        raise AssertionError(f"{command}\nexit status {returned}, not {status}:\n{output[-4000:]}")
    return output


def launcher(nproc=1):
    """The words before `pipelines.<name>`, as in the Makefile: python for one process, torchrun for several."""
    here = ["--standalone", "--local-addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *here, "--nproc-per-node", nproc, "-m", "--"]
    return [sys.executable, "-m"] if nproc == 1 else torchrun


def run(name, *words, nproc=1, status=0):
    """`python -m pipelines.<name> ...` on one or more ranks, without its imports (a fork); returns its output."""
    from stage1_process import Job

    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        outcome = Job(words, ROOT, Path(folder) / "log", ranks=nproc, command=name).wait()
    returned = max(outcome.statuses) or min(outcome.statuses)  # the others are killed when a rank fails
    return checked(f"pipelines.{name} {' '.join(words)}", returned, status, outcome.output)


def make(target, status=0, **variables):
    """`make <target>` with the interpreter of the tests."""
    given = [f"{name}={value}" for name, value in variables.items()]
    workers = ["WORKERS=0"] if "workers" in PLAIN_NAMES.get(target, ()) else []
    return execute("make", target, "VENV=none", f"PYTHON={sys.executable}", *workers, *given, status=status)


def cache_flags(path, weights, **options):
    return flags({**CACHE_OPTIONS, "cache.path": path, "teacher.weights": weights, **options})


def distill_flags(cache, folder, **options):
    return flags({"cache": cache, "run": folder, "student.name": STUDENT, **TRAIN_OPTIONS, **options})


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def metric_lines(folder):
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def steps_of(folder):
    """The lines of training steps in metrics.jsonl, in order."""
    return [line for line in metric_lines(folder) if "loss" in line]


def assert_same_losses(folder, expected, relative, steps=None):
    """Assert that every logged loss term of every step equals that of another run."""
    ours, theirs = steps_of(folder)[:steps], steps_of(expected)[:steps]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert len(ours) == (steps or len(theirs)) > 0
    for a, b in zip(ours, theirs):
        for name in (*TERMS, "loss"):
            difference = abs(a[name] - b[name])
            assert difference <= relative * abs(b[name]) + 1e-12, (a["step"], name, a[name], b[name])


def snapshot(folder):
    """Inode, modification time and size of each file by path; detects changes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def file_bytes(folder):
    """All files of a folder with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
