"""Checks that a refactoring changed no output: prints hashes of cached bytes and the losses of 20 training steps.

In: nothing. It uses the embedded demo images and a teacher with random weights from a fixed seed. Out: one JSON object
on standard output, to compare before and after a change (docs/LOG.md records the values). Invariant: only the command
line is used, so the script keeps working when modules move.

    python -m benchmarks.reference_run [--keep DIR]
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES, STEPS_AN_EPOCH, EPOCHS = 320, 10, 2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]


def run(*words: str, processes: int = 1) -> None:
    """Run one command of the project; prints its output and exits if it fails."""
    start = TORCHRUN if processes == 2 else ["-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *start, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def cache(folder: Path, backend: str, codec: str, processes: int) -> str:
    """Make a cache; returns the sha256 over names and bytes of all files in its units except the commit records."""
    run(
        "pipelines.cache_teacher", "--cache.path", str(folder), "--cache.backend", backend, "--cache.codec", codec,
        "--cache.num_views", "2", "--cache.samples_per_shard", "64", "--data.max_samples", str(IMAGES),
        "--teacher.pretrained", "false", "--workers", "0", processes=processes,
    )  # fmt: skip
    digest = hashlib.sha256()
    for file in sorted(path for path in (folder / "units").rglob("*") if path.is_file() and path.name != "unit.json"):
        digest.update(
            f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def losses(cache_folder: Path, run_folder: Path, *options: str) -> list[float]:
    """The logged loss of every step of a 20-step run."""
    batch = str(IMAGES // STEPS_AN_EPOCH)
    run(
        "pipelines.distill", "--cache", str(cache_folder), "--run", str(run_folder), "--student.name", "resnet10t",
        "--train.epochs", str(EPOCHS), "--train.global_batch_size", batch, "--train.micro_batch_size", "16",
        "--train.log_every", "1", "--train.workers", "0", *options,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert len(found) == STEPS_AN_EPOCH * EPOCHS, len(found)
    return found


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the caches and runs (default: a temporary one)")
    kept = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        folder = kept or Path(temporary)
        golden = sorted((ROOT / "tests").rglob("golden/*"))
        result = {
            "golden": hashlib.sha256(b"".join(path.read_bytes() for path in golden)).hexdigest(),
            "caches": {
                f"{backend} {codec}, {processes} process{'es' * (processes - 1)}": cache(
                    folder / f"{backend}-{codec}-{processes}", backend, codec, processes
                )
                for backend, codec, processes in (
                    ("webdataset", "int8", 1),
                    ("webdataset", "int8", 2),
                    ("zarr", "int8", 1),
                    ("zarr", "int8", 2),
                    ("webdataset", "transform", 1),
                )
            },
        }
        first = folder / "webdataset-int8-1"
        result["losses"] = {
            "cached": losses(first, folder / "cached"),
            "live": losses(first, folder / "live", "--train.targets", "live"),
            "baseline": losses(first, folder / "baseline", "--train.targets", "none"),
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
