"""Fine-tunes a backbone with a new classifier: a student on a few labels, or a teacher on a new dataset.

In: an exported student or a timm model, and labeled images. Out: an export for timm, and its accuracy. Invariant: the
export is written at the end, atomically. The same options give the same batches for any number of workers. Validation
images are used only for the final evaluation, not for model selection.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import Dataset

from scalekd_cache.config.downstream import FinetuneConfig
from scalekd_cache.config.stage1 import ViewConfig
from scalekd_cache.convert.backbone import Backbone, find_export, open_backbone
from scalekd_cache.convert.timm_export import WEIGHTS, check_export_place, check_not_in_run, export_student
from scalekd_cache.data.base import IntArray, NoSplitError, Source, hash_order
from scalekd_cache.data.classes import check_classes
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.data.source import open_source
from scalekd_cache.data.workers import load_items
from scalekd_cache.devices import autocast, autocast_dtype, memory_errors
from scalekd_cache.distributed import EXIT_INTERRUPTED
from scalekd_cache.errors import RunInterrupted, UserError, counted
from scalekd_cache.models.evaluate import Tally, evaluate, omitted, percent
from scalekd_cache.models.normalize import Normalize
from scalekd_cache.models.supervised import train_epoch
from scalekd_cache.models.tail import is_teacher
from scalekd_cache.progress import progress
from scalekd_cache.store.durable_files import check_writable
from scalekd_cache.training.model_card import finetuned_card
from scalekd_cache.views.view import apply_view, sample_view

WARMUP_SHARE = 0.1
"""Fraction of the steps used for warm-up. The learning rate then decays to zero on a cosine schedule."""


def finetune(config: FinetuneConfig, device: torch.device, say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train, export and evaluate a model.

    Args:
        config: the options.
        device: the training device.
        say: called with each line of output.

    Returns:
        The output folder, image counts, and the accuracy in percent (None without validation images).

    Raises:
        UserError: the model or dataset does not exist, there are no labels, the output folder contains other files, the
            loss is NaN, or the evaluation fails. If only the evaluation fails, the export already exists.
        RunInterrupted: the user pressed Ctrl-C; nothing was written.
    """
    try:
        with memory_errors("lower --batch or --size"):
            return _finetune(config, device, say)
    except KeyboardInterrupt as stop:
        raise RunInterrupted(
            "interrupted: nothing was written, so a rerun starts from the beginning", EXIT_INTERRUPTED
        ) from stop


def _finetune(config: FinetuneConfig, device: torch.device, say: Callable[[str], object]) -> dict[str, Any]:
    place = config.init or config.model
    assert place is not None
    option = "--init" if config.init else "--model"
    start = open_backbone(place, config.weights, size=config.size, pretrained=config.pretrained, option=option)
    out = Path(config.out or f"finetuned/{start.name}")
    _check_place(out, config.init, say)
    check_writable(out, "--out", sum(value.nbytes for value in start.model.state_dict().values()))
    train = open_source(config.data, "train")
    if not train.class_names:
        raise UserError(
            "the training images have no labels", where=config.data.source, expected="images in train/<class>/"
        )
    if len(train.class_names) < 2:
        raise UserError(
            "all training images belong to one class", where=config.data.source, expected="at least 2 classes"
        )
    validation = _validation(config, train, say)
    chosen = chosen_images(train, config.labels_per_class, config.seed)
    if len(chosen) < 2:
        raise UserError("too few training images", got=len(chosen), expected="at least 2", where=config.data.source)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    backbone = with_classifier(start, len(train.class_names))
    say(
        f"{place}: {counted(len(chosen), 'training image')} in {counted(len(train.class_names), 'class')}, "
        f"{counted(config.epochs, 'epoch')}, {backbone.image_size} x {backbone.image_size} pixels"
    )
    model, unreadable = _train(config, backbone, train, chosen, device)
    if unreadable:
        say(omitted(unreadable, "training image"))
    tally, failed = None, None
    try:
        tally = _accuracy(dataclasses.replace(backbone, model=model), validation, device, config.workers)
    except UserError as error:  # e.g., an image is no longer readable; the trained weights are still exported
        failed = error
    facts: dict[str, Any] = {
        "out": str(out),
        "model": backbone.name,
        "start": place,
        "data": config.data.source,
        "train_images": len(chosen) - unreadable,
        "labels_per_class": config.labels_per_class,
        "classes": len(train.class_names),
        "image_size": backbone.image_size,
        "epochs": config.epochs,
        "seed": config.seed,
        "val_images": tally.images if tally else 0,
        "top1": tally.top1_percent if tally else None,
        "top5": tally.top5_percent if tally else None,
    }
    finished = dataclasses.replace(backbone, model=model.cpu())
    export_student(
        finished,
        finished,
        out,
        image_size=backbone.image_size,
        class_names=train.class_names,
        card=finetuned_card(finished, facts, out),
    )
    say(f"{out}: {_figure(tally)}; timm.create_model('local-dir:{out}', pretrained=True)")
    if config.init is None and is_teacher(finished.model):
        say(f"to use it as a teacher: --teacher {place} --teacher-weights {out / WEIGHTS} --size {backbone.image_size}")
    if failed is not None:
        raise UserError(f"the model was trained and exported, but not evaluated: {failed}") from failed
    return facts


def _figure(tally: Tally | None) -> str:
    """The accuracy as text."""
    if tally is None:
        return "not evaluated"
    omitted = f" ({tally.unreadable:,} more could not be read)" if tally.unreadable else ""
    return f"top-1 {percent(tally.top1_percent)} of {counted(tally.images, 'validation image')}{omitted}"


def _check_place(out: Path, init: str | None, say: Callable[[str], object]) -> None:
    """Check that `out` holds neither a run's export nor the initial weights. Print a note if it will be replaced."""
    check_export_place(out)
    check_not_in_run(out)
    start = find_export(Path(init)) if init is not None else None
    if start is not None and os.path.realpath(start) == os.path.realpath(out):
        raise UserError(
            "the output folder contains the initial weights (--init)", where=out, fix="choose a different --out"
        )
    if (out / WEIGHTS).exists():
        say(f"{out} exists and will be replaced when training finishes")


def chosen_images(source: Source, per_class: int | None, seed: int) -> IntArray:
    """Indices of the training images in source order: all of them, or `per_class` images per class, selected by a
    keyed hash."""
    if per_class is None:
        return np.arange(len(source.samples))
    order = hash_order((sample.key for sample in source.samples), b"scalekd-cache labels %d" % seed)
    labels = np.array([sample.label for sample in source.samples])[order]
    first = [order[labels == label][:per_class] for label in range(len(source.class_names))]
    return np.sort(np.concatenate(first))


def with_classifier(backbone: Backbone, classes: int) -> Backbone:
    """Replace the backbone's classifier with a new one for this many classes."""
    model: Any = backbone.model
    model.reset_classifier(classes)
    shape = _output_shape(model.eval(), backbone.image_size)
    if shape != (1, classes):
        raise UserError(
            "this model cannot be used as a classifier",
            got=f"{backbone.name}: outputs of shape {shape[1:]}",
            expected=f"{classes} logits per image",
        )
    return dataclasses.replace(backbone, model_args={**backbone.model_args, "num_classes": classes})


@torch.no_grad()
def _output_shape(model: nn.Module, size: int) -> tuple[int, ...]:
    return tuple(model(torch.zeros(1, 3, size, size)).shape)


def _validation(config: FinetuneConfig, train: Source, say: Callable[[str], object]) -> Source | None:
    """Open the validation images. If there are none, prints a note and returns None."""
    try:
        source = open_source(config.data, "val")
    except NoSplitError as error:
        say(f"no validation images: accuracy is not measured ({str(error).splitlines()[0]})")
        return None
    check_classes(source, train.class_names, len(train.class_names))
    return source


def _train(
    config: FinetuneConfig, backbone: Backbone, source: Source, chosen: IntArray, device: torch.device
) -> tuple[nn.Module, int]:
    """Train in place. Returns the trained model (or its moving average) and the number of unreadable images."""
    model = backbone.model.to(device).train()
    count = max(1, -(-len(chosen) // config.batch))
    optimizer = create_optimizer_v2(
        model, "adamw", lr=config.lr, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    warmup = round(WARMUP_SHARE * config.epochs * count)
    schedule, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=config.epochs * count,
        warmup_epochs=warmup,
        warmup_lr=config.lr / 100,
        warmup_prefix=False,
        step_on_epochs=True,  # timm's epochs are our steps
    )
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    loss_of = LabelSmoothingCrossEntropy(config.label_smoothing) if config.label_smoothing else nn.CrossEntropyLoss()
    images = TrainingViews(source, dataclasses.replace(config.views, size=backbone.image_size))
    normalize = Normalize(backbone.mean, backbone.std).to(device)
    forward = partial(_forward, model, autocast_dtype("auto", device))
    generator, step, unreadable = np.random.default_rng(config.seed), 0, set()

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.array_split(generator.permutation(chosen), count)
        items = load_items(
            images,
            iter([(epoch, ids.tolist()) for ids in order]),
            workers=config.workers,
            item_bytes=config.batch * 3 * backbone.image_size**2,
            max_prefetch=2,
        )
        for views, labels, bad in items:
            unreadable.update(bad)
            if len(labels) > 1:  # BatchNorm needs at least two samples
                yield normalize(views.to(device)), labels.to(device)

    with progress("finetune", config.epochs * count, "step") as bar:

        def after_step(loss: float) -> None:
            nonlocal step
            step += 1
            schedule.step(step)
            if ema is not None:
                ema.update(model, step=step)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        for epoch in range(config.epochs):
            train_epoch(forward, model.parameters, batches(epoch), loss_of, optimizer, after_step)
    if step == 0:
        raise UserError(
            "none of the training images could be read", where=config.data.source, fix="check the dataset's image files"
        )
    trained: nn.Module = (model if ema is None else ema.module).eval()
    return trained, len(unreadable)


def _forward(model: nn.Module, dtype: torch.dtype, images: Tensor) -> Tensor:
    """The model's logits as float32."""
    with autocast(images.device, dtype):
        logits: Tensor = model(images)
    return logits.float()


def _accuracy(backbone: Backbone, validation: Source | None, device: torch.device, workers: int) -> Tally | None:
    if validation is None:
        return None
    normalize = Normalize(backbone.mean, backbone.std).to(device)
    tally = evaluate(
        lambda images: backbone.model(normalize(images)), validation, backbone.image_size, device, workers=workers
    )
    return tally if tally.images else None


class TrainingViews(Dataset[tuple[Tensor, Tensor, list[int]]]):
    """Batches of augmented views, indexed by (epoch, image indices). A batch has uint8 views (B, 3, S, S), labels, and
    the indices of unreadable images. A view depends only on the view seed, the image and the epoch.
    """

    def __init__(self, source: Source, views: ViewConfig) -> None:
        self.source, self.views = source, views

    def __getitem__(self, place: tuple[int, list[int]]) -> tuple[Tensor, Tensor, list[int]]:
        epoch, indices = place
        found, labels, bad = [], [], []
        for index in indices:
            sample = self.source.samples[index]
            try:
                image = decode_image(self.source.read(index), sample.key)
            except UnreadableImage:
                bad.append(index)
                continue
            view = sample_view(self.views, sample.key, epoch, image.shape[1], image.shape[0])
            found.append(apply_view(view, image, self.views))
            labels.append(sample.label)
        size = self.views.size
        pixels = np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)
        # Contiguous, like batches from a worker: the memory layout affects the rounding of convolutions.
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels, dtype=torch.int64), bad
