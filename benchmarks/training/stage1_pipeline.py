"""How many views/s does the main process of stage 1 handle if teacher, codec and image decoding cost nothing?

    python -m benchmarks.training.stage1_pipeline [--images 512] [--views 4] [--batch 128] [--repeats 5]

One worker process sends precomputed views (224 px, 16.6 KB of JPEG). A mock teacher and feature codec return
precomputed tensors of Swin-L's shapes. The rest is stage 1's own code: receive, stack, encode 1,000 logits, append to
the shards. In a real job, a commit (fsync, sha256, read-back) runs in the background; it is timed separately.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.harness import Measurement, argument_parser, publish_table
from scalekd_cache.caching import encode_batch, make_units, sample_views
from scalekd_cache.caching.sample_views import EncodedView, SampledViews, Unit
from scalekd_cache.codec.base import EncodedRows
from scalekd_cache.codec.fidelity import Fidelity
from scalekd_cache.codec.int8 import Int8Codec
from scalekd_cache.codec.logits import DenseLogits
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.data.base import SampleRef
from scalekd_cache.models.teacher import TeacherOutput

SHAPE, CLASSES, PIXELS, JPEG_BYTES = (1536, 7, 7), 1000, 224, 16_600
UNITS = 2
READY = 16
"""Images that the worker sends repeatedly."""


class ReadyViews(Dataset[list[SampledViews]]):
    """Replaces stage 1's `ViewDataset` with ready views that a worker only sends."""

    def __init__(self, views: int) -> None:
        self.pixels = torch.randint(0, 256, (READY, views, 3, PIXELS, PIXELS), dtype=torch.uint8)
        view = '{"box":[10,20,300,200],"flip":true,"ops":[]}'
        self.encoded = [EncodedView(os.urandom(JPEG_BYTES), view, f"{number:016x}") for number in range(views)]

    def __getitem__(self, place: tuple[int, Sequence[int]]) -> list[SampledViews]:
        return [self._image(place[0], index) for index in place[1]]

    def _image(self, unit: int, index: int) -> SampledViews:
        sample = SampleRef(f"class/{index:08d}", index % CLASSES)
        return SampledViews(unit, sample, f"{index:064x}", self.pixels[index % READY], self.encoded, "")


class FreeTeacher:
    """Ready features and logits."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.zeros(batch, 1, 1, 1)  # the values are unused
        self.logits = torch.randn(batch, CLASSES, generator=generator)
        self.logits[:, 0] += 9  # about the confidence of a trained teacher

    def __call__(self, images: Tensor) -> TeacherOutput:
        """The same output for all images."""
        return TeacherOutput(self.features[: len(images)], self.logits[: len(images)], self.logits[: len(images), :0])


class FreeCodec(Int8Codec):
    """An int8 codec with ready rows; in a real job the device encodes them."""

    def __init__(self, batch: int) -> None:
        super().__init__(SHAPE)
        self.rows = torch.randint(0, 256, (batch, self.bytes_per_view), dtype=torch.uint8)

    def encode_rows(self, features: Tensor, seeds: Tensor | None = None) -> EncodedRows:
        """Ready rows."""
        return EncodedRows(self.rows[: len(features)], torch.ones(len(features), dtype=torch.bool))


def free_similarity(codec: FreeCodec, features: Tensor, codes: Tensor) -> Fidelity:
    """Constant values of one."""
    return Fidelity(torch.ones(len(features)), torch.ones(len(features)))


class Timing(NamedTuple):
    """Seconds of one run."""

    fill_s: float
    """Receive, stack, logits, append."""
    fill_cpu_s: float
    """CPU time of the main process in `fill_s`, all threads; less sensitive to load on the machine."""
    commit_s: float


def run(root: Path, images: int, views: int, batch: int) -> Timing:
    """Fill and commit `UNITS` units; the worker starts before."""
    stage: Any = make_units.Stage(
        root=root, backend="webdataset", fingerprint="0" * 64, source=None, views=ViewConfig(size=PIXELS),  # type: ignore[arg-type]
        teacher=FreeTeacher(batch), codec=FreeCodec(batch), logit_codec=DenseLogits(CLASSES),  # type: ignore[arg-type]
        batch_size=batch, device=torch.device("cpu"), versions={},
    )  # fmt: skip
    units = [
        Unit(group=0, range_id=number, positions=range(number * images, (number + 1) * images), views=(*range(views),))
        for number in range(UNITS + 1)
    ]
    source: Any = mock.Mock(order=lambda group: np.arange((UNITS + 1) * images))
    ready = ReadyViews(views)
    with mock.patch.object(sample_views, "ViewDataset", return_value=ready):
        items = sample_views.views_of_units(source, stage.views, units, iter(range(len(units))), 1)
        items = itertools.chain([next(items)], items)  # the worker starts
    buffers = encode_batch.PixelBuffers(stage.device)
    fill_s, fill_cpu_s, commit_s = 0.0, 0.0, 0.0
    with mock.patch.object(encode_batch, "compare", free_similarity), torch.no_grad():
        for number, unit in enumerate(units):  # the first unit is not timed
            part = itertools.islice(items, images)
            started, cpu = time.perf_counter(), time.process_time()
            [(writer, figures)] = make_units.fill_unit([stage], unit, part, buffers=buffers)
            filled, cpu = time.perf_counter(), time.process_time() - cpu
            writer.commit(figures)
            if number:
                fill_s += filled - started
                fill_cpu_s += cpu
                commit_s += time.perf_counter() - filled
    return Timing(fill_s, fill_cpu_s, commit_s)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=512, help="images per unit")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = [
            run(Path(name) / str(number), options.images, options.views, options.batch)
            for number in range(options.repeats)
        ]
    views = UNITS * options.images * options.views
    fill, cpu, commit = ([views / seconds for seconds in column] for column in zip(*found, strict=True))
    what = f"stage 1 with a free teacher: {{}} ({options.views} views, batch {options.batch})"
    figures = [
        Measurement(what.format(part), statistics.median(rates), (min(rates), max(rates)), "views/s", "", goal, gap)
        for part, rates, goal, gap in (
            ("receive, stack, logits, append", fill, "4,000", "one Python process; copies of pixels and rows"),
            ("the same, views per CPU second", cpu, "", ""),
            ("commit: fsync, sha256, read-back", commit, "", "runs in threads during the next unit"),
        )
    ]
    publish_table("stage1-pipeline", figures, {"options": vars(options), "seconds": found})


if __name__ == "__main__":
    main()
