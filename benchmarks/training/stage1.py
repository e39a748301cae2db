"""Is stage 1 as fast as the teacher? Compares images/s of cache-teacher with the plain forward pass.

    python -m benchmarks.training.stage1 [--teacher swin_tiny_patch4_window7_224] [--images 80] [--views 2]
        [--workers 1]

The plain teacher gets ready uint8 batches of the same shape and precision. Stage 1 decodes photographs, samples views,
encodes JPEG, runs the teacher, encodes features, writes, fsyncs and reads back. Both use the same number of threads.
"""

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Measurement, argument_parser, publish_table, time_interleaved
from benchmarks.photographs import write_photographs
from scalekd_cache.caching.job_plan import make_plan
from scalekd_cache.caching.make_units import make_units
from scalekd_cache.codec import make_codec
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.distributed import Process
from scalekd_cache.models.teacher import load_teacher

DEFAULTS: dict[str, tuple[Any, Any]] = {
    "teacher": ("swin_tiny_patch4_window7_224", "swin_large_patch4_window7_224"),
    "images": (80, 4096),
    "batch": (32, 256),
    "workers": (1, max(1, (os.cpu_count() or 2) - 1)),
}
"""Default on a CPU, default on a GPU."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cpu")
    for name, (cpu, gpu) in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(cpu), help=f"default {cpu}; on a GPU {gpu}")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of the teacher; each worker has its own thread")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args(argv)
    for name, values in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.device.startswith("cuda")])
    assert options.images * options.views % options.batch == 0, "images x views must be a multiple of the batch size"
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    process = Process(0, 1, device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = CacheTeacherConfig(
            data=DataConfig(source=str(write_photographs(folder / "data", options.images))),
            teacher=TeacherConfig(name=options.teacher, pretrained=False, batch_size=options.batch),
            cache=StoreConfig(path=str(folder / "cache"), num_views=options.views, views_per_group=options.views,
                              samples_per_shard=max(32, options.images // 3)),
        )  # fmt: skip
        source = open_source(config.data, "train")
        teacher = load_teacher(config.teacher, image_size=224, num_classes=2, device=device)
        job = make_plan(config, process, source, teacher, make_codec("int8", teacher.spec.feature_shape))
        ready = torch.randint(0, 256, (options.batch, 3, 224, 224), dtype=torch.uint8).to(device)
        rounds = iter(range(10_000))

        def stage1() -> None:
            stage = job.stage._replace(root=folder / f"round{next(rounds)}")
            with torch.no_grad():
                make_units(stage, job.units, iter(range(len(job.units))), options.workers, lambda unit: None)

        def bare() -> None:
            for _ in range(options.images * options.views // options.batch):
                teacher(ready)
            if device.type == "cuda":
                torch.cuda.synchronize()

        bare()
        seconds = time_interleaved(options.repeats, stage1=stage1, bare=bare)
    views = options.images * options.views
    rates = [b / a for a, b in zip(seconds["stage1"], seconds["bare"], strict=True)]
    goal = "0.97" if device.type == "cuda" else "0.93"
    rates_s = [f"{views / statistics.median(seconds[name]):.1f}" for name in ("stage1", "bare")]
    what = f"stage 1 / plain teacher, {options.teacher}, {options.threads} threads, {options.workers} workers"
    gap = "encodes and checks features on the same cores; restarts workers in each repeat"
    figure = Measurement(
        what,
        statistics.median(rates),
        (min(rates), max(rates)),
        "x",
        f"{rates_s[0]} vs {rates_s[1]} views/s",
        goal,
        gap,
    )
    publish_table(
        "stage1-gpu" if device.type == "cuda" else "stage1", [figure], {"options": vars(options), "seconds": seconds}
    )


if __name__ == "__main__":
    main()
