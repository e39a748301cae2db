"""Classes for using one or more caches in a custom training loop.

In: finished caches with the same views, and a student. Out: `CachedTargets`, an iterable over batches; `ScaleKDLoss`,
the loss module.
Invariant: samples, order, checks, decoding and losses are the same as in `scalekd distill`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map

from scalekd_cache.codec import Shape
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.config.options import build
from scalekd_cache.config.places import cache_places
from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.devices import usable_device
from scalekd_cache.distributed import Process, rank_in_loop
from scalekd_cache.errors import UserError, counted, some_of
from scalekd_cache.loader.loader import Batch, CacheLoader
from scalekd_cache.models.normalize import Normalize, student_input
from scalekd_cache.models.student import Student, build_student, has_batch_norm
from scalekd_cache.models.tail import Tail
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.scalekd.losses import HeadOutputs, LossTerms, Targets, check_loss, losses_of_teachers, term_weights
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.training.run_cache import RunCache, check_caches, has_logits
from scalekd_cache.training.targets import (
    check_logits,
    feature_samples,
    load_tails,
    make_order,
    pooled_width,
    target_sources,
)


class CachedBatch(NamedTuple):
    """A batch from `CachedTargets`."""

    images: Tensor
    """(B, 3, H, W) float32, normalized, in channels-last memory format as in `scalekd distill`."""
    labels: Tensor
    """(B,) int64; -1 for a cache without labels."""
    targets: Targets | tuple[Targets, ...]
    """The teacher's feature map, norms, logits and pooled embedding as float32. For multiple caches, a tuple with one
    entry per cache."""


def _collate(batches: list[CachedBatch], *, collate_fn_map: object = None) -> CachedBatch:
    """Collate function for torch's `DataLoader` with its default batch size of 1: returns the one batch unchanged."""
    if len(batches) > 1:
        raise UserError(
            "CachedTargets yields complete batches, which torch's DataLoader cannot combine",
            got="a DataLoader with a batch_size other than None or 1",
            expected="DataLoader(targets, batch_size=None)",
            fix="set the batch size with CachedTargets(..., batch_size=N)",
        )
    return batches[0]


default_collate_fn_map[CachedBatch] = _collate


def _shared_flag() -> Tensor:
    """False, in memory shared with the workers of a torch DataLoader, so that they notice a second pass."""
    flag = torch.zeros(1, dtype=torch.bool)
    flag.share_memory_()  # type: ignore[no-untyped-call]
    return flag


def _open_caches(given: object) -> tuple[Cache, ...]:
    """Open a cache, a folder, a URL, or multiple of these, and check that the caches can be used together."""
    listed = cache_places(given) if isinstance(given, str) else [given] if isinstance(given, Cache | Path) else given
    if not isinstance(listed, Sequence) or not all(isinstance(one, Cache | Path | str) for one in listed):
        wrong = listed if isinstance(listed, Sequence) else ()
        wrong = [type(one).__name__ for one in wrong if not isinstance(one, Cache | Path | str)]
        raise UserError(
            "this is not a cache",
            got=" with ".join([type(given).__name__, *wrong[:1]]),
            expected="a cache, its folder or its URL, or a sequence of them",
        )
    if not listed:
        raise UserError("no cache was given", got=repr(given), expected="at least one cache")
    caches = tuple(one if isinstance(one, Cache) else Cache.open(one) for one in listed)
    check_caches(caches)
    return caches


def _reads(targets: object) -> tuple[RunCache, int]:
    """The caches of a `CachedTargets`, or those at a place (see `_open_caches`), and the size of the student's
    images."""
    if isinstance(targets, CachedTargets):
        return targets.run_cache, targets.image_size
    caches = _open_caches(targets)
    run_cache = RunCache(caches, min(one.manifest.num_views for one in caches), None)
    return run_cache, int(run_cache.facts[0].view_recipe["size"])


class CachedTargets(IterableDataset[CachedBatch]):
    """Iterates over the batches of all epochs. Epoch e reads view e mod V. Iteration resumes at the saved position.

    This class is itself a data loader: `workers` processes load data in the background. With multiple processes (a
    process group, or torchrun), each process gets its own batches; for a given global batch size, their contents do not
    depend on the world size. torch's `DataLoader(targets, batch_size=None, num_workers=2)` returns the same batches in
    the same order, but the caller must then track the position:
    `load_state_dict({**targets.state_dict(), "step": batches})`.

    One iteration covers all epochs. Iterating again after the last batch is an error.

    Args:
        cache: a finished cache, or its folder or URL. For multiple teachers, a sequence (or a comma-separated list of
            folders and URLs) of caches with the same views.
        batch_size: number of samples per batch in this process, which is also the BatchNorm group size. A partial last
            batch is dropped.
        feature_share: fraction of the samples in a batch that have features in the targets; these samples come first.
            One number, or one per cache (None: from the first cache's recipe; without one, all samples whose features
            are in the cache).
        epochs: passes over the data, all of them in one iteration.
        seed: seed for the sample order.
        workers: number of loader processes.
        device: where features are decoded and batches are returned.
        mean: the channel means for the student's normalization, on a scale of 0 to 1.
        std: the channel standard deviations, on the same scale.
        image_size: size of the student's images in pixels; views are resized on `device` (None: the view size).
        pixels_from: folder or URL of the cache that stores the shared pixels (None: as recorded).
        data: the images, for a cache without pixels (None: the path used in stage 1).
        views: use only the first V views (None: all views in the cache). To resume from a position that was saved
            before the cache grew, set this to the number of views at that time.

    Raises:
        UserError: an argument is out of range; the device cannot be used; a cache is not finished, is damaged, or has
            fewer samples than a batch or fewer views than `views`; or the caches have different views.
    """

    def __init__(
        self,
        cache: Cache | Path | str | Sequence[Cache | Path | str],
        *,
        batch_size: int,
        feature_share: float | Sequence[float] | None = None,
        epochs: int = 1,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        mean: Sequence[float] = StudentConfig().mean,
        std: Sequence[float] = StudentConfig().std,
        image_size: int | None = None,
        pixels_from: str | None = None,
        data: str | None = None,
        views: int | None = None,
    ) -> None:
        caches = _open_caches(cache)
        if feature_share is None:
            feature_share = caches[0].manifest.facts.distill.get("scalekd", {}).get("feature_share")
        config = build(
            DistillConfig,
            {
                "scalekd": {"feature_share": feature_share},
                "student": {"mean": mean, "std": std, "image_size": image_size},
                "train": {
                    "epochs": epochs,
                    "global_batch_size": batch_size,
                    "micro_batch_size": batch_size,
                    "seed": seed,
                    "workers": workers,
                    "views": views,
                },
            },
        )
        train, student = config.train, config.student
        batch_size, views = train.micro_batch_size, train.views
        self.feature_share = config.scalekd.feature_share
        self.device = usable_device(device)
        first, process = caches[0], Process(*rank_in_loop(), self.device)
        global_batch = batch_size * process.world_size
        if len(first) < global_batch:
            what = "the batch" if process.world_size == 1 else f"the global batch of {process.world_size} processes"
            raise UserError(
                f"{what} has more images than the cache", got=global_batch, expected=f"at most {len(first)}"
            )
        self._process, self._workers = process, train.workers
        available = min(one.manifest.num_views for one in caches)
        views = available if views is None else views
        if views > available:
            raise UserError(
                "the cache has fewer views than requested", got=f"views={views}", expected=f"at most {available}"
            )
        self.run_cache = RunCache(caches, views, open_shared_pixels(first, pixels_from, views))
        self.image_size = student.image_size or int(first.manifest.facts.view_recipe["size"])
        config.scalekd.check_teachers(len(caches))
        features = [feature_samples(config.scalekd, one, batch_size, number) for number, one in enumerate(caches)]
        self.loader = CacheLoader(
            first,
            make_order(train, first, process, caches[1:]),
            epochs=train.epochs,
            global_batch=global_batch,
            micro_batch=batch_size,
            rank=process.rank,
            world_size=process.world_size,
            workers=train.workers,
            others=caches[1:],
            features=features,
            views=views,
            pixels=self.run_cache.pixels,
            data=data,
            pin_memory=self.device.type == "cuda",
        )
        teachers = [None] * len(caches)
        self._sources = target_sources(config, self.run_cache, self.loader, features, teachers, process)
        self._normalize = Normalize(student.mean, student.std, folded=True).to(self.device)
        self._covered = _shared_flag()

    @property
    def cache(self) -> Cache:
        """The first cache."""
        return self.run_cache.cache

    @property
    def num_classes(self) -> int:
        """The student's number of classes: the dataset's or, without labels, that of the first teacher with logits."""
        return self.run_cache.num_classes

    def __len__(self) -> int:
        """Total number of batches over all epochs."""
        return self.loader.total_steps

    def __iter__(self) -> Iterator[CachedBatch]:
        """This process's batches or, in a torch DataLoader worker, the worker's share of them.

        Raises:
            UserError: an earlier iteration reached the last batch; the process group was created after this object; a
                DataLoader worker would start workers or use a GPU; or a record is damaged.
        """
        worker = get_worker_info()
        if worker is None:
            self._check_process()
        elif self._workers or self.device.type != "cpu":
            raise UserError(
                "inside torch's DataLoader, CachedTargets cannot start workers or use a GPU",
                got=f"workers={self._workers}, device={self.device}",
                expected="workers=0, device=cpu",
                fix="iterate over CachedTargets directly, because it has its own workers",
            )
        first = worker is None or worker.id == 0  # any other worker may start after worker 0 has finished
        if first and self._covered:
            raise UserError(
                "CachedTargets was iterated twice, but one iteration already covers all epochs",
                got=f"{counted(len(self), 'batch')} already read, the total for epochs={self.loader.epochs}",
                fix="set CachedTargets(..., epochs=N) and iterate once; to read the same batches again, create a new "
                "CachedTargets",
            )
        for batch in self.loader:
            if worker is None and self.loader.step == len(self):  # before the last batch: the caller may stop there
                self._covered.fill_(True)
            yield self._deliver(batch.to(self.device))
        if first:
            self._covered.fill_(True)

    def _check_process(self) -> None:
        made, now = self._process[:2], rank_in_loop()
        if made != now:
            raise UserError(
                "CachedTargets was created before the process group, so all processes would train on the same batches"
                if made[1] == 1
                else "the process group changed after CachedTargets was created",
                got="rank {}, world size {} now; rank {}, world size {} at creation".format(*now, *made),
                fix="create CachedTargets after init_process_group; with Lightning, create it in a DataModule's "
                "train_dataloader",
            )

    def _deliver(self, batch: Batch) -> CachedBatch:
        images = student_input(batch.images, self.image_size, self._normalize)
        targets = tuple(source(batch) for source in self._sources)
        return CachedBatch(images, batch.labels, targets if len(targets) > 1 else targets[0])

    def state_dict(self) -> dict[str, Any]:
        """The current position, and the options that must match to resume."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved position. Raises `UserError` if it is not from `state_dict` or belongs to a different
        sample order."""
        if not isinstance(state, Mapping) or not {"step", "fingerprint"} <= state.keys():
            keys = some_of([str(name) for name in state]) if isinstance(state, Mapping) else ""
            raise UserError(
                "this is not a state of CachedTargets",
                got=f"{type(state).__name__} with keys {keys}" if keys else type(state).__name__,
                expected="the value of CachedTargets.state_dict()",
            )
        views = state.get("views")
        if isinstance(views, int) and views != self.run_cache.views:
            raise UserError(
                "the position was saved with a different number of views",
                got=f"views={views} in the saved state",
                expected=f"views={self.run_cache.views}, as in this CachedTargets",
                fix=f"create CachedTargets(..., views={views}), even if the cache now has more views",
            )
        self.loader.load_state_dict(state)
        self._covered = _shared_flag()  # a new one, because persistent workers of a DataLoader keep the old position


class ScaleKDLoss(nn.Module):
    """ScaleKD heads for each teacher, and the losses. Train this module's parameters together with the student's.

    Args:
        targets: the `CachedTargets`, or its cache or caches (also their folders or URLs). They provide the teachers'
            frozen tails and the image size.
        student: a module that maps normalized images (B, 3, H, W) to (S3, S4, logits): two feature maps (B, C, H, W)
            and logits. For a cache without labels and logits, it returns a pooled embedding (B, E) instead of logits.
            `timm_student` builds one from a timm name. The student is called once in eval mode to get the shapes.
        config: the method's hyperparameters, also as a dict (None: from the first cache's recipe; the loss weights are
            printed).
            Feature weights that are not set depend on the number of classes, as in `scalekd distill`.
        label_loss: ce, bce or none (None: from the first cache's recipe; none for a cache without labels).
        label_smoothing: label smoothing for ce (None: from the first cache's recipe).

    Raises:
        UserError: a cache's tail is missing or damaged; an argument or the student's outputs do not match the
            description above; a label loss is given for a cache without labels; or no loss is left.
    """

    def __init__(
        self,
        targets: CachedTargets | Cache | Path | str | Sequence[Cache | Path | str],
        student: nn.Module,
        config: ScaleKDConfig | Mapping[str, Any] | None = None,
        *,
        label_loss: str | None = None,
        label_smoothing: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, kind, expected in (
            ("student", student, nn.Module, "a module; timm_student(name, targets) builds one from a timm name"),
            ("config", config, ScaleKDConfig | Mapping | None, "a ScaleKDConfig or a dict of its fields"),
        ):
            if not isinstance(value, kind):
                raise UserError(f"{name} has the wrong type", got=type(value).__name__, expected=expected)
        run_cache, size = _reads(targets)
        facts = run_cache.facts[0]
        if label_loss not in (None, "none") and not facts.labeled:
            raise UserError(
                "the cache has no labels, so there is no label loss",
                got=f"label_loss={label_loss}",
                expected="none",
                fix="omit label_loss",
            )
        recipe, given = facts.distill, {"label_loss": label_loss, "label_smoothing": label_smoothing}
        options = recipe.get("scalekd", {}) if config is None else config
        scalekd = options if isinstance(options, ScaleKDConfig) else build(ScaleKDConfig, options)
        scalekd.check_teachers(len(run_cache.caches))
        used = targets.feature_share if isinstance(targets, CachedTargets) else None
        if config is not None and scalekd.feature_share not in (None, used):
            raise UserError(
                "the feature share has no effect in the loss: the targets decide which samples have features",
                got=f"feature_share={scalekd.feature_share}",
                fix=f"set CachedTargets(..., feature_share={scalekd.feature_share}) and pass it to ScaleKDLoss",
            )
        label = {name: recipe.get("train", {}).get(name) if value is None else value for name, value in given.items()}
        train = build(TrainConfig, {name: value for name, value in label.items() if value is not None})
        resolved = DistillConfig(scalekd=scalekd, train=train).on_data(classes=len(facts.class_names))
        self.config, self.train_config = resolved.scalekd, resolved.train
        check_loss(self.config, self.train_config, labeled=facts.labeled, logits=has_logits(run_cache.facts))
        if config is None:
            by_rule = self.config != scalekd and facts.labeled
            source = f"recipe {facts.recipe}{f' for {facts.num_classes:,} classes' if by_rule else ''}"
            weights = describe_terms(self.config, self.train_config, run_cache)
            print(f"loss weights: {weights}, from the cache's {source} (override with config=)")
        self._classes = run_cache.num_classes
        *shapes, width = student_shapes(student, size, self._classes)
        self._shapes: dict[str, tuple[int, ...]] = {"s3": shapes[0], "s4": shapes[1], "logits": (width,), "labels": ()}
        layer_norm = not has_batch_norm(student)
        self.heads = nn.ModuleList()
        for cache in run_cache.caches:
            check_logits(self.config, cache, logit_codec_from_config(cache.manifest.facts.logit_codec))
        # A plain list keeps the tails out of the state dict and the optimizer.
        self._tails: list[Tail] = load_tails(self.config, run_cache.caches)
        for tail, one in zip(self._tails, run_cache.facts, strict=True):
            self.heads.append(
                ScaleKDHeads(
                    self.config,
                    tap_shapes=(shapes[0], shapes[1]),
                    tail_in_shape=tail.in_shape,
                    tail_out_shape=tail.out_shape,
                    layer_norm=layer_norm,
                    pooled=pooled_width(one),
                    embedding=0 if self._classes else width,
                )
            )

    def forward(
        self, s3: Tensor, s4: Tensor, logits: Tensor, labels: Tensor, targets: Targets | Sequence[Targets]
    ) -> LossTerms:
        """The weighted loss terms; call `.total.backward()`. All inputs must be on the same device. With one teacher,
        `targets` need not be a sequence.

        Raises:
            UserError: an argument has a wrong type or shape.
        """
        listed = self._check(targets, s3=s3, s4=s4, logits=logits, labels=labels)
        given: list[tuple[HeadOutputs | None, Targets]] = []
        for number, one in enumerate(listed):
            tail = self._tails[number] = self._tails[number].to(s4.device)
            featured = len(one.features)
            embedding = (s4.mean((2, 3)) if self._classes else logits)[: featured if one.pooled is None else None]
            given.append((self.heads[number](s3[:featured], s4[:featured], tail, embedding), one))
        return losses_of_teachers(self.config, self.train_config, logits, labels, given)[0]

    def _check(self, targets: object, **tensors: object) -> Sequence[Targets]:
        """The targets of each teacher. Raises `UserError` for the first argument with a wrong type or shape."""
        call, teachers = "call loss(s3, s4, logits, labels, targets)", len(self.heads)
        parts = list(targets) if isinstance(targets, Sequence) and not isinstance(targets, Targets) else [targets]
        found = [one for one in parts if isinstance(one, Targets)]
        if not len(parts) == len(found) == teachers:
            raise UserError(
                "targets must be the targets of a batch from CachedTargets",
                got=some_of([shape_or_type(one) for one in parts]) or "nothing",
                expected="Targets" if teachers == 1 else f"{teachers} Targets, one per teacher",
                fix=call,
            )
        for name, value in tensors.items():
            expected = (len(found[0].logits), *self._shapes[name])
            if not isinstance(value, Tensor) or tuple(value.shape) != expected:
                raise UserError(f"{name} has the wrong shape", got=shape_or_type(value), expected=expected, fix=call)
        return found


def timm_student(name: str, targets: CachedTargets | Cache | Path | str | Sequence[Cache | Path | str]) -> Student:
    """A timm model (timm or short name) with random weights, set up for a cache's classes and image size.

    `.model` is the plain timm model. It is on the device of the `CachedTargets` or, for a cache or its folder or URL,
    on the CPU."""
    run_cache, size = _reads(targets)
    student = build_student(StudentConfig(name=name), num_classes=run_cache.num_classes, image_size=size)
    return student.to(targets.device if isinstance(targets, CachedTargets) else "cpu")


def describe_terms(config: ScaleKDConfig, train: TrainConfig, run_cache: RunCache) -> str:
    """The weights of all enabled loss terms except the label loss."""
    on = term_weights(config)
    linear = config.projector == "linear" and on.s4_spatial > 0
    pooled = linear or any(pooled_width(facts) for facts in run_cache.facts)
    logits = config.logit_weight if has_logits(run_cache.facts) else 0.0
    terms = {
        "spatial": [max(on.s3_spatial, on.s4_spatial)],
        "frequency": [on.s3_frequency, on.s4_frequency],
        "pooled": [on.pooled if pooled else 0.0],
        "logits": [1.0 if logits and train.label_loss == "none" else logits],
    }
    given = {name: [f"{weight:g}" for weight in weights if weight] for name, weights in terms.items()}
    return ", ".join(f"{name} {' and '.join(weights)}" for name, weights in given.items() if weights)


def shape_or_type(value: object) -> str:
    """A tensor's shape, or the type of any other value, for a message."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def student_shapes(student: nn.Module, image_size: int, num_classes: int) -> tuple[Shape, Shape, int]:
    """The shapes (C, H, W) of S3 and S4, and the width of the logits or, without classes, of the pooled embedding.

    Raises:
        UserError: the outputs are not two feature maps and logits for this many classes or, without classes, an
            embedding that is not empty.
    """
    modes = [(module, module.training) for module in student.modules()]  # some may be frozen in evaluation mode
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    try:
        output = student.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for module, training in modes:
            module.training = training
    shapes = [tuple(value.shape) for value in output] if isinstance(output, tuple | list) else [type(output).__name__]
    fix = 'for a timm model, use timm_student("name", targets); otherwise, see docs/guides/students.md'
    if [len(shape) for shape in shapes] != [4, 4, 2] or shapes[2][1] != (num_classes or max(1, shapes[2][1])):
        raise UserError(
            "the student must return (S3, S4, logits)"
            if num_classes
            else "the student must return (S3, S4, embedding)",
            got=", ".join(map(str, shapes)),
            expected="S3 (B, C, H, W), S4 (B, C, H, W), "
            + (f"logits (B, {num_classes})" if num_classes else "embedding (B, E)"),
            where=type(student).__name__,
            fix=fix if num_classes else f"return a pooled embedding such as s4.mean((2, 3)) instead of logits; {fix}",
        )
    s3, s4 = ((value.shape[1], value.shape[2], value.shape[3]) for value in output[:2])
    return s3, s4, output[2].shape[1]
