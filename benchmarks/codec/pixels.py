"""How many bytes does a view take in each image format, and how much does the format change the teacher's features?

    python -m benchmarks.codec.pixels --weights mobile_sam.pt [--data DIR] [--recipes traditional cifar10]
    python -m benchmarks.codec.pixels --teacher demo_swin --weights FILE --data demo --recipes demo --name pixels-demo

Stage 1's own code samples the views from photographs (default: scikit-learn's two, `benchmarks/photographs.py`).
Each format encodes and decodes them:

- bytes per view; PSNR and SSIM against the view before encoding
- CPU time of encoding and of decoding, one thread, as ratios to JPEG 90. All formats take turns in one run. Each is
  decoded by the fastest decoder found (JPEG, WebP and PNG: stage 1's own code; AVIF: Pillow; JPEG XL: imagecodecs).
- feature change: how far the teacher's feature map of the decoded view is from that of the view before encoding
  (1 - mean-removed cosine). Teacher and student see the same decoded pixels, so this is not an error of the targets.
  It measures how much the stored views differ from uncompressed ones, which the published method trains on.

Formats are compared by their bytes at the feature change of JPEG 90, interpolated between the qualities of a format.
JPEG XL needs the package imagecodecs and is omitted without it.
Writes benchmarks/results/<name>.json and .png, and prints the tables of docs/CODECS.md.
"""

import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import RESULTS, argument_parser, pyplot, time_interleaved, write_results
from benchmarks.photographs import write_photographs
from benchmarks.study.finetune_teacher import read_weights
from scalekd_cache.caching.sample_views import spread_views
from scalekd_cache.codec.fidelity import fidelity
from scalekd_cache.config.base import from_plain
from scalekd_cache.config.recipes import recipe_section
from scalekd_cache.config.stage1 import DataConfig, TeacherConfig, ViewConfig
from scalekd_cache.data.source import open_source
from scalekd_cache.models.teacher import Teacher, load_teacher
from scalekd_cache.views.pixels import decode_pixels

Pixels = NDArray[np.uint8]
BASE = ("JPEG 4:2:0", 90)
"""Today's default: the baseline of all ratios."""
SLOWEST = 2.0
"""A format may take this many times JPEG's decoding time."""
TIMED, BATCH = 32, 16
"""Views that are timed; views per forward pass of the teacher."""


class Format(NamedTuple):
    """One quality of an image format."""

    family: str
    """The format with its fixed options; its qualities form a curve of bytes against feature change."""
    quality: int
    encode: Callable[[Image.Image], bytes]
    decode: Callable[[bytes], Pixels]

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.family}, {self.quality}"


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The file that Pillow writes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def read_by_pillow(data: bytes) -> Pixels:
    """(size, size, 3) uint8."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture)


def custom_table(low: int, rise: int) -> list[int]:
    """A JPEG quantization table that rises linearly with the frequency, from `low` to `low` x (1 + `rise`)."""
    return [round(low * (1 + rise * (row + column) / 14)) for row in range(8) for column in range(8)]


def formats(size: int) -> Iterator[Format]:
    """Every format at every quality; JPEG XL only if imagecodecs is installed."""
    read = partial(decode_pixels, size=size)

    def save(kind: str, **options: Any) -> Callable[[Image.Image], bytes]:
        return partial(saved, kind=kind, **options)

    for quality in (70, 80, 85, 90, 95):
        yield Format("JPEG 4:2:0", quality, save("JPEG", quality=quality, subsampling="4:2:0"), read)
        yield Format("JPEG 4:4:4", quality, save("JPEG", quality=quality, subsampling="4:4:4"), read)
    for quality in (80, 85, 90, 95):
        yield Format("JPEG, optimized Huffman codes", quality, save("JPEG", quality=quality, optimize=True), read)
        yield Format("JPEG, progressive", quality, save("JPEG", quality=quality, progressive=True), read)
    for low in (12, 8, 6):
        tables = [custom_table(low, 0)] * 2
        yield Format("JPEG, flat table, optimized", low, save("JPEG", qtables=tables, optimize=True), read)
    for low in (4, 3, 2):
        tables = [custom_table(low, 8)] * 2
        yield Format("JPEG, table rising 9 times, optimized", low, save("JPEG", qtables=tables, optimize=True), read)
    for quality in (75, 80, 85, 90, 95):
        for method in (0, 4):
            yield Format(f"WebP, method {method}", quality, save("WEBP", quality=quality, method=method), read)
    for quality in (75, 85, 92):
        for speed in (10, 8):
            options = {"quality": quality, "speed": speed, "max_threads": 1}
            yield Format(f"AVIF, speed {speed}", quality, save("AVIF", **options), read_by_pillow)
    yield from jpeg_xl()
    yield Format("PNG", 100, save("PNG", compress_level=3), read)


def jpeg_xl() -> Iterator[Format]:
    """JPEG XL, and JPEG files recompressed without loss to it."""
    try:
        codecs = importlib.import_module("imagecodecs")
    except ModuleNotFoundError:
        return
    decode = partial(codecs.jpegxl_decode, numthreads=1)

    def encode(picture: Image.Image, quality: int, effort: int) -> bytes:
        return bytes(codecs.jpegxl_encode(np.array(picture), level=quality, effort=effort, numthreads=1))

    def recompress(picture: Image.Image, quality: int) -> bytes:
        return bytes(codecs.jpegxl_encode_jpeg(saved(picture, "JPEG", quality=quality)))

    for quality in (85, 90, 95):
        for effort in (1, 7):
            yield Format(f"JPEG XL, effort {effort}", quality, partial(encode, quality=quality, effort=effort), decode)
        yield Format("JPEG XL of a JPEG", quality, partial(recompress, quality=quality), decode)


def sample_views(data: str, recipe: str, count: int) -> Tensor:
    """(count, 3, size, size) uint8 views of the recipe, before any encoding."""
    views = {**recipe_section(recipe, "cache")["views"], "pixels": "replayed"}
    source = open_source(DataConfig(source=data), "train")
    return torch.cat([item.pixels for item in spread_views(source, ViewConfig(**from_plain(views)), (0,), count)])


def open_teacher(name: str, weights: Path, size: int, folder: Path) -> Teacher:
    """The teacher, without a classifier; mobile_sam.pt is converted to timm's names first."""
    if weights.suffix != ".safetensors":
        state, weights = read_weights(weights), folder / "teacher.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, weights)
    config = TeacherConfig(name=name, weights=str(weights), precision="float32")
    return load_teacher(config, image_size=size, num_classes=0, device=torch.device("cpu"))


def features(teacher: Teacher, views: Tensor) -> Tensor:
    """(B, C, H, W) float32."""
    return torch.cat([teacher(part).features for part in views.split(BATCH)])


def ssim(original: Tensor, decoded: Tensor) -> float:
    """Mean structural similarity of luma (Wang et al., 2004), windows of 7 x 7, data range 255."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = ((images.double() * weights).sum(1, keepdim=True) for images in (original, decoded))
    mean = partial(F.avg_pool2d, kernel_size=7, stride=1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def effect(one: Format, pictures: Sequence[Image.Image], views: Tensor, teacher: Teacher, maps: Tensor) -> dict:
    """Bytes of a format and what it changes."""
    files = [one.encode(picture) for picture in pictures]
    decoded = torch.from_numpy(np.stack([one.decode(data) for data in files])).permute(0, 3, 1, 2).contiguous()
    error = (decoded.double() - views.double()).square().mean((1, 2, 3)).clamp(min=1e-3)
    change = 1 - fidelity(maps, features(teacher, decoded)).cosine_mean_removed.double()
    return {
        "family": one.family,
        "quality": one.quality,
        "bytes": statistics.mean(map(len, files)),
        "psnr_db": float((10 * torch.log10(255**2 / error)).mean()),
        "ssim": ssim(views, decoded),
        "feature_change": float(change.mean()),
        "feature_change_p99": float(np.percentile(change, 99)),
    }


def times(formats: Sequence[Format], pictures: Sequence[Image.Image], repeats: int) -> dict[str, dict[str, float]]:
    """Median over the repeats of each format's CPU time over that of JPEG 90, and JPEG 90's own in ms."""

    def each(action: Callable[[Any], object], items: Sequence[Any]) -> Callable[[], None]:
        return lambda: [action(item) for item in items] and None

    base, found = f"{BASE[0]}, {BASE[1]}", {one.name: {} for one in formats}
    files = {one.name: [one.encode(picture) for picture in pictures] for one in formats}
    for what, rounds, actions in (
        ("encode", 2, {one.name: each(one.encode, pictures) for one in formats}),
        ("decode", repeats, {one.name: each(one.decode, files[one.name]) for one in formats}),
    ):
        seconds = time_interleaved(rounds, clock=time.process_time, **actions)
        for name, own in seconds.items():
            ratios = [mine / other for mine, other in zip(own, seconds[base], strict=True)]
            found[name][f"{what}_ratio"] = statistics.median(ratios)
            found[name][f"{what}_ratio_min_max"] = [min(ratios), max(ratios)]
            found[name][f"{what}_ms"] = statistics.median(own) / len(pictures) * 1e3
    return found


def at_equal_change(rows: Sequence[dict]) -> dict[str, dict]:
    """Of each family, bytes and times at the feature change of JPEG 90: interpolated over the logarithm of the change.

    Families whose qualities are all above or all below that change are left out.
    """
    goal = next(row["feature_change"] for row in rows if (row["family"], row["quality"]) == BASE)
    base, found = next(row["bytes"] for row in rows if (row["family"], row["quality"]) == BASE), {}
    for family in dict.fromkeys(row["family"] for row in rows):
        curve = sorted((row for row in rows if row["family"] == family), key=lambda row: row["feature_change"])
        changes = [row["feature_change"] for row in curve]
        if not changes[0] <= goal <= changes[-1]:
            continue

        def at(name: str, changes: list[float] = changes, curve: list[dict] = curve) -> float:
            values = np.log([row[name] for row in curve])
            return float(np.exp(np.interp(np.log(goal), np.log(changes), values)))

        found[family] = {name: at(name) for name in ("bytes", "encode_ratio", "decode_ratio", "feature_change_p99")}
        found[family] |= {"bytes_ratio": found[family]["bytes"] / base}
        found[family] |= {"psnr_db": float(np.interp(np.log(goal), np.log(changes), [row["psnr_db"] for row in curve]))}
    return found


def summary_table(found: dict[str, dict]) -> str:
    """Formats at the feature change of JPEG 90, as Markdown."""
    lines = ["| format | bytes | of JPEG 90 | PSNR, dB | encoding time | decoding time | fast enough |",
             "|---|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    for family, row in found.items():
        lines.append(
            f"| {family} | {row['bytes']:,.0f} | {row['bytes_ratio']:.2f} | {row['psnr_db']:.1f} | "
            f"{row['encode_ratio']:.1f}x | {row['decode_ratio']:.1f}x | "
            f"{'yes' if row['decode_ratio'] <= SLOWEST else 'no'} |"
        )
    return "\n".join(lines)


def full_table(rows: Sequence[dict]) -> str:
    """Every format and quality, as Markdown."""
    base = next(row["bytes"] for row in rows if (row["family"], row["quality"]) == BASE)
    lines = ["| format, quality | bytes | of JPEG 90 | PSNR, dB | SSIM | feature change, mean / p99 | encode, decode |",
             "|---|---:|---:|---:|---:|---|---|"]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['family']}, {row['quality']} | {row['bytes']:,.0f} | {row['bytes'] / base:.2f} | "
            f"{row['psnr_db']:.1f} | {row['ssim']:.4f} | {row['feature_change']:.4f} / "
            f"{row['feature_change_p99']:.4f} | {row['encode_ratio']:.1f}x, {row['decode_ratio']:.1f}x |"
        )
    return "\n".join(lines)


def plot(tables: dict[str, dict], path: Path) -> None:
    """Plot bytes against feature change, one panel per recipe."""
    plt = pyplot()
    rows = len(tables) // 2 + 1  # the last panel holds the legend
    figure, panels = plt.subplots(rows, 2, figsize=(13, 5 * rows), squeeze=False)
    for axes in panels.flat[len(tables) :]:
        axes.set_axis_off()
    for axes, (recipe, table) in zip(panels.flat, tables.items(), strict=False):
        for number, family in enumerate(dict.fromkeys(row["family"] for row in table["formats"])):
            curve = [row for row in table["formats"] if row["family"] == family and row["feature_change"] > 1e-5]
            style = "o-" if family.startswith("JPEG") else "s--"
            points = sorted((row["bytes"] / 1e3, row["feature_change"]) for row in curve)
            if len(points) > 1:
                axes.plot(
                    *zip(*points, strict=True), style, color=plt.cm.tab20(number % 20), label=family, markersize=4
                )
        axes.set(yscale="log", xlabel="kilobytes per view", ylabel="feature change (1 - mean-removed cosine)")
        axes.set_title(f"{recipe}, {table['size']} px")
        axes.grid(alpha=0.3)
    panels[-1][-1].legend(*panels[0][0].get_legend_handles_labels(), loc="center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(recipe: str, data: str, options: Any, folder: Path) -> dict:
    """All formats on views of one recipe."""
    views = sample_views(data, recipe, options.views)
    size = views.shape[-1]
    pictures = [Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()) for view in views]
    teacher, chosen = open_teacher(options.teacher, options.weights, size, folder), list(formats(size))
    timings = times(chosen, pictures[:TIMED], options.repeats)
    maps, rows = features(teacher, views), []
    for one in chosen:
        rows.append({**effect(one, pictures, views, teacher, maps), **timings[one.name]})
        print(
            one.name, {key: round(value, 4) for key, value in rows[-1].items() if isinstance(value, float)}, flush=True
        )
    return {"size": size, "views": len(views), "at_equal_feature_change": at_equal_change(rows), "formats": rows}


def main() -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="mobile_sam.pt, or safetensors of the teacher")
    parser.add_argument("--teacher", default="tiny_vit_5m_224", help="timm model, or demo_swin")
    parser.add_argument("--data", help="a folder with train/<class>/*.jpg, or demo (default: generated photographs)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["traditional", "cifar10", "cifar10-small"],
        help="recipes that give the views",
    )
    parser.add_argument("--name", default="pixels", help="name of the results file")
    parser.add_argument("--views", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7, help="rounds of decoding")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or str(write_photographs(folder / "data", options.views))
        facts = {"teacher": options.teacher, "weights": options.weights.name, "data": options.data or "photographs"}
        tables: dict[str, dict] = {}
        for recipe in options.recipes:
            tables[recipe] = measure(recipe, data, options, folder)
            write_results(options.name, {**facts, "recipes": tables})  # a recipe takes minutes
    plot(tables, RESULTS / f"{options.name}.png")
    for recipe, table in tables.items():
        print(f"\n{recipe}, {table['size']} px\n\n{summary_table(table['at_equal_feature_change'])}")
        print(f"\n{full_table(table['formats'])}")


if __name__ == "__main__":
    main()
