"""Distillation targets: from a cache or a live teacher; and the cache in a custom training loop.

In: a finished cache, a student. Out: `TargetSource`, targets of a batch; `CachedTargets`, an iterable of batches;
`ScaleKDLoss`, the loss as a module.
Invariant: samples, order, checks, decoding and losses are those of `scalekd distill`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from scalekd_cache.codec import Shape
from scalekd_cache.codec.base import FeatureCodec, feature_norms
from scalekd_cache.codec.logits import LogitCodec, logit_codec_from_config
from scalekd_cache.codec.recomputed import RecomputedLogits, load_classifier
from scalekd_cache.config.options import build
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.distributed import Process, rank_in_loop
from scalekd_cache.errors import UserError, counted
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.loader.order import WINDOW, ClassCorrelation, Order, mixing_window
from scalekd_cache.models.normalize import Normalize, resize
from scalekd_cache.models.student import Student, build_student
from scalekd_cache.models.tail import Tail, load_tail
from scalekd_cache.models.teacher import Teacher
from scalekd_cache.models.teacher_spec import TeacherSpec
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import LossTerms, Targets, distillation_losses, term_weights
from scalekd_cache.store.checked_files import is_there
from scalekd_cache.store.durable_files import hash_file
from scalekd_cache.store.manifest import ManifestFacts
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.remote.remote_path import local_path
from scalekd_cache.store.shared_pixels import open_shared_pixels


def check_logits(config: ScaleKDConfig, cache: Cache, codec: LogitCodec) -> None:
    """`UserError` for a temperature that the stored logits do not support."""
    if codec.partial and config.temperature != 1 and config.logit_weight > 0:
        raise UserError(
            "the cache stores top-k logits, which support temperature 1 only",
            got=f"scalekd.temperature={config.temperature}",
            expected="1, or a cache with dense logits",
            where=cache.root,
            fix="set --scalekd.temperature=1, or make a cache with cache.logits=dense",
        )


def feature_samples(config: ScaleKDConfig, cache: Cache, micro_batch: int) -> int:
    """How many samples of a micro-batch the feature losses use.

    Raises:
        UserError: the cache has features for fewer samples, or the share is not a whole number of at least 2 samples
            (the BatchNorm group of the projectors).
    """
    every = cache.manifest.facts.features_every
    share = 1 / every if config.feature_share is None else config.feature_share
    if micro_batch % every:
        raise UserError(
            "train.micro_batch_size does not match the cache's share of samples with features",
            got=f"train.micro_batch_size={micro_batch}, features for one in {every} samples",
            expected=f"a multiple of {every}",
            where=cache.root,
            fix=f"set --train.micro_batch_size={max(1, micro_batch // every) * every}, and set "
            "train.global_batch_size to a multiple of it",
        )
    if share * every > 1 + 1e-9:
        raise UserError(
            "the feature share is larger than the share of views with stored features",
            got=f"scalekd.feature_share={share:g}",
            expected=f"at most {1 / every:g}: one in {every} samples of a view has features",
            where=cache.root,
            fix=f"set --feature-share {1 / every:g}, or make a cache with a larger --stored-features",
        )
    samples = round(share * micro_batch)
    least = min(2, micro_batch)
    if abs(samples - share * micro_batch) > 1e-6 or samples < least:
        near = sorted({max(least, min(micro_batch, count)) for count in (samples, samples - 1, samples + 1)})
        raise UserError(
            "the feature share of a micro-batch is not a whole number of samples, at least 2",
            got=f"scalekd.feature_share={share:g} of train.micro_batch_size={micro_batch}",
            expected=", ".join(f"{count / micro_batch:.6g} ({counted(count, 'sample')})" for count in near),
            fix="change --feature-share or train.micro_batch_size",
        )
    return samples


def load_cache_classifier(config: DistillConfig, cache: Cache, codec: LogitCodec, process: Process) -> nn.Linear | None:
    """The teacher's classifier if the cache stores it instead of logits; checks the temperature (`check_logits`)."""
    check_logits(config.scalekd, cache, codec)
    if not isinstance(codec, RecomputedLogits) or config.train.targets != "cached":
        return None
    return load_classifier(codec.get_config(), cache.root).to(process.device)


def load_cache_tail(cache: Cache, spec: TeacherSpec) -> Tail:
    """The teacher's tail, with its sha256 checked against the manifest."""
    file = cache.root / "tail.safetensors"
    if not is_there(file) or hash_file(file).sha256 != cache.manifest.facts.tail_sha256:
        raise UserError(
            "the teacher's tail is missing or damaged",
            expected=f"sha256 {cache.manifest.facts.tail_sha256[:16]}",
            where=file,
            fix="restore the file, or delete the manifest and rerun scalekd cache-teacher: it reuses the units",
        )
    return load_tail(local_path(file), spec)


def pooled_width(facts: ManifestFacts) -> int:
    """Width of the pooled target of a cache without labels; 0 with labels."""
    spec = facts.teacher["spec"]
    return 0 if facts.labeled else int(spec.get("pooled") or spec["feature_shape"][0])


def make_heads(config: DistillConfig, student: Student, tail: Tail, pooled: int = 0) -> ScaleKDHeads:
    """The ScaleKD heads between a student and a teacher's tail; `pooled` as `pooled_width` returns it."""
    heads = ScaleKDHeads(
        config.scalekd,
        tap_shapes=student.tap_shapes,
        tail_in_shape=tail.in_shape,
        tail_out_shape=tail.out_shape,
        layer_norm=student.layer_norm,
        pooled=pooled,
        embedding=student.pooled_width,
    )
    if config.student.grad_checkpointing:
        heads.checkpoint_gradients()
    return heads


def describe_targets(config: DistillConfig, facts: ManifestFacts) -> str:
    """One line about what a run on a cache without labels minimizes."""
    classes = facts.num_classes
    terms = ["the teacher's feature map", "its pooled embedding"]
    if classes and config.scalekd.logit_weight > 0:
        terms.append(f"its soft labels ({classes:,} classes)")
    return f"the cache has no labels: no label loss; the student learns {', '.join(terms[:-1])} and {terms[-1]}"


HEAVY_HEADS = 10
"""Heads with this many times the student's parameters are reported."""


def heads_note(config: DistillConfig, student: Student, heads: ScaleKDHeads, tail: Tail) -> str | None:
    """One line about the cost of the heads and the cheaper option, if they are far larger than the student."""
    own, trained = (sum(value.numel() for value in module.parameters()) for module in (student.model, heads))
    if config.scalekd.projector != "cap" or trained < HEAVY_HEADS * own:
        return None
    cheap = dataclasses.replace(config, scalekd=dataclasses.replace(config.scalekd, projector="lite"))
    cheap = dataclasses.replace(cheap, scalekd=dataclasses.replace(cheap.scalekd, heads_s3=None, heads_s4=None))
    with torch.device("meta"):
        lite = sum(value.numel() for value in make_heads(cheap, student, tail).parameters())
    return (
        f"the heads have {trained / 1e6:.1f} M parameters, the student {own / 1e6:.1f} M: most of a step is spent on "
        f"the heads; --heads lite has {lite / 1e6:.1f} M (docs/METHOD.md, Lite projectors; `scalekd costs` for FLOPs)"
    )


FEW_CLASSES = 20
"""Up to this many classes, the published feature weights are reported (docs/METHOD.md, Few classes)."""


def weights_note(config: ScaleKDConfig, classes: int) -> str | None:
    """One line when the published feature weights, chosen for 1,000 classes, are used with few classes."""
    published = term_weights(ScaleKDConfig())
    if not 0 < classes <= FEW_CLASSES or term_weights(config) != published:
        return None
    return (
        f"{classes} classes with the feature weights for 1,000: a sixteenth was better in 5 of 6 short runs with 10 "
        "(docs/METHOD.md, Few classes): "
        "--scalekd.spatial_weight 0.005 --scalekd.frequency_weight_s3 0.004 --scalekd.frequency_weight_s4 0.004"
    )


def make_order(train: TrainConfig, cache: Cache, process: Process) -> Order:
    """The sample order of a run; with class-sorted images the shuffle window is larger."""
    found = ClassCorrelation(*cache.manifest.facts.data.get("class_likeness", (1.0, 1.0)))
    window = train.shuffle_window or mixing_window(len(cache), train.shuffle_block, found)
    if window > WINDOW and train.shuffle_window is None:
        process.print_rank0(
            f"the cache is sorted by class: {found.neighbors:.0%} of neighboring images share a class, "
            f"{found.chance:.1%} expected by chance. The shuffle window grows from {WINDOW} to {window:,} blocks "
            f"({window * train.shuffle_block:,} images): more seeks, and more local copies of a remote cache"
        )
    return Order(
        num_samples=len(cache),
        block=train.shuffle_block,
        window=window,
        seed=train.seed,
        features_every=cache.manifest.facts.features_every,
        ranges=cache.num_ranges,
    )


@torch.no_grad()
def live_targets(teacher: Teacher, images: Tensor) -> Targets:
    """Exact targets of uint8 images (B, 3, H, W), in the memory layout of a decoded lossless cache.

    NaN is found in the loss: a check here would wait for the device.
    """
    features, logits, pooled = teacher(images)
    features = features.contiguous(memory_format=torch.channels_last)
    return Targets(features, feature_norms(features), logits, pooled=pooled if pooled.shape[1] else None)


class TargetSource(NamedTuple):
    """Where the targets of a batch come from: the cache, or a live teacher. All training and auditing code uses it."""

    codec: FeatureCodec
    """Codec of the cache's features."""
    logit_codec: LogitCodec
    """Codec of the cache's logits."""
    classifier: nn.Linear | None = None
    """The teacher's classifier, for a cache that stores it instead of logits (`load_cache_classifier`)."""
    teacher: Teacher | None = None
    """The live teacher; None: targets are decoded from the batch."""
    features: int | None = None
    """Samples of a batch that keep their features, the first ones (None: all that the batch has)."""
    second_codec: FeatureCodec | None = None
    """Codec of the cache's pooled embeddings, if it has some."""

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Targets:
        """The targets of a batch, computed on its device."""
        if self.teacher is not None:
            return live_targets(self.teacher, batch.images).with_features(self.features)
        pooled: Tensor | None = None
        if self.second_codec is not None:
            assert batch.second is not None
            pooled = self.second_codec.decode(batch.second).features.flatten(1)
        if self.classifier is not None:
            decoded = self.codec.decode(batch.codes)
            logits = self.classifier(decoded.features.mean((2, 3)))
            return Targets(*decoded, logits, pooled=pooled).with_features(self.features)
        decoded = self.codec.decode(batch.codes[: self.features])
        return Targets(*decoded, batch.logits, self.logit_codec.partial, pooled)


class CachedBatch(NamedTuple):
    """One batch of `CachedTargets`."""

    images: Tensor
    """(B, 3, H, W) float32, normalized."""
    labels: Tensor
    """(B,) int64."""
    targets: Targets
    """The teacher's map, norms, logits and pooled embedding, float32."""


class CachedTargets(IterableDataset[CachedBatch]):
    """The batches of some epochs; epoch e reads view e mod V. Iteration continues from the saved position.

    It is a data loader itself: `workers` load in the background. With several processes (a process group, or torchrun),
    each gets its own batches, the same ones for every world size at a given global batch. torch's
    `DataLoader(targets, batch_size=None, num_workers=2)` gives the same batches in the same order; the position is then
    counted by the caller: `load_state_dict({**targets.state_dict(), "step": batches})`.

    Args:
        cache: a finished cache, or its folder or URL.
        batch_size: samples per batch of this process (also the BatchNorm group); a partial last batch is dropped.
        feature_share: share of a batch's samples that have features in its targets, the first ones (None: all, or as
            many as the cache has).
        epochs: passes over the data.
        seed: seed of the sample order.
        workers: loader processes.
        device: where features are decoded and batches are returned.
        mean: the student's channel means, on a scale of 0 to 1.
        std: its channel standard deviations.
        image_size: side of its images, pixels, to which views are resized on `device` (None: the size of the views).
        pixels_from: folder or URL of the cache whose pixels are shared (None: as recorded).
        data: the images, for a cache without pixels (None: where stage 1 read them).

    Raises:
        UserError: the cache is not finished, is damaged, or has fewer samples than a batch.
    """

    def __init__(
        self,
        cache: Cache | Path | str,
        *,
        batch_size: int,
        feature_share: float | None = None,
        epochs: int = 1,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        mean: Sequence[float] = StudentConfig().mean,
        std: Sequence[float] = StudentConfig().std,
        image_size: int | None = None,
        pixels_from: str | None = None,
        data: str | None = None,
    ) -> None:
        self.cache = cache if isinstance(cache, Cache) else Cache.open(cache)
        self.device = torch.device(device)
        manifest, process = self.cache.manifest, Process(*rank_in_loop(), self.device)
        global_batch = batch_size * process.world_size
        if len(self.cache) < global_batch:
            what = "a batch" if process.world_size == 1 else f"a batch of {process.world_size} processes"
            raise UserError(f"{what} is larger than the cache", got=global_batch, expected=f"at most {len(self.cache)}")
        self._process, self._workers = process, workers
        self.num_classes = manifest.facts.num_classes
        self.image_size = image_size or int(manifest.facts.view_recipe["size"])
        features = feature_samples(ScaleKDConfig(feature_share=feature_share), self.cache, batch_size)
        self.loader = CacheLoader(
            self.cache,
            make_order(TrainConfig(seed=seed), self.cache, process),
            epochs=epochs,
            global_batch=global_batch,
            micro_batch=batch_size,
            rank=process.rank,
            world_size=process.world_size,
            workers=workers,
            features=features,
            pixels=open_shared_pixels(self.cache, pixels_from, manifest.num_views),
            data=data,
            pin_memory=self.device.type == "cuda",
        )
        classifier = load_cache_classifier(DistillConfig(), self.cache, self.loader.logit_codec, process)
        self._source = TargetSource(
            self.loader.codec,
            self.loader.logit_codec,
            classifier,
            features=features,
            second_codec=self.loader.second_codec,
        )
        self._normalize = Normalize(mean, std, folded=True).to(self.device)

    def __len__(self) -> int:
        """Number of batches in all epochs."""
        return self.loader.total_steps

    def __iter__(self) -> Iterator[CachedBatch]:
        """The batches of this process; in a worker of torch's DataLoader, the worker's part of them.

        Raises:
            UserError: the process group was made after these targets; workers or a GPU in a worker; a damaged record.
        """
        if get_worker_info() is None:
            self._check_process()
        elif self._workers or self.device.type != "cpu":
            raise UserError(
                "inside torch's DataLoader, CachedTargets cannot start workers or use a GPU",
                got=f"workers={self._workers}, device={self.device}",
                expected="workers=0, device=cpu",
                fix="iterate over CachedTargets directly: it loads with its own workers",
            )
        for batch in self.loader:
            yield self._deliver(batch.to(self.device))

    def _check_process(self) -> None:
        made, now = self._process[:2], rank_in_loop()
        if made != now:
            raise UserError(
                "CachedTargets was made before the process group: processes would train on the same batches",
                got="rank {} of {} now, {} of {} then".format(*now, *made),
                fix="make it after init_process_group; with Lightning, in train_dataloader of a DataModule",
            )

    def _deliver(self, batch: Batch) -> CachedBatch:
        images = self._normalize(resize(batch.images, self.image_size))
        return CachedBatch(images, batch.labels, self._source(batch))

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches returned so far, and the options that must match to resume."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved position; `UserError` when it belongs to another sample order."""
        self.loader.load_state_dict(state)


class ScaleKDLoss(nn.Module):
    """The ScaleKD heads of a student and their losses. Train its parameters together with the student's.

    Args:
        targets: a cache or its `CachedTargets`; provides the teacher's frozen tail and the size of the images.
        student: a module, (B, 3, H, W) normalized images -> (S3, S4, logits): two feature maps (B, C, H, W) and logits;
            where the cache has neither labels nor logits, a pooled embedding (B, E) instead of the logits.
            `timm_student` builds one from a timm name. It is called once, in eval mode, to get the shapes.
        config: the method's constants (None: those of the cache's recipe; the loss weights are printed).
        label_loss: ce, bce or none (None: that of the cache's recipe; none for a cache without labels).
        label_smoothing: for ce (None: that of the cache's recipe).

    Raises:
        UserError: the cache's tail is missing or damaged, or the student has other outputs.
    """

    def __init__(
        self,
        targets: "CachedTargets | Cache",
        student: nn.Module,
        config: ScaleKDConfig | None = None,
        *,
        label_loss: str | None = None,
        label_smoothing: float | None = None,
    ) -> None:
        super().__init__()
        cache = targets.cache if isinstance(targets, CachedTargets) else targets
        manifest = cache.manifest
        recipe, given = manifest.facts.distill, {"label_loss": label_loss, "label_smoothing": label_smoothing}
        self.config = config or build(ScaleKDConfig, recipe.get("scalekd", {}))
        if config is None:
            print(f"{self._weights()}, from the cache's recipe {manifest.facts.recipe} (override with config=)")
        label = {name: recipe.get("train", {}).get(name) if value is None else value for name, value in given.items()}
        train = build(TrainConfig, {name: value for name, value in label.items() if value is not None})
        self.train_config = DistillConfig(train=train).on_data(labeled=manifest.facts.labeled).train
        check_logits(self.config, cache, logit_codec_from_config(manifest.facts.logit_codec))
        tail = load_cache_tail(cache, TeacherSpec.from_json(manifest.facts.teacher["spec"]))
        if self.config.tail_drop_path:
            tail.enable_drop_path()
        views_size = int(manifest.facts.view_recipe["size"])
        size = targets.image_size if isinstance(targets, CachedTargets) else views_size
        *shapes, width = student_shapes(student, size, manifest.facts.num_classes)
        self._classes = manifest.facts.num_classes
        layer_norm = not any(isinstance(module, nn.BatchNorm2d) for module in student.modules())
        self.heads = ScaleKDHeads(
            self.config,
            tap_shapes=(shapes[0], shapes[1]),
            tail_in_shape=tail.in_shape,
            tail_out_shape=tail.out_shape,
            layer_norm=layer_norm,
            pooled=pooled_width(manifest.facts),
            embedding=0 if self._classes else width,
        )
        self._tail: list[Tail] = [tail]  # in a list: not a submodule, so in no state dict and no optimizer

    def _weights(self) -> str:
        config = self.config
        frequency = f"frequency {config.frequency_weight_s3:g} and {config.frequency_weight_s4:g}"
        return f"loss weights: spatial {config.spatial_weight:g}, {frequency}, logits {config.logit_weight:g}"

    def forward(self, s3: Tensor, s4: Tensor, logits: Tensor, labels: Tensor, targets: Targets) -> LossTerms:
        """The weighted terms; differentiate `.total`. All inputs are on one device."""
        tail = self._tail[0] = self._tail[0].to(s4.device)
        featured = len(targets.features)
        embedding = (s4.mean((2, 3)) if self._classes else logits)[: featured if targets.pooled is None else None]
        maps = self.heads(s3[:featured], s4[:featured], tail, embedding)
        return distillation_losses(self.config, self.train_config, logits, labels, maps, targets)


def timm_student(name: str, targets: CachedTargets) -> Student:
    """A timm model (timm or short name) with random weights, for a cache's classes and image size.

    `.model` is the plain timm model."""
    config = StudentConfig(name=name)
    return build_student(config, num_classes=targets.num_classes, image_size=targets.image_size).to(targets.device)


@torch.no_grad()
def student_shapes(student: nn.Module, image_size: int, num_classes: int) -> tuple[Shape, Shape, int]:
    """(C, H, W) of S3 and S4, and the width of the third output: the logits, or without classes the pooled embedding.

    Raises:
        UserError: the outputs are not two feature maps and logits of these classes.
    """
    mode = student.training
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    output = student.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    student.train(mode)
    shapes = [tuple(value.shape) for value in output] if isinstance(output, tuple | list) else [type(output).__name__]
    if [len(shape) for shape in shapes] != [4, 4, 2] or num_classes not in (0, shapes[2][1]):
        raise UserError(
            "the student must return (S3, S4, logits)"
            if num_classes
            else "the student must return (S3, S4, embedding)",
            got=", ".join(map(str, shapes)),
            expected="S3 (B, C, H, W), S4 (B, C, H, W), "
            + (f"logits (B, {num_classes})" if num_classes else "embedding (B, E)"),
            where=type(student).__name__,
            fix="see docs/guides/students.md",
        )
    s3, s4 = ((value.shape[1], value.shape[2], value.shape[3]) for value in output[:2])
    return s3, s4, output[2].shape[1]
