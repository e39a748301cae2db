"""Gathers a sharded optimizer's state into full tensors, one per parameter, and scatters it back.

In: a DeepSpeed engine at any ZeRO stage. Out: `{"exp_avg/<parameter>": tensor of the parameter's shape}`, and scalars.
Invariant: state gathered at any world size and ZeRO stage can be scattered to any other world size and stage.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Numbers = dict[str, float]
"""Optimizer scalars shared by all parameters, such as the number of steps."""


class Fragment(NamedTuple):
    """A contiguous part of one parameter in this rank's optimizer."""

    flat: Tensor
    """The tensor that keys the optimizer's state: the parameter, or a flat partition of multiple parameters."""
    start: int
    """Offset of the part in `flat`."""
    offset: int
    """Offset of the part in the flattened parameter."""
    length: int


def fragments(engine: Any, parameter: nn.Parameter, zero: int) -> Iterator[Fragment]:
    """Yield the part of a parameter held by this rank's optimizer, if any."""
    optimizer = engine.optimizer
    if zero == 0:
        yield Fragment(parameter, 0, 0, parameter.numel())
    elif zero < 3:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            ours, theirs = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Fragment(flat, ours.start, theirs.start, ours.numel)
    else:
        group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = dist.get_rank() * length
        numel: int = parameter.ds_numel  # type: ignore[attr-defined]
        left = min(length, numel - offset)  # the last part may be padded
        if left > 0:
            yield Fragment(optimizer.fp32_partitioned_groups_flat[group], start, offset, left)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer wrapped by DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def gather_weights(engine: Any, model: nn.Module, zero: int, device: torch.device) -> dict[str, Tensor]:
    """Every parameter on the CPU, the same on every rank; trainable ones in float32."""
    if zero < 3:
        return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}
    return {
        name: _gathered(engine, value, zero, device, None) if value.requires_grad else _frozen(value)
        for name, value in model.named_parameters()
    }


def _frozen(parameter: nn.Parameter) -> Tensor:
    """A parameter that the optimizer does not have, gathered from all ranks."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def gather_state(
    engine: Any, model: nn.Module, zero: int, device: torch.device
) -> tuple[dict[str, Tensor], Numbers, Numbers]:
    """The optimizer's state: CPU tensors keyed by `key/parameter`, its scalars, and its parameter groups' scalars."""
    base = base_optimizer(engine)
    known: dict[str, Any] = next(iter(base.state.values()), {})
    keys = [name for name, value in known.items() if torch.is_tensor(value) and value.ndim > 0]
    numbers = {name: float(value) for name, value in known.items() if value is not None and name not in keys}
    counts = {name: float(base.param_groups[0][name]) for name in ("step",) if name in base.param_groups[0]}
    tensors = {
        f"{key}/{name}": _gathered(engine, value, zero, device, key)
        for name, value in model.named_parameters()
        if value.requires_grad
        for key in keys
    }
    return tensors, numbers, counts


def _gathered(engine: Any, parameter: nn.Parameter, zero: int, device: torch.device, key: str | None) -> Tensor:
    """One full tensor from the optimizer's state (if `key` is None, from the weights), gathered from all ranks."""
    shape = parameter.ds_shape if zero == 3 else parameter.shape  # type: ignore[attr-defined]
    whole = torch.zeros(int(torch.Size(shape).numel()), device=device)
    state = base_optimizer(engine).state
    for flat, start, offset, length in fragments(engine, parameter, zero):
        held = flat if key is None else state[flat][key]
        whole[offset : offset + length] = held.detach().flatten()[start : start + length]
    if zero > 0:
        dist.all_reduce(whole)
    return whole.view(shape).cpu()


@torch.no_grad()
def scatter_state(
    engine: Any, model: nn.Module, zero: int, tensors: Mapping[str, Tensor], numbers: Numbers, counts: Numbers
) -> None:
    """Load state returned by `gather_state` into a new engine's optimizer."""
    base = base_optimizer(engine)
    keys = sorted({name.partition("/")[0] for name in tensors})
    for name, parameter in model.named_parameters():
        for flat, start, offset, length in fragments(engine, parameter, zero) if parameter.requires_grad else ():
            held = base.state[flat]
            for key in keys:
                if key not in held:
                    held[key] = torch.zeros_like(flat)
                whole = tensors[f"{key}/{name}"]
                if flat is parameter:  # its memory layout may be channels-last
                    held[key].copy_(whole)
                else:
                    held[key][start : start + length] = whole.flatten()[offset : offset + length]
            held.update({key: torch.tensor(value) for key, value in numbers.items()})
    for group in base.param_groups:
        group.update({key: int(value) for key, value in counts.items()})
