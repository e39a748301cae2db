"""Activation checkpointing: blocks keep only their inputs and are recomputed in the backward pass.

In: a timm model, or modules that are called directly. Out: the same modules, which use less memory but take longer.
Invariant: losses, gradients and BatchNorm statistics are the same as without checkpointing. The recomputation uses the
same random numbers (PyTorch restores them), and only the first pass updates running statistics.
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
    """Freezes a model's BatchNorm statistics during training, except inside `with first_pass():`.

    A module cannot distinguish a recomputation from the first pass, so callers run the first pass inside that block.

    Raises:
        UserError: a module other than BatchNorm has running statistics.
    """

    def __init__(self, root: nn.Module, name: str) -> None:
        self._now = False
        self._kept: dict[nn.Module, tuple[float | None, Tensor | None]] = {}
        for path, module in root.named_modules():
            if isinstance(module, _BatchNorm):
                module.register_forward_pre_hook(self._before)
                module.register_forward_hook(
                    self._after, always_call=True
                )  # PyTorch ends a recomputation with an exception
            elif any("running" in buffer for buffer, _ in module.named_buffers(recurse=False)):
                raise _refusal(name, f"{path} has running statistics that would be updated twice")

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context manager for the first pass."""
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
    """Enable checkpointing for a timm model's blocks with `set_grad_checkpointing`.

    Raises:
        UserError: the model does not support checkpointing, or would train differently with it.
    """
    switch: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        if switch is None:
            raise _refusal(name, "timm does not support it for this model")
        switch(True)
    except AssertionError as error:  # timm's error for models without support
        raise _refusal(name, str(error) or "timm does not support it") from error
    return FirstPass(model, name)


def last_called(module: nn.Module) -> nn.Module:
    """The last module inside nested `nn.Sequential` modules, whose blocks timm calls one by one."""
    while type(module).forward is nn.Sequential.forward and len(children := list(module.children())):
        module = children[-1]
    return module


def recomputed(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """`function(*args)`, recomputed in the backward pass."""
    output: Tensor = checkpoint(function, *args, use_reentrant=False)
    return output


def check_tapped(tapped: Tensor, name: str) -> None:
    """Raise `UserError` if a feature map does not require a gradient."""
    if torch.is_grad_enabled() and not tapped.requires_grad:
        raise _refusal(name, "a feature map inside a recomputed block has no gradient")


def _refusal(name: str, reason: str) -> UserError:
    return UserError(
        f"this student does not support activation checkpointing: {reason}",
        got=f"student.grad_checkpointing=true with {name}",
        fix="set --student.grad_checkpointing=false, or lower train.micro_batch_size",
    )
