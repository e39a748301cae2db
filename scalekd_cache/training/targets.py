"""Provides distillation targets from caches or live teachers, and the heads that compare a student with them.

In: a run's caches, and a student. Out: `TargetSource`s, which return the targets for a batch; tails and heads; the
sample order.
Invariant: training, auditing and custom loops use the same targets and heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalekd_cache.codec.base import feature_norms
from scalekd_cache.codec.logits import LogitCodec
from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.config.stage2 import (
    FEW_CLASSES,
    FEW_CLASSES_WEIGHTS,
    DistillConfig,
    ScaleKDConfig,
    TrainConfig,
    teacher_files,
)
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.loader.order import WINDOW, ClassCorrelation, Order, mixing_window
from scalekd_cache.loader.target_cache import TargetCodecs
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.models.tail import Tail, load_tail
from scalekd_cache.models.teacher import Teacher, cache_teacher_config, load_cache_teacher
from scalekd_cache.models.teacher_spec import TeacherSpec, random_note, teacher_label
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.scalekd.losses import Targets, term_weights
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import ManifestFacts
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import local_path
from scalekd_cache.training.optim import synchronize_batchnorm
from scalekd_cache.training.run_cache import RunCache


def check_logits(config: ScaleKDConfig, cache: Cache, codec: LogitCodec) -> None:
    """Raise `UserError` if the stored logits do not support the temperature."""
    if codec.partial and config.temperature != 1 and config.logit_weight > 0:
        raise UserError(
            "the cache stores top-k logits, which support only temperature 1",
            got=f"scalekd.temperature={config.temperature}",
            expected="1, or a cache with dense logits",
            where=cache.root,
            fix="set --scalekd.temperature=1, or make a cache with cache.logits=dense",
        )


def feature_samples(config: ScaleKDConfig, cache: Cache, micro_batch: int, number: int = 0) -> int:
    """Number of samples per micro-batch in a teacher's feature losses. `number` is the teacher's index.

    These samples are the projectors' BatchNorm group. Errors are as in `samples_of_share`.
    """
    every = cache.manifest.facts.features_every
    return samples_of_share(config.share_of(number), every, micro_batch, cache.root)


def samples_of_share(asked: float | None, every: int, micro_batch: int, where: object) -> int:
    """Number of samples per micro-batch in the feature losses.

    Args:
        asked: the feature share (None: all samples with features).
        every: one in this many samples has features.
        micro_batch: number of samples per micro-batch.
        where: the cache, for the errors.

    Raises:
        UserError: the cache has features for fewer samples, or the result is not a whole number of at least 2.
    """
    share = 1 / every if asked is None else asked
    if micro_batch % every:
        raise UserError(
            "train.micro_batch_size does not match the fraction of cached samples with features",
            got=f"train.micro_batch_size={micro_batch}, features for one in {every} samples",
            expected=f"a multiple of {every}",
            where=where,
            fix=f"set --train.micro_batch_size={max(1, micro_batch // every) * every}, and set "
            "train.global_batch_size to a multiple of it",
        )
    if share * every > 1 + 1e-9:
        raise UserError(
            "the feature share is larger than the fraction of views with stored features",
            got=f"scalekd.feature_share={share:g}",
            expected=f"at most {1 / every!r}: one in {every} samples of a view has features",
            where=where,
            fix=f"set --feature-share {1 / every!r}, or make a cache with a larger --stored-features",
        )
    samples = round(share * micro_batch)
    least = min(2, micro_batch)
    if abs(samples - share * micro_batch) > 1e-6 or samples < least:
        most = micro_batch // every
        near = sorted({max(least, min(most, count)) for count in (samples, samples - 1, samples + 1)})
        shares = ", ".join(f"{count / micro_batch!r} ({counted(count, 'sample')})" for count in near)
        raise UserError(
            f"the feature share must select a whole number of samples per micro-batch, at least {least}",
            got=f"scalekd.feature_share={share!r} of train.micro_batch_size={micro_batch}",
            expected=shares
            if most >= least
            else f"train.micro_batch_size={least * every}, or a larger multiple of {every}",
            fix="change --feature-share or train.micro_batch_size"
            if most >= least
            else "increase train.micro_batch_size",
        )
    return samples


def load_cache_classifier(config: DistillConfig, cache: Cache, codec: LogitCodec, process: Process) -> nn.Linear | None:
    """Load the teacher's classifier if the cache stores it instead of logits, after checking the temperature
    (`check_logits`)."""
    check_logits(config.scalekd, cache, codec)
    if not isinstance(codec, RecomputedLogits):
        return None
    return load_classifier(codec.get_config(), cache.root).to(process.device)


def load_classifiers(
    config: DistillConfig, run_cache: RunCache, loader: CacheLoader, process: Process
) -> list[nn.Linear | None]:
    """Each teacher's classifier as in `load_cache_classifier`; None if its stored logits are not used."""
    return [
        load_cache_classifier(config, cache, codecs.logits, process)
        if config.train.targets == "cached" and run_cache.shares_classes(number)
        else None
        for number, (cache, codecs) in enumerate(zip(run_cache.caches, loader.codecs, strict=True))
    ]


def load_cache_tail(cache: Cache) -> Tail:
    """Load the teacher's tail and check its sha256 against the manifest."""
    file = cache.root / "tail.safetensors"
    if not is_there(file) or hash_file(file).sha256 != cache.manifest.facts.tail_sha256:
        raise UserError(
            "the teacher's tail is missing or damaged",
            expected=f"sha256 {cache.manifest.facts.tail_sha256[:16]}",
            where=file,
            fix="restore the file, or delete the manifest and rerun `scalekd cache-teacher`, which reuses the units",
        )
    return load_tail(local_path(file), TeacherSpec.from_json(cache.manifest.facts.teacher["spec"]))


def load_tails(config: ScaleKDConfig, caches: Sequence[Cache]) -> list[Tail]:
    """Load the teachers' tails, with stochastic depth if `config.tail_drop_path` is set."""
    tails = [load_cache_tail(cache) for cache in caches]
    for tail in tails if config.tail_drop_path else ():
        tail.enable_drop_path()
    return tails


def pooled_width(facts: ManifestFacts) -> int:
    """Width of the pooled target in a cache without labels; 0 with labels."""
    spec = facts.teacher["spec"]
    return 0 if facts.labeled else int(spec.get("pooled") or spec["feature_shape"][0])


def describe_targets(config: DistillConfig, run_cache: RunCache) -> list[str]:
    """Lines that describe the losses, for random or multiple teachers or caches without labels; otherwise empty."""
    logits = config.scalekd.logit_weight > 0
    facts, labeled = run_cache.facts, run_cache.facts[0].labeled
    soft = [bool(one.num_classes and run_cache.shares_classes(number)) for number, one in enumerate(facts)]
    lines = list(filter(None, [random_note(teacher_label(one.teacher) for one in facts)]))
    if not labeled:
        *maps, pooled = term_weights(config.scalekd)
        terms = {
            "feature map": any(maps),
            "pooled embedding": pooled > 0,
            f"soft labels ({run_cache.num_classes:,} classes)": any(soft) and logits,
        }
        learned = [name for name, on in terms.items() if on]
        text = " and its ".join(filter(None, [", its ".join(learned[:-1]), *learned[-1:]]))
        lines.append(f"the cache has no labels, so there is no label loss; the student learns the teacher's {text}")
    if len(facts) > 1:
        weights = config.scalekd.weights_of(len(facts))
        teachers = [f"{name} {weight:.3g}" for name, weight in zip(run_cache.names(), weights, strict=True)]
        rule = ", divided by the current loss" if config.scalekd.balance == "scale" else ""
        lines.append(f"{counted(len(facts), 'teacher')}, with loss weights{rule}: {', '.join(teachers)}")
        if not labeled and sum(bool(one.num_classes) for one in facts) > 1:
            lines.append(f"soft labels from {run_cache.names()[soft.index(True)]} only: without labels, it is unknown "
                "whether the teachers' classes are in the same order")  # fmt: skip
    return lines


def make_all_heads(
    config: DistillConfig, student: Student, tails: Sequence[Tail], run_cache: RunCache
) -> nn.ModuleList:
    """Build the heads for each teacher, in the order of the caches."""
    pooled = [pooled_width(facts) for facts in run_cache.facts]
    return nn.ModuleList(make_heads(config, student, tail, width) for tail, width in zip(tails, pooled, strict=True))


HEAVY_HEADS = 3
"""A note is printed if the heads have at least this many times the student's parameters. They then cost about twice as
many FLOPs as the student, or more: 1.9 (demo teacher, ResNet-50) to 20 times (Swin-L, MobileNet)."""


def heads_note(config: DistillConfig, student: Student, heads: nn.Module) -> str | None:
    """A note about the cost of the heads and cheaper options, if the heads are much larger than the student."""
    own, trained = (sum(value.numel() for value in module.parameters()) for module in (student.model, heads))
    share = config.scalekd.share_of() or 1
    if config.scalekd.projector != "cap" or share * trained < HEAVY_HEADS * own:
        return None
    cheaper = "--heads linear" + (" or --feature-share 0.25" if share == 1 else "")
    return (
        f"note: the heads have {trained / own:.1f} times the student's parameters ({trained / 1e6:.1f}M), so most of "
        f"each step is spent on them; cheaper: {cheaper} (docs/COSTS.md)"
    )


def describe_weights(config: ScaleKDConfig) -> str:
    """The feature weights as a text."""
    spatial, *frequency = config.feature_weights().values()
    return f"spatial {spatial:g}, frequency {' and '.join(f'{weight:g}' for weight in frequency)}"


def weights_note(config: ScaleKDConfig, classes: int) -> str | None:
    """One line about the feature weights in a run with few classes (`DistillConfig.on_data`), unless other weights were
    set."""
    if not 2 <= classes <= FEW_CLASSES or config.feature_weights() != FEW_CLASSES_WEIGHTS:
        return None
    return (
        f"feature weights: {describe_weights(config)}, the defaults for 2 to {FEW_CLASSES} classes (docs/METHOD.md, "
        f"Few classes); to change them, set {', '.join(f'--scalekd.{name}' for name in FEW_CLASSES_WEIGHTS)}"
    )


def make_order(train: TrainConfig, cache: Cache, process: Process, others: Sequence[Cache] = ()) -> Order:
    """A run's sample order. If the images are sorted by class, the shuffle window is larger.

    If a cache stores features for only some samples, these are spread over all micro-batches. A run without targets has
    the same batches, unless distillation would refuse its micro-batch size.
    """
    found = ClassCorrelation(*cache.manifest.facts.data.get("class_likeness", (1.0, 1.0)))
    window = train.shuffle_window or mixing_window(len(cache), train.shuffle_block, found)
    if window > WINDOW and train.shuffle_window is None:
        process.print_rank0(
            f"the cache is sorted by class: {found.neighbors:.0%} of neighboring images share a class, compared with "
            f"{found.chance:.1%} expected by chance. The shuffle window is enlarged from {WINDOW} to {window:,} blocks "
            f"({window * train.shuffle_block:,} images), which means more seeks and, for a remote cache, more local "
            "copies"
        )
    sparsest = max([cache, *others], key=lambda one: one.manifest.facts.features_every)
    every = sparsest.manifest.facts.features_every
    if train.targets == "none" and train.micro_batch_size % every:
        every = 1
    return Order(
        num_samples=len(cache),
        block=train.shuffle_block,
        window=window,
        seed=train.seed,
        features_every=every,
        ranges=sparsest.num_ranges,
    )


def make_student(config: DistillConfig, run_cache: RunCache, process: Process) -> Student:
    """Build a run's student with random weights.

    Raises:
        UserError: as in `build_student` and `synchronize_batchnorm`.
    """
    size = run_cache.facts[0].view_recipe["size"]
    student = build_student(config.student, num_classes=run_cache.num_classes, image_size=size)
    if config.train.sync_bn:
        student.replace_model(synchronize_batchnorm(student.model, process))
    return student


def samples_with_features(config: DistillConfig, run_cache: RunCache) -> list[int]:
    """For each teacher, the number of samples per micro-batch in its feature losses (`feature_samples`); 0 without
    targets."""
    if config.train.targets == "none":
        return [0] * len(run_cache.caches)
    size = config.train.micro_batch_size
    return [feature_samples(config.scalekd, cache, size, number) for number, cache in enumerate(run_cache.caches)]


def make_loader(config: DistillConfig, run_cache: RunCache, features: Sequence[int], process: Process) -> CacheLoader:
    """A run's loader at its first step; `features` comes from `samples_with_features`.

    Raises:
        UserError: the batch does not fit the dataset or the processes, there is too little shared memory, or the images
            of a cache without pixels are missing.
    """
    train, others = config.train, run_cache.caches[1:]
    return CacheLoader(
        run_cache.cache,
        make_order(train, run_cache.cache, process, others),
        epochs=train.epochs,
        global_batch=train.global_batch_size,
        micro_batch=train.micro_batch_size,
        rank=process.rank,
        world_size=process.world_size,
        workers=train.workers,
        others=others,
        features=features,
        views=run_cache.views,
        pixels=run_cache.pixels,
        data=config.data,
        pin_memory=process.device.type == "cuda",
    )


@torch.no_grad()
def live_targets(teacher: Teacher, images: Tensor) -> Targets:
    """Exact targets for uint8 images (B, 3, H, W), with the memory layout of targets decoded from a lossless cache.

    NaN is detected later, in the loss, because a check here would synchronize with the device.
    """
    features, logits, pooled = teacher(images)
    features = features.contiguous(memory_format=torch.channels_last)
    return Targets(features, feature_norms(features), logits, pooled=pooled if pooled.shape[1] else None)


class TargetSource(NamedTuple):
    """The source of one teacher's targets: its cache, or the live teacher."""

    codecs: TargetCodecs
    """The codecs of the teacher's cache."""
    classifier: nn.Linear | None = None
    """The teacher's classifier, for a cache that stores it instead of logits (`load_cache_classifier`)."""
    teacher: Teacher | None = None
    """The live teacher (None: decode targets from the batch)."""
    features: int | None = None
    """Number of leading samples in a batch that keep their features (None: all that have features)."""
    number: int = 0
    """Index of the teacher's cache in the batch."""
    name: str = ""
    """The teacher's unique name in metrics."""
    with_logits: bool = True
    """Whether the teacher's classes are the student's classes. If not, its logits are not used."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        """The targets for a batch, computed on the batch's device."""
        found = self._targets(batch)
        return found if self.with_logits else found._replace(logits=found.logits[:, :0], partial=False)

    def _targets(self, batch: Batch) -> Targets:
        if self.teacher is not None:
            return live_targets(self.teacher, batch.images).with_features(self.features)
        stored, pooled = batch.stored[self.number], None
        if self.codecs.second is not None:
            assert stored.second is not None
            pooled = self.codecs.second.decode(stored.second).features.flatten(1)
        if self.classifier is not None:
            decoded = self.codecs.features.decode(stored.codes)
            logits = self.classifier(decoded.features.mean((2, 3)))
            return Targets(*decoded, logits, pooled=pooled).with_features(self.features)
        decoded = self.codecs.features.decode(stored.codes[: self.features])
        return Targets(*decoded, stored.logits, self.codecs.logits.partial, pooled)


def live_teachers(config: DistillConfig, run_cache: RunCache, device: torch.device) -> list[Teacher | None]:
    """Each cache's teacher for train.targets=live; otherwise None for each cache.

    Raises:
        UserError: a teacher's weights are missing or differ from those used in stage 1, or the wrong number of files
            is given.
    """
    if config.train.targets != "live":
        return [None] * len(run_cache.caches)
    options = live_options(config, run_cache)
    return [
        load_cache_teacher(cache.manifest, teacher, device)
        for cache, teacher in zip(run_cache.caches, options, strict=True)
    ]


def live_options(config: DistillConfig, run_cache: RunCache) -> list[TeacherConfig]:
    """Each teacher's options for train.targets=live, with the current paths of the weights files.

    Raises:
        UserError: a file does not exist, or the number of files differs from the number of caches.
    """
    files = teacher_files(config.teacher_weights, len(run_cache.caches))
    recorded = [facts.teacher["config"] for facts in run_cache.facts]
    return [cache_teacher_config(options, file) for options, file in zip(recorded, files, strict=True)]


def target_sources(
    config: DistillConfig,
    run_cache: RunCache,
    loader: CacheLoader,
    features: Sequence[int],
    teachers: Sequence[Teacher | None],
    process: Process,
) -> list[TargetSource]:
    """The source of each teacher's targets."""
    sources = []
    classifiers = load_classifiers(config, run_cache, loader, process)
    for number, (name, codecs) in enumerate(zip(run_cache.names(), loader.codecs, strict=True)):
        shared, classifier = run_cache.shares_classes(number), classifiers[number]
        sources.append(TargetSource(codecs, classifier, teachers[number], features[number], number, name, shared))
    return sources
