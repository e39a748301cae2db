"""How long does decoding one Swin-L view take on one core, or one batch on a GPU?

    python -m benchmarks.codec.decode [--batch 32] [--device cuda]

Uses synthetic maps of 1536 x 7 x 7 with correlated channels and positions. They compress about as well as real layers
of that width: 39 KB per view with `transform`, compared with 34 KB for real layers (docs/CODECS.md). The lossless stage
turns a record into a row. Decoding turns rows into float32 maps and norms.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.harness import Measurement, argument_parser, publish_table, time_interleaved
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.transform_fit import ALWAYS_ROTATED, PRESETS, fit

SHAPE = (1536, 7, 7)
FITTED = 256
GPU_BATCH = 256
NAMES = ("int8", "transform", "transform-economy", ALWAYS_ROTATED)


def synthetic_maps(count: int, seed: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """(count, *shape) float32: channels mixed with a decaying spectrum, positions smoothed with their neighbors."""
    channels = shape[0]
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)) / channels**0.5
    spectrum = (1 + torch.arange(channels) / 12) ** -0.65
    draw = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    smooth = 0.6 * draw + 0.4 * torch.nn.functional.avg_pool2d(draw, 3, 1, 1, count_include_pad=False) * 3
    return torch.einsum("dc,bchw->bdhw", mixing * spectrum, smooth).contiguous() * 10


def fitted_codecs(
    shape: tuple[int, int, int] = SHAPE, fitted: int = FITTED, names: Sequence[str] = NAMES
) -> Iterator[tuple[str, FeatureCodec]]:
    """int8 and the transform codecs, fitted to `fitted` maps."""
    maps = synthetic_maps(fitted, 1, shape)
    for name in names:
        yield (
            name,
            make_codec(name, shape) if name == "int8" else fit(maps, PRESETS[name], rotated=name == ALWAYS_ROTATED),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--batch", type=int, help=f"views per batch (default 32, {GPU_BATCH} on a GPU)")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    batch = options.batch or (GPU_BATCH if gpu else 32)
    maps = synthetic_maps(batch, 2)
    seeds = torch.tensor([dither_seed(str(number), 0) for number in range(batch)])
    actions: dict[str, Callable[[], object]] = {}
    sizes = {}
    for name, codec in fitted_codecs():
        records = codec.pack(codec.encode(maps, seeds).numpy())
        placed = torch.from_numpy(codec.unpack(records)).to(device)
        sizes[name] = sum(map(len, records)) / batch

        def decode(codec: FeatureCodec = codec, placed: torch.Tensor = placed) -> None:
            codec.decode(placed)
            if gpu:
                torch.cuda.synchronize()

        actions[f"{name}, decode"] = decode
        actions[f"{name}, lossless"] = partial(codec.unpack, records)
        decode()
    seconds = time_interleaved(options.repeats, **actions)
    if not gpu:
        for name in sizes:
            pairs = zip(seconds[f"{name}, lossless"], seconds[f"{name}, decode"], strict=True)
            seconds[f"{name}, both"] = [sum(pair) for pair in pairs]
    figures = []
    for what, values in seconds.items():
        name, _, part = what.partition(", ")
        whole = gpu and part == "decode"
        scale = 1e3 if whole else 1e3 / batch
        goal = {"lossless": "0.1 ms", "decode": "5 ms per batch" if gpu else "", "both": "0.3 ms"}[part]
        figures.append(
            Measurement(
                what,
                statistics.median(values) * scale,
                (min(values) * scale, max(values) * scale),
                f"ms per batch of {batch}" if whole else "ms per view",
                f"{sizes[name]:,.0f} bytes per view",
                goal,
                "",
            )
        )
    publish_table(
        "codec-decode-gpu" if gpu else "codec-decode", figures, {"options": vars(options), "seconds": seconds}
    )


if __name__ == "__main__":
    main()
