"""Activation checkpointing: blocks keep their inputs alone, and are computed again in the backward pass.

In: a timm model, or modules that are called by hand. Out: the same modules, with less memory and more time.
Invariant: losses, gradients and BatchNorm statistics are those of a run that keeps everything. What is recomputed sees
the same random numbers (PyTorch restores them), and running statistics are updated by the first pass alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from scalekd_cache.errors import UserError


class FirstPass:
    """Keeps the BatchNorm statistics of modules still, in training, outside of `with` on this object.

    A recomputation cannot be told from a first pass by looking at it. So whoever runs the first pass says so.

    Raises:
        UserError: a module has running statistics that are not those of a BatchNorm.
    """

    def __init__(self, root: nn.Module, name: str) -> None:
        self._now = False
        self._kept: dict[nn.Module, tuple[float | None, Tensor | None]] = {}
        for path, module in root.named_modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(self._after, always_call=True)  # PyTorch ends a recomputation by raising
            elif any("running" in buffer for buffer, _ in module.named_buffers(recurse=False)):
                raise _refusal(name, f"{path} has running statistics that would be updated twice")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The time of a first pass."""
        self._now = True
        try:
            yield
        finally:
            self._now = False

    def _before(self, module: Any, args: Any) -> None:
        if module.training and not self._now:
            self._kept[module] = (module.momentum, module.num_batches_tracked)
            module.momentum, module.num_batches_tracked = 0.0, None

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if module in self._kept:
            module.momentum, module.num_batches_tracked = self._kept.pop(module)


def recompute_blocks(model: nn.Module, name: str) -> FirstPass:
    """Let a timm model recompute its blocks, as its own `set_grad_checkpointing` cuts it.

    Raises:
        UserError: the model has no such switch, or would not train as without it.
    """
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise _refusal(name, "timm has no switch for it")
        switch(True)
    except AssertionError as error:  # how timm says that a model cannot
        raise _refusal(name, str(error) or "timm refuses") from error
    return FirstPass(model, name)


def last_called(module: nn.Module) -> nn.Module:
    """The module whose output a sequence ends with: timm calls a sequence's blocks one by one, not the sequence."""
    while type(module).forward is nn.Sequential.forward and len(children := list(module.children())):
        module = children[-1]
    return module


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """`function(*args)`, computed again in the backward pass."""
    output: Tensor = checkpoint(function, *args, use_reentrant=False)
    return output


def check_tapped(tapped: Tensor, name: str) -> None:
    """Refuse a feature map that no gradient comes back from."""
    if torch.is_grad_enabled() and not tapped.requires_grad:
        raise _refusal(name, "a feature map inside a recomputed block has no gradient")


def _refusal(name: str, reason: str) -> UserError:
    return UserError(
        f"this student cannot be trained with activation checkpointing as without it: {reason}",
        got=f"student.grad_checkpointing=true with {name}",
        fix='set SET="student.grad_checkpointing=false", or lower train.micro_batch_size',
    )
