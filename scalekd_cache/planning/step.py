"""One training step with the real student, heads, tail and losses: its memory, or its time on this machine.

In: training options, and a teacher's tail. Out: bytes, counted on the meta device, or seconds, measured.
Invariant: images and targets are constants; no cache is read.
"""

import math
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.devices import autocast, autocast_dtype, memory_errors
from scalekd_cache.models.student import build_student
from scalekd_cache.models.tail import Tail
from scalekd_cache.models.teacher import MetaTeacher
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.scalekd.losses import Targets, distillation_losses
from scalekd_cache.training.targets import heads_note

OPTIMIZER_TENSORS = {"sgd": 1, "adamw": 2, "lamb": 2}
"""Number of parameter-sized tensors that each optimizer keeps."""
MEASURED_S = 5.0
"""Approximate time of a measured step, in seconds. It limits the number of images."""


class TrainingStep:
    """A forward and a backward pass for one micro-batch, on PyTorch's default device.

    Args:
        training: the training options, including the student.
        tail: the teacher's frozen tail.
        size: view size in pixels.
        num_classes: number of classes.
        pooled: width of the pooled target for a dataset without labels; 0 with labels.
    """

    def __init__(self, training: DistillConfig, tail: Tail, size: int, num_classes: int, pooled: int) -> None:
        self.training, self.tail, self.num_classes, self.pooled = training, tail, num_classes, pooled
        self.student = build_student(training.student, num_classes=num_classes, image_size=size)
        self.heads = make_heads(training, self.student, tail, pooled)
        self.device = torch.get_default_device()

    def run(self, batch: int) -> None:
        """Run the step on this number of images."""
        training, device = self.training, self.device
        featured = max(1, round(batch * (training.scalekd.share_of() or 1)))
        output = self.student(torch.zeros(batch, 3, self.student.image_size, self.student.image_size, device=device))
        s3, s4, logits = output
        height, width = self.tail.out_shape[1:]
        targets = Targets(
            torch.ones(featured, *self.tail.out_shape, device=device),
            torch.ones(featured, 2, height, width, device=device),
            torch.ones(batch, self.num_classes, device=device),
            pooled=torch.ones(batch, self.pooled, device=device) if self.pooled else None,
        )
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        pooled = self.student.pooled(output) if self.pooled else None
        maps = self.heads(s3[:featured], s4[:featured], self.tail, pooled)
        distillation_losses(training.scalekd, training.train, logits, labels, maps, targets).total.backward()  # type: ignore[no-untyped-call]

    def seconds(self) -> float:
        """Seconds per image on this machine, with up to a micro-batch of images: as many as `MEASURED_S` allows."""
        train, share = self.training.train, self.training.scalekd.share_of() or 1
        sizes = range(math.ceil(2 / share), train.micro_batch_size)
        whole = (size for size in sizes if abs(size * share - round(size * share)) < 1e-6)
        batch = next(whole, train.micro_batch_size)
        with memory_errors("choose a smaller --student, or --heads linear"):
            self._timed(batch)  # the first step also sets up kernels
            while (seconds := self._timed(batch)) < MEASURED_S / 2 and batch < train.micro_batch_size:
                batch = min(train.micro_batch_size, 4 * batch)
        return seconds / batch

    def _timed(self, batch: int) -> float:
        started = time.perf_counter()
        with autocast(self.device, autocast_dtype(self.training.train.precision, self.device)):
            self.run(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def note(self) -> str | None:
        """A note if the heads cost much more than the student."""
        return heads_note(self.training, self.student, self.heads)


class _Live(TorchDispatchMode):
    """Counts the bytes of all live tensors returned by operations.

    Args:
        own: storages to exclude.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {value.untyped_storage()._cdata for value in own}
        self._now = 0
        self.peak = 0
        """Peak number of live bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its outputs."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
                self._add(value.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def step_memory(
    training: DistillConfig, teacher: MetaTeacher, size: int, num_classes: int, pooled: int = 0
) -> dict[str, float]:
    """Memory in bytes for a float32 training step with one micro-batch.

    "activations" is the peak memory of everything besides weights, gradients and optimizer state: images, targets,
    saved tensors, temporary tensors and activation gradients. Workspace inside operations is not included. Call this
    under `torch.device("meta")`: the real student, heads, tail and losses run without computing values. `pooled` is the
    width of the pooled target for a dataset without labels; 0 with labels.
    """
    step = TrainingStep(training, teacher.tail, size, num_classes, pooled)
    trained = sum(value.numel() for module in (step.student, step.heads) for value in module.parameters())
    for parameter in (*step.student.parameters(), *step.heads.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    modules = (step.student, step.heads, teacher.tail)
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    grads = [parameter.grad for parameter in tensors if parameter.grad is not None]
    with _Live([*tensors, *grads]) as live:
        step.run(training.train.micro_batch_size)
    parts = {
        "weights": 4.0 * (trained + teacher.tail_params),
        "gradients": 4.0 * trained,
        "optimizer": 4.0 * trained * OPTIMIZER_TENSORS[training.optim.name],
        "activations": float(live.peak),
    }
    return {**parts, "total": sum(parts.values())}
