"""What does a training step from a cache cost, compared with a live step of lightly-train?

    python -m benchmarks.peers.step [--student resnet18] [--batch 32] [--repeats 4] [--arms "lite heads" ...]

All arms use the same student, teacher (DINOv2's ViT-S/14 with random weights, which do not affect the time),
photographs, image size of 224 px, SGD and micro-batch size, in one process with one thread and no loader processes. A
step includes loading its batch. lightly-train uses its default distillation method (DistillationV3) with its own data
set, augmentation, data loader, training step and optimizer, and runs its teacher in every step. Ours reads pixels and
targets from a cache of the same photographs, with one row per arm of `ARMS`. Figures are CPU seconds; arms alternate.
Creates build/peers on first use (benchmarks/peers/environment.py). Takes 10 minutes.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Measurement, argument_parser, publish_table, time_interleaved
from benchmarks.peers.environment import restart_with_peers, versions
from benchmarks.photographs import write_photographs
from benchmarks.store.loader import make_cache
from benchmarks.training.step import endless_loader, load_teacher_of
from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.distributed import this_process
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.store.reader import Cache
from scalekd_cache.training.optim import make_optimizer
from scalekd_cache.training.targets import TargetSource, feature_samples, load_cache_tail, make_order
from scalekd_cache.training.trainer import DistillModel

TEACHER = "vit_small_patch14_dinov2"
PEER, PEER_TEACHER, PEER_QUEUE = "lightly-train, live", "dinov2/vits14-noreg", 8192
"""Row of the peer; its name of the same teacher; its queue of teacher embeddings for more than 20,000 images."""
BASELINE = "baseline"
IMAGES, EPOCHS = 64, 100_000


class Arm(NamedTuple):
    """One kind of cached step."""

    name: str
    scalekd: dict[str, Any]
    """Fields of `ScaleKDConfig`."""
    goal: str = ""
    """Cost over that of the peer."""
    rest: str = ""
    """What the cost is besides the student."""


ARMS = (
    Arm("published heads", {}, rest="cross attention on 16 x 16 positions, the tail, their gradients"),
    Arm("published heads, share 1/4", {"feature_share": 0.25}, "at most 0.7"),
    Arm("lite heads", {"projector": "lite"}, "at most 0.5", "the tail, on all samples"),
    Arm("lite heads, share 1/4", {"projector": "lite", "feature_share": 0.25}, "at most 0.5"),
    Arm("linear heads", {"projector": "linear"}, "at most 0.45"),
    Arm("linear heads, share 1/4", {"projector": "linear", "feature_share": 0.25}, "at most 0.45"),
)


def endless(batches: Callable[[], Any]) -> Iterator[Any]:
    """Batches of one epoch after another."""
    return itertools.chain.from_iterable(batches() for _ in itertools.count())


def own_step(arm: Arm | None, student_name: str, batch: int, cache: Cache) -> Callable[[], None]:
    """One optimizer step from a cache, its batch included; without an arm: the baseline."""
    config = DistillConfig(
        student=StudentConfig(name=student_name),
        optim=OptimConfig(name="sgd", lr=0.01, base_batch_size=batch),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=batch, workers=0),
        scalekd=ScaleKDConfig(**(arm.scalekd if arm else {})),
    )
    facts = cache.manifest.facts
    student = build_student(config.student, num_classes=len(facts.class_names), image_size=facts.view_recipe["size"])
    tail = load_cache_tail(cache) if arm else None
    model = DistillModel(config, student, [make_heads(config, student, tail)] if tail else []).train()
    optimizer = make_optimizer(model, config.optim, 0.01)
    features = feature_samples(config.scalekd, cache, batch)
    loader = CacheLoader(
        cache,
        make_order(config.train, cache, this_process("cpu")),
        epochs=EPOCHS,
        global_batch=batch,
        micro_batch=batch,
        features=[features],
    )
    batches, source = iter(loader), TargetSource(loader.codecs[0], features=features)

    def step() -> None:
        loaded = next(batches)
        targets, tails = ([source(loaded)], [tail]) if tail else ([], [])
        model(loaded.images, loaded.labels, targets, tails).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(student: str, batch: int, images: Path) -> Callable[[], None]:
    """One live step of lightly-train: what its `pretrain(method="distillation")` runs for every batch."""
    from lightly_train._commands import train_helpers
    from lightly_train._data.image_dataset import ImageDataset
    from lightly_train._methods.distillationv3.distillationv3 import DistillationV3, DistillationV3Args
    from lightly_train._models import package_helpers
    from lightly_train._models.embedding_model import EmbeddingModel
    from lightly_train._optim.optimizer_helpers import get_optimizer
    from lightly_train._optim.sgd_args import SGDArgs

    channels = {"num_input_channels": 3}
    teacher = package_helpers.get_wrapped_model(PEER_TEACHER, load_weights=False, **channels)
    method = DistillationV3(
        method_args=DistillationV3Args(teacher=teacher, queue_size=PEER_QUEUE),
        optimizer_args=SGDArgs(),
        embedding_model=EmbeddingModel(
            package_helpers.get_wrapped_model(f"timm/{student}", load_weights=False, **channels)
        ),
        global_batch_size=batch,
        **channels,
    ).train()
    optimizer = get_optimizer(SGDArgs(), method.trainable_modules(), lr_scale=1.0)
    transform = train_helpers.get_transform("distillation", train_helpers.get_transform_args("distillation", None))
    files = sorted(str(path.relative_to(images)) for path in images.rglob("*.jpg"))
    dataset = ImageDataset(images, files, transform, num_channels=3)
    batches = endless(lambda: train_helpers.get_dataloader(dataset, batch, num_workers=0, loader_args=None))

    def step() -> None:
        method.training_step_impl(next(batches), 0).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward(name: str, batch: int, cache: Cache) -> Callable[[], None]:
    """The teacher's forward pass on one batch."""
    teacher = load_teacher_of(name, len(cache.manifest.facts.class_names), torch.device("cpu"))
    images = next(iter(endless_loader(cache, batch, 0, torch.device("cpu")))).images
    return partial(teacher, images)


def rows(seconds: dict[str, list[float]], batch: int, arms: dict[str, Arm]) -> list[Measurement]:
    """Cost of each arm over that of the peer's step."""
    table = []
    for name, values in seconds.items():
        if name == PEER:
            continue
        rows = (PEER, BASELINE)
        ratios, to_baseline = ([own / base for own, base in zip(values, seconds[row], strict=True)] for row in rows)
        own, peer = (1e3 * statistics.median(found) / batch for found in (values, seconds[PEER]))
        rates = f"{own:.1f} vs {peer:.1f} ms per image; {statistics.median(to_baseline):.2f} x the {BASELINE} step"
        arm, spread = arms.get(name, Arm(name, {})), (min(ratios), max(ratios))
        what = f"{name} / {PEER}"
        table.append(Measurement(what, statistics.median(ratios), spread, "x", rates, arm.goal, arm.rest))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; write and print the results."""
    parser = argument_parser(__doc__)
    parser.add_argument("--student", default="resnet18", help="a timm model")
    parser.add_argument("--batch", type=int, default=32, help="micro-batch")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], metavar="ARM")
    options = parser.parse_args(argv)
    restart_with_peers("benchmarks.peers.step")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = [arm for arm in ARMS if arm.name in (options.arms or [arm.name])]
    with tempfile.TemporaryDirectory() as name:
        count = max(IMAGES, options.batch)
        data = write_photographs(Path(name) / "data", count)
        cache = make_cache(Path(name) / "cache", data, count, TEACHER)
        actions: dict[str, Callable[[], object]] = {
            BASELINE: own_step(None, options.student, options.batch, cache),
            "teacher forward": forward(TEACHER, options.batch, cache),
            PEER: peer_step(options.student, options.batch, data / "train"),
        }
        actions |= {f"ours, cached, {arm.name}": own_step(arm, options.student, options.batch, cache) for arm in chosen}
        for action in actions.values():
            action()
        seconds = time_interleaved(options.repeats, clock=time.process_time, **actions)
    arms = {f"ours, cached, {arm.name}": arm for arm in chosen}
    pair = f"{options.student}, ViT-S/14, 224 px, micro-batch {options.batch}, SGD"
    note = f"{pair}; {versions('lightly-train', 'torch', 'timm')}. Time only: accuracy was not compared."
    raw = {
        "student": options.student,
        "batch": options.batch,
        "arms": [arm._asdict() for arm in chosen],
        "cpu_seconds": seconds,
    }
    publish_table("peers-step", rows(seconds, options.batch, arms), raw, note=note)


if __name__ == "__main__":
    main()
