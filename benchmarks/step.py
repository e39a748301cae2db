"""What does a distillation step cost beside the student alone, and does the cache hold it up?

    python -m benchmarks.step [--pair resnet18 swin_tiny_patch4_window7_224 8] [--repeats 4] [--device cuda]

One process without DeepSpeed, SGD, the same micro-batch for all, in turn:
alone (labels only); free (ScaleKD heads and random targets that lie on the device); cached (targets and pixels from a
cache, through the real loader); live (pixels from the cache, the teacher runs); teacher (its forward pass alone).
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.loader import make_cache
from benchmarks.measure import Figure, in_turn, publish, ratio
from benchmarks.photographs import write_photographs
from scalekd_cache.codec import make_codec
from scalekd_cache.config import DistillConfig, OptimConfig, StudentConfig, TeacherConfig, TrainConfig
from scalekd_cache.costs import pair_costs
from scalekd_cache.distill import make_heads, tail_of
from scalekd_cache.engine import DistillModel
from scalekd_cache.loader import CacheLoader
from scalekd_cache.optimization import make_optimizer
from scalekd_cache.order import Order
from scalekd_cache.scalekd import Targets
from scalekd_cache.store import Cache
from scalekd_cache.student import build_student
from scalekd_cache.teacher import Teacher, load_teacher
from scalekd_cache.teacher_spec import TeacherSpec

PAIRS = [("resnet18", "swin_tiny_patch4_window7_224", 8), ("mobilenetv1_100", "swin_tiny_patch4_window7_224", 8)]
GPU_PAIRS = [(student, "swin_large_patch4_window7_224", 256) for student in
             ("resnet50", "mobilenetv1_100", "vit_small_patch16_224")]  # fmt: skip


def forever(cache: Cache, batch: int, workers: int) -> CacheLoader:
    """More micro-batches than a benchmark asks for."""
    order = Order(num_samples=len(cache), block=64, window=32, seed=0)
    return CacheLoader(cache, order, epochs=100_000, global_batch=batch, micro_batch=batch, workers=workers)


def steps(student_name: str, teacher_name: str, batch: int, cache: Cache, device: torch.device,
          workers: int) -> dict[str, Callable[[], None]]:  # fmt: skip
    """One optimizer step of each kind, on one model with heads and one without."""
    manifest = cache.manifest
    config = DistillConfig(
        student=StudentConfig(name=student_name), optim=OptimConfig(name="sgd", lr=0.01, base_batch_size=batch),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=batch),
    )  # fmt: skip
    classes = len(manifest.class_names)
    spec = TeacherSpec.from_json(manifest.teacher["spec"])
    tail = tail_of(cache, spec).to(device)
    teacher = load_teacher_of(teacher_name, classes, device)
    exact = make_codec("float32", spec.feature_shape)
    both = []
    for with_heads in (False, True):
        student = build_student(config.student, num_classes=classes, image_size=manifest.view_recipe["size"])
        heads = make_heads(config, student, tail) if with_heads else None
        model = DistillModel(config, student, heads).to(device).train()
        both.append((model, make_optimizer(model, config.optim, 0.01)))
    batches = iter(forever(cache, batch, workers))
    loader = forever(cache, batch, workers)
    first = next(iter(loader)).to(device)
    free = Targets(torch.randn(batch, *spec.feature_shape, device=device),
                   torch.ones(batch, 2, *spec.feature_shape[1:], device=device),
                   torch.randn(batch, classes, device=device))  # fmt: skip

    def step(which: int, targets: Targets | None, images: torch.Tensor, labels: torch.Tensor) -> None:
        model, optimizer = both[which]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(images, labels, targets, tail).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def cached() -> None:
        loaded = next(batches).to(device)
        targets = Targets(*loader.codec.decode(loaded.codes), loaded.logits.float())
        step(1, targets, loaded.images, loaded.labels)

    def live() -> None:
        loaded = next(batches).to(device)
        features, logits = teacher(loaded.images)
        targets = Targets(*exact.decode(exact.encode(features)), logits)
        step(1, targets, loaded.images, loaded.labels)

    def forward() -> None:
        teacher(first.images)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return {"alone": lambda: step(0, None, first.images, first.labels),
            "free": lambda: step(1, free, first.images, first.labels),
            "cached": cached, "live": live, "teacher": forward}  # fmt: skip


def load_teacher_of(name: str, classes: int, device: torch.device) -> Teacher:
    """The teacher that made the cache (random weights)."""
    torch.manual_seed(0)
    return load_teacher(TeacherConfig(name=name, pretrained=False), image_size=224, num_classes=classes, device=device)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs=3, action="append", metavar=("STUDENT", "TEACHER", "BATCH"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    pairs = [(s, t, int(b)) for s, t, b in options.pair or []] or (GPU_PAIRS if device.type == "cuda" else PAIRS)
    figures: list[Figure] = []
    raw = {}
    for student, teacher, batch in pairs:
        with tempfile.TemporaryDirectory() as name:
            count = max(options.images, batch)
            data = write_photographs(Path(name) / "data", count)
            cache = make_cache(Path(name) / "cache", data, count, teacher)
            actions = steps(student, teacher, batch, cache, device, options.workers)
            for action in actions.values():
                action()
            seconds = in_turn(options.repeats, **actions)
        raw[f"{student} {teacher}"] = seconds
        ceiling = pair_costs(teacher, student).ceiling
        pair = f"{student}, {teacher.partition('_patch')[0]}"
        figures += figures_of(pair, batch, seconds, ceiling, gpu=device.type == "cuda")
    publish("step-gpu" if device.type == "cuda" else "step", figures, {"pairs": pairs, "seconds": raw})


def figures_of(pair: str, batch: int, seconds: dict[str, list[float]], ceiling: float, *, gpu: bool) -> list[Figure]:
    """The table's rows of a pair."""
    cost = {name: statistics.median(values) for name, values in seconds.items()}
    over = [a / b for a, b in zip(seconds["cached"], seconds["free"], strict=True)]
    parts = ", ".join(f"{name} {1e3 * value / batch:.1f}" for name, value in cost.items())
    limit = (cost["free"] + cost["teacher"]) / cost["free"]
    gain = [a / b for a, b in zip(seconds["live"], seconds["cached"], strict=True)]
    rows = [Figure(f"{pair}: cached / free targets", statistics.median(over), (min(over), max(over)), "x",
                   f"ms an image: {parts}", "at most 1.02" if gpu else "at most 1.05",
                   "JPEG decoding in the same process"),
            Figure(f"{pair}: live / cached", statistics.median(gain), (min(gain), max(gain)), "x",
                   f"limit of this run {limit:.2f}, by FLOPs {ceiling:.2f}", f"at least {0.95 * limit:.2f}", ""),
            ]  # fmt: skip
    what, gap = f"{pair}: the student alone / free targets", "heads and tail: `make costs`"
    rows.append(ratio(what, seconds, "alone", "free", amount=batch, unit="images/s", goal="", gap=gap))
    return rows


if __name__ == "__main__":
    main()
