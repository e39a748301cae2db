"""Smoke run on a GPU: checks that everything runs, is correct and is fast. Takes at most 10 minutes on one H100.

    python -m benchmarks.gpu_smoke [--out FILE] [--parts abcdefg] [--stand-in]

Each part runs in a separate process with a limit of 240 seconds. After each part its results are printed as one JSON
line and written to the file `--out`, so an interrupted run keeps them. A part that fails or is stopped keeps the
results it has reported; a result that fails holds its error, and the part continues. Weights are random, and the images
are generated before the parts start.

    a  environment                                   e  stage 1 compared with the plain teacher
    b  attention at the projectors' shapes           f  the real trainer: targets, heads, batches, ZeRO, LAMB
    c  codecs on the device and on the CPU          g  save and resume, verify and repair, --device cpu
    d  the teacher: batches, attention, compile

`--stand-in` runs the same code on a CPU with tiny models; its results are meaningless.

The run needs no network. The GPU machine must have torch and torchvision (Python 3.12). Collect everything else as
wheels (66 MB, half of it scipy) on a machine with network access:

    PACKAGES="timm webdataset braceexpand zarr donfig numcodecs google-crc32c zstandard hjson msgpack \\
      psutil py-cpuinfo pydantic pydantic-core annotated-types typing-inspection einops jsonargparse click scipy \\
      tensorboard absl-py protobuf bokeh tornado xyzservices"
    pip download --no-deps --dest wheels --python-version 3.12 --only-binary=:all: \\
      --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 $PACKAGES
    pip wheel --no-deps --wheel-dir wheels "deepspeed>=0.19,<0.20"      # published as source only
    pip install --no-index --no-deps --find-links wheels $PACKAGES deepspeed      # on the GPU machine
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, argument_parser, commit

PART_LIMIT_S = 240.0
TOTAL_LIMIT_S = 560.0
"""Limit of all parts and of generating the images: a machine that ends each command after 600 s keeps the file."""
PARTS = {
    "a": ("kernels", "environment"),
    "b": ("kernels", "attention"),
    "c": ("kernels", "codecs"),
    "d": ("kernels", "teacher"),
    "e": ("jobs", "stage1"),
    "f": ("jobs", "trainer"),
    "g": ("jobs", "recovery"),
}
"""Module in `benchmarks/smoke/` and function of each part."""


def guarded(command: Sequence[str], limit_s: float, log: Path) -> tuple[str, float]:
    """Run a command for at most `limit_s` seconds, then end it and its child processes; returns status and seconds."""
    started = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C, so that no worker process keeps the GPU
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    status = f"stopped after {limit_s:.0f} s" if code is None else "done" if code == 0 else f"exit code {code}"
    return status, time.monotonic() - started


def run_parts(
    parts: str,
    folder: Path,
    out: Path,
    *,
    stand_in: bool,
    part_limit_s: float = PART_LIMIT_S,
    total_limit_s: float = TOTAL_LIMIT_S,
) -> dict[str, Any]:
    """Run the parts one after another; returns the results by part, and writes them to `out`.

    Parts that are in `out` from an earlier run stay there until they run again.

    Args:
        parts: letters of `PARTS`.
        folder: where images, caches and logs are kept.
        out: the JSON file.
        stand_in: tiny models on a CPU.
        part_limit_s: limit of each part, seconds.
        total_limit_s: limit of all parts together, seconds.
    """
    known = json.loads(out.read_text(encoding="utf-8"))["parts"] if out.exists() else {}
    results: dict[str, Any] = {"command": " ".join(["python", *sys.orig_argv[1:]]), "parts": known}
    end = time.monotonic() + total_limit_s
    for part in parts:
        file, log = folder / f"{part}.json", folder / f"{part}.log"
        command = [sys.executable, "-m", "benchmarks.smoke", part, str(folder), *(["--stand-in"] if stand_in else [])]
        limit_s = min(part_limit_s, end - time.monotonic())
        status, seconds = guarded(command, limit_s, log) if limit_s > 1 else ("not started: no time left", 0.0)
        figures = json.loads(file.read_text()) if file.exists() else {}
        result = {"what": PARTS[part][1], "status": status, "commit": commit(), "seconds": round(seconds, 1)}
        result["figures"] = figures
        if status != "done" and log.exists():
            result["log"] = log.read_text(errors="replace")[-1500:]
        results["parts"][part] = result
        results["ratios"] = ratios(results["parts"])
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({"part": part, **result}), flush=True)
    return results


def ratios(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured results that have a goal (docs/BENCHMARKS.md)."""
    figures = {part: result["figures"] for part, result in parts.items()}
    rows: list[dict[str, Any]] = []

    def row(what: str, value: float, goal: str, met: bool) -> None:
        rows.append({"what": what, "value": round(value, 4), "goal": goal, "met": met})

    for codec, facts in figures.get("c", {}).items():
        if "decode_ms" in facts:
            row(f"decode, {codec}, ms per batch", facts["decode_ms"], "at most 5", facts["decode_ms"] <= 5)
    stage1 = figures.get("e", {}).get("stage1")
    if stage1:
        row("stage 1 / plain teacher", stage1["ratio"], "at least 0.97", stage1["ratio"] >= 0.97)
    steps = {name: facts["step_ms"] for name, facts in figures.get("f", {}).items() if "step_ms" in facts}
    for name, synthetic in steps.items():
        kind, _, batch = name.partition(" ")
        cached, live = steps.get(f"cached {batch}"), steps.get(f"live {batch}")
        if kind == "synthetic" and cached:
            row(
                f"cached / synthetic targets, micro-batch {batch}",
                cached / synthetic,
                "at most 1.02",
                cached / synthetic <= 1.02,
            )
        if kind == "synthetic" and cached and live:
            limit = 0.95 * (synthetic + figures["f"][f"live {batch}"]["teacher_ms"]) / synthetic
            goal = f"at least {limit:.3f}, 0.95 of the limit"
            row(f"live / cached, micro-batch {batch}", live / cached, goal, live / cached >= limit)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the images, run the parts; exit code 1 if a part failed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--parts", default="".join(PARTS), help=f"letters of the parts (default {''.join(PARTS)})")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/gpu-smoke.json)")
    parser.add_argument("--folder", type=Path, help="folder for images and caches (default: a temporary one)")
    parser.add_argument("--stand-in", action="store_true", help="tiny models on a CPU, to test this script")
    options = parser.parse_args(argv)
    end = time.monotonic() + TOTAL_LIMIT_S
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts {''.join(sorted(unknown))}; parts are {''.join(PARTS)}")
    out = options.out or RESULTS / ("gpu-smoke-stand-in.json" if options.stand_in else "gpu-smoke.json")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        from benchmarks.smoke.sizes import sizes_of, write_images

        write_images(folder / "images", sizes_of(options.stand_in))
        results = run_parts(options.parts, folder, out, stand_in=options.stand_in, total_limit_s=end - time.monotonic())
    for line in results["ratios"]:
        print(f"{line['what']}: {line['value']} (goal: {line['goal']}){'' if line['met'] else ' NOT MET'}")
    return int(any(result["status"] != "done" for result in results["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
