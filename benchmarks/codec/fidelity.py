"""How faithful, how small and how fast is each codec on real features?

    python -m benchmarks.codec.fidelity --cache DIR [--head teacher.safetensors] [--name demo] [--views 512]
    python -m benchmarks.codec.fidelity --features maps.npy --ids images.npy [--name tinyvit]

Features come from a cache of float32 or float16 features, or from a file of maps (N, C, H, W) float32 plus a file with
one image ID per map. Codecs are fitted on half of the images and measured on the other half. The bound is Gaussian
reverse water-filling on the spectrum of the held-out maps at each codec's mean squared error. The spectrum comes from a
2-D DCT followed by one KLT for the DC coefficient and one for all others, fitted to the held-out maps themselves. The
bound is computed twice: over plain values, and over values divided by the token's mean-removed norm, which is the error
that the losses see. Timings depend on the load of the machine: the load is printed, and each timing is also given
relative to int8 in the same run.
Writes benchmarks/results/codecs-<name>.json and .png.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.harness import RESULTS, argument_parser, pyplot, write_results
from scalekd_cache.codec import CODECS, codec_from_config, make_codec
from scalekd_cache.codec.base import FeatureCodec, feature_norms
from scalekd_cache.codec.dither import dither_seed
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.codec.logits import kl_divergence
from scalekd_cache.codec.transform import dct_matrix, token_scales
from scalekd_cache.codec.transform_fit import ALWAYS_ROTATED, PRESETS, ROTATED, fit
from scalekd_cache.store.reader import Cache

LEFT = ("float16", "bfloat16", "fp8")
"""Codecs whose label is plotted to the left of the point."""
NOISES = (0.0008, 0.005, 0.015)
TIMED_S = 0.6
"""Each timing is repeated for this many CPU seconds."""
COLUMNS = ("codec", "bytes", "vs int8", "bytes / R(D), normalized and plain", "cosine mean / p1",
           "mean-removed cosine mean / p1", "KL", "same top-1", "encode MB/s", "decode MB/s", "lossless, decode ms",
           "decode time vs int8")  # fmt: skip


def from_cache(root: Path, views: int) -> tuple[Tensor, np.ndarray]:
    """Maps of view 0 of a lossless cache, and one image ID per map."""
    cache = Cache.open(root)
    codec = codec_from_config(cache.manifest.facts.codec, cache.root)
    if codec.id not in ("float32", "float16"):
        raise SystemExit(f"{root} holds {codec.id} features; make a cache with CODEC=float32")
    count = min(views, len(cache))
    records = cache.read(np.linspace(0, len(cache) - 1, count).astype(np.int64), 0)
    rows = torch.from_numpy(codec.unpack([record.features for record in records]))
    return codec.decode(rows).features.contiguous(), np.arange(count)


def halves(maps: Tensor, ids: np.ndarray, views: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out maps; no image is in both."""
    draw = np.random.default_rng(0)
    images = draw.permutation(np.unique(ids))
    first = np.isin(ids, images[: len(images) // 2])
    chosen = [draw.permutation(np.flatnonzero(mask))[:views] for mask in (first, ~first)]
    return maps[torch.from_numpy(np.sort(chosen[0]))], maps[torch.from_numpy(np.sort(chosen[1]))]


def spectrum(maps: Tensor, scales: Tensor) -> Tensor:
    """Variances (T * C,) float64 of the KLT coefficients of maps divided by `scales` (B, T)."""
    _, channels, height, width = maps.shape
    values = maps.double().flatten(2) / torch.where(scales > 0, scales, 1.0).double()[:, None]
    values = (values - values.mean((0, 2), keepdim=True)).view(len(maps), channels, height, width)
    grid = torch.einsum("hy,wx,bcyx->bhwc", dct_matrix(height), dct_matrix(width), values).flatten(1, 2)
    parts = []
    for part in (grid[:, :1], grid[:, 1:]):
        flat = part.flatten(0, 1)
        vectors = torch.linalg.eigh(flat.T @ flat).eigenvectors
        parts.append((part @ vectors).square().mean(0).flatten())
    return torch.cat(parts)


def bound_bytes(variances: Tensor, error: float) -> float:
    """Bytes per view of Gaussian reverse water-filling at a mean squared error per coefficient."""
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        low, high = (low, level) if float(variances.clamp(max=level).mean()) > error else (level, high)
    return float((variances / high).clamp(min=1).log2().sum()) / 16


def seconds(work: Callable[[], object]) -> float:
    """Minimum CPU time over at least three runs."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < TIMED_S:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(
    codec: FeatureCodec, maps: Tensor, spectra: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor] | None
) -> dict:
    """One row of the table."""
    seeds = torch.tensor([dither_seed(str(number), 0) for number in range(len(maps))])
    rows = torch.cat([codec.encode(part, seed) for part, seed in zip(maps.split(64), seeds.split(64), strict=True)])
    records = codec.pack(rows.numpy())
    decoded = torch.cat([codec.decode(part).features for part in rows.split(64)])
    figures, scales = fidelity(maps, decoded), token_scales(feature_norms(maps))
    error = (decoded - maps).double()
    own = (error.flatten(2) / torch.where(scales > 0, scales, 1.0).double()[:, None]).square().mean()
    size, part = float(np.mean([len(record) for record in records])), maps[:32].contiguous()
    few, few_records, megabytes = rows[:32], records[:32], 32 * maps[0].numel() * 4 / 1e6
    row: dict[str, Any] = {
        "bytes": size,
        "bytes_at_swin_l": size * 75_264 / maps[0].numel(),
        "cosine": float(figures.cosine.mean()),
        "cosine_p1": float(np.percentile(figures.cosine, 1)),
        "cosine_mean_removed": float(figures.cosine_mean_removed.mean()),
        "cosine_mean_removed_p1": float(np.percentile(figures.cosine_mean_removed, 1)),
        "mse": float(error.square().mean()),
        "mse_normalised": float(own),
        "bound_ratio": size / bound_bytes(spectra[0], float(error.square().mean())) if float(own) else None,
        "bound_ratio_normalised": size / bound_bytes(spectra[1], float(own)) if float(own) else None,
        "encode_mb_per_s": megabytes / seconds(lambda: codec.pack(codec.encode(part, seeds[:32]).numpy())),
        "lossless_ms": seconds(lambda: codec.unpack(few_records)) / 32 * 1e3,
        "decode_ms": seconds(lambda: codec.decode(few)) / 32 * 1e3,
    }
    row["decode_mb_per_s"] = megabytes / 32 / (row["lossless_ms"] + row["decode_ms"]) * 1e3
    if head is not None:
        logits = [(maps.mean((2, 3)) @ head[0].T + head[1]), (decoded.mean((2, 3)) @ head[0].T + head[1])]
        row["kl"] = float(kl_divergence(logits[0].numpy(), logits[1].numpy()).mean())
        row["top1_agreement"] = float((logits[0].argmax(1) == logits[1].argmax(1)).double().mean())
    return row


def live_head(weights: Path | None) -> tuple[Tensor, Tensor] | None:
    """Classifier (weight, bias) from a teacher file, for teachers that pool and apply a linear layer, such as Swin."""
    if weights is None:
        return None
    state = load_file(str(weights))
    return state["head.fc.weight"], state["head.fc.bias"]


def plot(table: dict[str, dict], spectra: tuple[Tensor, Tensor], values: int, path: Path, title: str) -> None:
    """Plot bytes per view against the error that the losses see, with the bound."""
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(7.5, 5))
    lossy = {name: row for name, row in table.items() if row["mse_normalised"] > 0}
    variance = float(spectra[1].mean())
    errors = np.logspace(-8, -0.7, 60)
    axes.plot(
        [bound_bytes(spectra[1], error * variance) / 1e3 for error in errors], errors, "k-", label="Gaussian R(D) bound"
    )
    fitted = sorted(
        (row["bytes"] / 1e3, row["mse_normalised"] / variance)
        for name, row in lossy.items()
        if name.startswith("transform") and name != ALWAYS_ROTATED
    )
    axes.plot(*zip(*fitted, strict=True), "o-", color="tab:red", label="transform, by noise")
    for name, row in lossy.items():
        point = (row["bytes"] / 1e3, row["mse_normalised"] / variance)
        if not name.startswith("transform") or name == ALWAYS_ROTATED:
            axes.plot(*point, "s", color="tab:orange" if name == ALWAYS_ROTATED else "tab:blue")
        if "noise" not in name:
            left = name in LEFT
            shift, side = ((-6, 6), "right") if left else ((6, 5), "left")
            axes.annotate(name, point, textcoords="offset points", xytext=shift, ha=side, fontsize=9)
    axes.set(
        yscale="log",
        xlabel=f"kilobytes per view ({values:,} values), including norms and headers",
        ylabel="error / variance, tokens divided by their norm",
        title=title,
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--head", type=Path, help="the teacher's safetensors file, for KL and top-1 agreement")
    parser.add_argument("--name", default="demo")
    parser.add_argument("--views", type=int, default=512, help="maximum number of views to fit, and to measure")
    parser.add_argument("--measured", type=int, help="maximum number of views to measure (default: same as --views)")
    parser.add_argument(
        "--noises", type=float, nargs="*", default=NOISES, help="more operating points of the transform codec"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.features is not None:
        maps = torch.from_numpy(np.load(options.features, mmap_mode="c"))
        ids = np.load(options.ids) if options.ids else np.arange(len(maps))
    elif options.cache is not None:
        maps, ids = from_cache(options.cache, 2 * options.views)
    else:
        parser.error("give --cache or --features")
    first, held_out = halves(maps, ids, options.views)
    shape = (int(maps.shape[1]), int(maps.shape[2]), int(maps.shape[3]))
    scales = token_scales(feature_norms(held_out))
    spectra = (spectrum(held_out, torch.ones_like(scales)), spectrum(held_out, scales))
    of_bound = len(held_out)
    held_out = held_out[:: -(-len(held_out) // (options.measured or options.views))].contiguous()
    codecs: dict[str, FeatureCodec] = {name: make_codec(name, shape) for name in CODECS}
    codecs |= {name: fit(first, noise) for name, noise in PRESETS.items() if name != ALWAYS_ROTATED}
    if shape[0] > ROTATED:
        codecs[ALWAYS_ROTATED] = fit(first, PRESETS[ALWAYS_ROTATED], rotated=True)
    codecs |= {f"transform, noise {noise:g}": fit(first, noise) for noise in options.noises}
    head, table = live_head(options.head), {}
    for name, codec in codecs.items():
        table[name] = measure(codec, held_out, spectra, head)
        print(name, {key: value and round(value, 5) for key, value in table[name].items()}, flush=True)
    write(options.name, shape, (len(first), len(held_out), of_bound), table)
    title = f"{options.name}, {shape[0]} x {shape[1]} x {shape[2]}"
    plot(table, spectra, maps[0].numel(), RESULTS / f"codecs-{options.name}.png", title)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(markdown(table))


def write(name: str, shape: tuple[int, int, int], views: tuple[int, int, int], table: dict[str, dict]) -> None:
    """Write the results and the measurement conditions as JSON."""
    content = {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "timing": f"CPU time of one thread, minimum over runs of {TIMED_S:g} s, 32 views, warm",
        "shape": shape, "views_fitted": views[0], "views_measured": views[1], "views_of_bound": views[2],
        "codecs": table,
    }  # fmt: skip
    write_results(f"codecs-{name}", content)


def markdown(table: dict[str, dict]) -> str:
    """The results as a Markdown table, one row per codec."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    base = table["int8"]
    for name, row in table.items():
        ratios = "" if row["bound_ratio"] is None else f"{row['bound_ratio_normalised']:.2f} / {row['bound_ratio']:.2f}"
        live = (f"{row['kl']:.1e}", f"{100 * row['top1_agreement']:.1f}%") if "kl" in row else ("", "")
        cells = (
            name,
            f"{row['bytes']:,.0f}",
            f"{row['bytes'] / base['bytes']:.2f}",
            ratios,
            f"{row['cosine']:.5f} / {row['cosine_p1']:.5f}",
            f"{row['cosine_mean_removed']:.5f} / {row['cosine_mean_removed_p1']:.5f}",
            *live,
            f"{row['encode_mb_per_s']:,.0f}",
            f"{row['decode_mb_per_s']:,.0f}",
            f"{row['lossless_ms']:.3f}, {row['decode_ms']:.3f}",
            f"{base['decode_mb_per_s'] / row['decode_mb_per_s']:.1f}x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
