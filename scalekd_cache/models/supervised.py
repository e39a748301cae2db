"""The supervised training loop: a single pass over batches of labeled images.

In: a model, batches, a loss, an optimizer and a schedule step. Out: the mean loss; the model is trained in place.
Invariant: gradients are clipped; a NaN or Inf loss raises an error before the weights are saved.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from scalekd_cache.errors import UserError

CLIP_NORM = 1.0
"""Maximum gradient norm after clipping."""


def train_epoch(
    forward: Callable[[Tensor], Tensor],
    parameters: Callable[[], Iterable[nn.Parameter]],
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[float], None],
) -> float:
    """Train on every batch once.

    Args:
        forward: normalized images (B, 3, H, W) -> logits (B, K).
        parameters: returns the parameters whose gradients are clipped.
        batches: normalized images and labels (B,) int64, on the model's device.
        loss_of: logits and labels -> mean loss.
        optimizer: the model's optimizer.
        after_step: called with the loss after every step, to update schedules, moving averages and progress bars.

    Returns:
        The mean loss over all batches.

    Raises:
        UserError: the loss became NaN or Inf.
    """
    losses = []
    for images, labels in batches:
        loss = loss_of(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss became NaN or Inf at batch {len(losses)}", fix="lower the learning rate")
        after_step(losses[-1])
    return sum(losses) / max(len(losses), 1)
