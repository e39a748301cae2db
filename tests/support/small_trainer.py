"""A trainer of a tiny student on the tiny cache, and a run folder that keeps metric lines in memory."""

import torch
from small_cache import CPU, shared_cache

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, StudentConfig, TrainConfig
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import WINDOW, Order
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import load_tail
from scalekd_cache.models.teacher import cache_teacher_config, load_cache_teacher
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.training.checkpoint import latest_checkpoint
from scalekd_cache.training.targets import TargetSource, load_cache_classifier, make_heads
from scalekd_cache.training.trainer import DistillModel, Trainer

USED, GLOBAL, MICRO = 48, 16, 8
STEPS = USED // GLOBAL


def config_of(*, train=None, optim=None, student="test_resnet") -> DistillConfig:
    small = {"epochs": 2, "global_batch_size": GLOBAL, "micro_batch_size": MICRO, "log_every": 1, "shuffle_block": 8}
    adam = {"name": "adamw", "lr": 1e-3, "base_batch_size": GLOBAL}
    return DistillConfig(
        student=StudentConfig(name=student),
        optim=OptimConfig(**{**adam, **(optim or {})}),
        train=TrainConfig(**{**small, **(train or {})}),
    )


def trainer_of(
    config: DistillConfig, folder=None, cache=None, process=CPU, kind=Trainer, order=None, features=None
) -> Trainer:
    """A trainer at the last checkpoint of a folder, or at the first step."""
    cache, train = cache or shared_cache(), config.train
    torch.manual_seed(train.seed)
    student = build_student(config.student, num_classes=10, image_size=64)
    tails, heads = [], []
    if train.targets != "none":
        tail = load_tail(cache.root / "tail.safetensors", TeacherSpec.from_json(cache.manifest.facts.teacher["spec"]))
        heads = [make_heads(config, student, tail)]
        tails = [tail.to(process.device)]
    order = order or Order(num_samples=USED, block=train.shuffle_block, window=WINDOW, seed=train.seed)
    sizes = {"global_batch": train.global_batch_size, "micro_batch": train.micro_batch_size}
    options = {"workers": train.workers, "features": None if features is None else [features]}
    loader = CacheLoader(cache, order, epochs=train.epochs, **options, **sizes)
    checkpoint = latest_checkpoint(folder)[0] if folder else None
    model = DistillModel(config, student, heads)
    classifier = load_cache_classifier(config, cache, loader.codecs[0].logits, process)
    teacher = None
    if train.targets == "live":
        options = cache_teacher_config(cache.manifest.facts.teacher["config"], None)
        teacher = load_cache_teacher(cache.manifest, options, process.device)
    sources = [TargetSource(loader.codecs[0], classifier, teacher, features)] if heads else []
    return kind(config, process, loader, model, tails, sources, checkpoint)


class Lines:
    """A run folder that keeps metric lines in memory."""

    def __init__(self):
        self.steps, self.lines = [], []

    def log(self, step, values):
        self.steps.append(step)
        self.lines.append(dict(values))

    def column(self, name):
        return [line[name] for line in self.lines]


def finish(trainer: Trainer) -> Lines:
    lines = Lines()
    list(trainer.train(lines))
    return lines
