"""How many bytes do general-purpose codecs need for the fidelity of our codecs, on features of photographs?

    python -m benchmarks.peers.codecs [--views 1024] [--measured 128] [--features maps.npy --ids images.npy]

Features: TinyViT-5M (320 x 7 x 7) on random crops of seven photographs; half of the views are fitted, part of the other
half is measured. A second table fits four photographs and measures the other three, a strong domain shift. A coder
with a quality setting is measured at the setting where its mean mean-removed cosine equals that of `transform` and, in
the first table, of `transform-economy`. A coder without a setting, or with coarse settings (zfp: powers of two), is
compared with our transform at the mean cosine that it reaches. Every view is a separate record. Bytes include
everything that decoding needs except the fitted state; ours also include the norms of all tokens. Times are CPU ms per
view on one thread; ours process batches of 32 views, the others one view at a time.
Creates build/peers on first use (benchmarks/peers/environment.py). Takes 10 minutes.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Measurement, argument_parser, publish_table
from benchmarks.peers.coders import CODERS, Coder
from benchmarks.peers.environment import restart_with_peers, versions
from scalekd_cache.codec import make_codec
from scalekd_cache.codec.base import FeatureCodec
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.transform_fit import PRESETS, codec_for_noise, fit_moments

PACKAGES = ("zstandard", "zfpy", "pysz", "imagecodecs", "scikit-learn")
BISECTIONS, ENOUGH, CLOSE = 14, 0.002, 0.01
"""Halvings of the interval of a setting; relative difference of 1 - cosine that ends them, and that counts as equal."""
BATCH = 32


class Found(NamedTuple):
    """A coder at one setting."""

    bytes: float
    """Mean a view."""
    cosine: float
    """Mean of the mean-removed cosine."""
    cosine_p1: float
    encode_ms: float
    decode_ms: float
    setting: float


def measure_codec(codec: FeatureCodec, maps: Tensor, setting: float = 0.0) -> Found:
    """One of our codecs, in batches."""
    seeds = torch.tensor([dither_seed(str(number), 0) for number in range(len(maps))])
    start = time.process_time()
    parts = zip(maps.split(BATCH), seeds.split(BATCH), strict=True)
    records = [record for part, seed in parts for record in codec.pack(codec.encode(part, seed).numpy())]
    middle = time.process_time()
    batches = [records[at : at + BATCH] for at in range(0, len(records), BATCH)]
    decoded = torch.cat([codec.decode(torch.from_numpy(codec.unpack(batch))).features for batch in batches])
    return _found(maps, decoded, list(map(len, records)), (start, middle, time.process_time()), setting)


def measure_coder(coder: Coder, maps: Tensor, setting: float) -> Found:
    """Another coder, one view at a time."""
    views, start = tokens_of(maps), time.process_time()
    records = [coder.encode(view, setting) for view in views]
    middle = time.process_time()
    decoded = np.stack([coder.decode(record, setting) for record in records])
    times = (start, middle, time.process_time())
    back = torch.from_numpy(np.ascontiguousarray(decoded.transpose(0, 2, 1))).view(maps.shape)
    return _found(maps, back, list(map(len, records)), times, setting)


def _found(maps: Tensor, decoded: Tensor, sizes: list[int], times: tuple[float, ...], setting: float) -> Found:
    cosines = fidelity(maps, decoded).cosine_mean_removed.numpy()
    encode, decode = (1e3 * seconds / len(maps) for seconds in np.diff(times))
    return Found(
        float(np.mean(sizes)), float(cosines.mean()), float(np.percentile(cosines, 1)), encode, decode, setting
    )


def tokens_of(maps: Tensor) -> np.ndarray:
    """(N, C, H, W) to (N, T, C) contiguous."""
    return np.ascontiguousarray(maps.flatten(2).transpose(1, 2).numpy())


def at_cosine(measure: Callable[[float], Found], settings: tuple[float, float], cosine: float) -> Found:
    """The coder at the setting that gives this mean cosine; a setting with more error costs fewer bytes."""
    low, high = map(math.log, settings)
    for _ in range(BISECTIONS):
        found = measure(math.exp((low + high) / 2))
        if abs(found.cosine - cosine) < ENOUGH * (1 - cosine):
            break
        low, high = (math.log(found.setting), high) if found.cosine > cosine else (low, math.log(found.setting))
    return found


def noise_of(cosine: float) -> float:
    """The noise at which our transform has this mean-removed cosine."""
    return 1 / cosine**2 - 1


def compare(fitted: Tensor, measured: Tensor, presets: Sequence[str]) -> tuple[dict[str, Found], dict[str, Found]]:
    """All coders: as found, and our transform at the same mean cosine, by name."""
    shape = (int(fitted.shape[1]), int(fitted.shape[2]), int(fitted.shape[3]))
    moments = fit_moments(fitted)

    def transform(noise: float) -> Found:
        return measure_codec(codec_for_noise(moments, fitted, noise), measured, noise)

    targets = {preset: transform(PRESETS[preset]) for preset in presets}
    found, ours = dict(targets), {}

    def add(coder: str, row: Found, preset: str = "") -> None:
        target = targets.get(preset)
        if target is not None and abs(row.cosine - target.cosine) <= CLOSE * (1 - target.cosine):
            name, same = f"{coder} / {preset}", target
        else:
            near = f" near {preset}" if preset else ""
            name, same = f"{coder}{near} / transform at its cosine", transform(max(noise_of(row.cosine), 1e-6))
        found[name], ours[name] = row, same
        print(name, row, flush=True)

    for name in ("int8", "int4"):
        add(name, measure_codec(make_codec(name, shape), measured))
    for make in CODERS:
        coder = make(tokens_of(fitted))
        measure = partial(measure_coder, coder, measured)
        if coder.settings is None:
            add(coder.name, measure(0.0))
        for preset, target in targets.items() if coder.settings else ():
            add(coder.name, at_cosine(measure, coder.settings, target.cosine), preset)
    return found, ours


def rows(found: dict[str, Found], ours: dict[str, Found]) -> list[Measurement]:
    """Table rows: bytes of our presets, and bytes of the others as multiples of our transform's."""
    table = []
    for name, row in found.items():
        rates = (
            f"{row.bytes:,.0f} bytes; cosine {row.cosine:.5f} / {row.cosine_p1:.5f}; encode {row.encode_ms:.2f}, "
            f"decode {row.decode_ms:.2f} ms"
        )
        same = ours.get(name)
        if same is None:
            table.append(Measurement(name, row.bytes / 1000, None, "KB", rates, "", ""))
        else:
            rates += f"; transform {same.bytes:,.0f} bytes, p1 {same.cosine_p1:.5f}"
            table.append(Measurement(name, row.bytes / same.bytes, None, "x", rates, "above 1", ""))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--views", type=int, default=1024, help="views in all; half of them are fitted")
    parser.add_argument("--measured", type=int, default=128, help="views that are measured")
    parser.add_argument("--features", type=Path, help="maps (N, C, 7, 7) float32 to use instead")
    parser.add_argument("--ids", type=Path, help="the image of each map")
    options = parser.parse_args(argv)
    restart_with_peers("benchmarks.peers.codecs")
    from benchmarks.peers.photograph_features import features

    torch.set_num_threads(1)
    if options.features:
        maps, ids = torch.from_numpy(np.load(options.features)), np.load(options.ids)
    else:
        maps, ids = features(options.views)
    fitted, others = maps[: len(maps) // 2], maps[len(maps) // 2 :]
    new = torch.from_numpy(ids > np.median(ids))
    tables = {
        "peers-codecs": (fitted, others, ("transform", "transform-economy")),
        "peers-codecs-shift": (maps[~new], maps[new], ("transform",)),
    }
    for name, (first, held_out, presets) in tables.items():
        held_out = held_out[:: max(1, len(held_out) // options.measured)][: options.measured].contiguous()
        found, ours = compare(first.contiguous(), held_out, presets)
        raw = {"fitted": len(first), "measured": len(held_out), "shape": list(maps.shape[1:]),
               "found": {key: row._asdict() for key, row in found.items()},
               "ours": {key: row._asdict() for key, row in ours.items()}}  # fmt: skip
        source = options.features.name if options.features else "TinyViT-5M on crops of photographs"
        note = f"{source}: fitted on {len(first)} views, measured on {len(held_out)}; {versions(*PACKAGES)}."
        publish_table(name, rows(found, ours), raw, note=note)


if __name__ == "__main__":
    main()
