"""Builds a recipe's optimizer, schedule and DeepSpeed configuration.

In: a `DistillConfig`. Out: timm's optimizer and schedule, and DeepSpeed's configuration.
Invariant: the user's DeepSpeed JSON can add to a recipe but not contradict it. deepspeed is not imported here.
"""

import dataclasses
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig
from scalekd_cache.devices import autocast_dtype
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import read_json

POSITION_NAMES = ("pos_embed", "cls_token", "relative_position_bias_table")
"""Substrings of positional parameter names in students and heads."""
WHAT = "the DeepSpeed JSON"
DEEPSPEED_BYTES = 1 << 20
NEVER = 1 << 62
"""Larger than the number of steps or cycles in any run."""


def deepspeed_config(config: DistillConfig, process: Process) -> dict[str, Any]:
    """A run's DeepSpeed configuration: the user's JSON combined with the recipe."""
    train = config.train
    given: dict[str, Any] = {}
    if train.deepspeed:
        given, _ = read_json(train.deepspeed, WHAT, DEEPSPEED_BYTES, "check train.deepspeed")
        if not isinstance(given.get("zero_optimization", {}), dict):
            raise UserError(f"zero_optimization in {WHAT} is not an object", where=train.deepspeed)
    low = autocast_dtype(train.precision, process.device) == torch.bfloat16
    own: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // train.micro_batch_size // process.world_size,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {**given.get("zero_optimization", {}), "stage": train.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the recipe's optimizer is also used when offloaded
        # No "safe" modules: their weight gradients would be averaged across ranks in bfloat16, except at ZeRO 0.
        "torch_autocast": {"enabled": low, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "timers": {"throughput": {"enabled": False}},  # it would synchronize with the device twice per micro-batch
        "steps_per_print": 10**9,
    }
    decided = own.keys() - {"zero_optimization"}
    clash: list[str] = [name for name in given if name in decided and given[name] != own[name]]
    forbidden: list[str] = [name for name in ("bf16", "fp16", "optimizer", "scheduler") if name in given]
    if clash or forbidden:
        raise UserError(
            "the DeepSpeed JSON conflicts with the recipe",
            got=", ".join(clash + forbidden),
            expected="only settings that the recipe does not control",
            where=train.deepspeed,
            fix="remove these keys; set precision, optimizer and batch sizes with the train and optim options",
        )
    return {**given, **own}


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, with and without weight decay (see `optim.no_decay`)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        position = any(part in name for part in POSITION_NAMES)
        flat = parameter.ndim <= 1 or name.endswith(".bias")
        spared = (position and optim.no_decay != "nothing") or (flat and optim.no_decay == "norm_bias_position")
        if parameter.requires_grad:
            groups[not spared].append(parameter)
    decay = {True: optim.weight_decay, False: 0.0}
    return [{"params": groups[on], "weight_decay": decay[on]} for on in (False, True) if groups[on]]


def make_optimizer(model: nn.Module, optim: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimizer, from timm."""
    momentum = {"momentum": optim.momentum} if optim.name == "sgd" else {}
    name = "momentum" if optim.name == "sgd" else optim.name  # timm's "sgd" uses Nesterov momentum; upstream does not
    groups = parameter_groups(model, optim)
    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=name, lr=lr, **momentum)
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig, lr: float, steps: int, epoch: int) -> Scheduler:
    """The recipe's schedule, from timm, in optimizer steps. `epoch` is the number of steps per epoch. As upstream, the
    cosine starts at the full rate after warm-up. A step schedule lowers the rate at multiples of `step_epochs`, with or
    without warm-up. With a cosine, a warm-up that is longer than the run is shortened. The other schedules do not
    depend on `steps`.
    """
    warm = round(optim.warmup_epochs * epoch)
    warm = min(warm, steps - 1) if optim.schedule == "cosine" else warm
    warmup = {"warmup_t": warm, "warmup_lr_init": optim.warmup_start * lr, "t_in_epochs": False}
    if optim.schedule in ("step", "constant"):
        drop = optim.step_epochs * epoch if optim.schedule == "step" else NEVER
        return StepLRScheduler(optimizer, decay_t=drop, decay_rate=0.1, warmup_prefix=False, **warmup)
    if optim.schedule == "restarts":
        cycle = {"t_initial": optim.cycle_epochs * epoch, "cycle_limit": NEVER}
        return CosineLRScheduler(optimizer, lr_min=optim.min_lr * lr, warmup_prefix=True, **cycle, **warmup)
    return CosineLRScheduler(optimizer, t_initial=steps - warm, lr_min=optim.min_lr * lr, warmup_prefix=True, **warmup)


def schedule_step(optim: OptimConfig, step: int, epoch: int) -> int:
    """The step at which the schedule is evaluated for `step`: `step` itself during warm-up, or the first step of the
    epoch, but not a step of the warm-up, if the rate is constant within epochs."""
    warm = round(optim.warmup_epochs * epoch)
    return max(step // epoch * epoch, warm) if optim.schedule_per_epoch and step >= warm else step


def synchronize_batchnorm(model: nn.Module, process: Process) -> nn.Module:
    """Convert the model's BatchNorm layers to SyncBatchNorm across all ranks.

    Raises:
        UserError: the device is a CPU.
    """
    if process.device.type != "cuda":
        raise UserError(
            "train.sync_bn needs a GPU: PyTorch's SyncBatchNorm does not run on a CPU",
            got=f"train.sync_bn=true on {process.device}",
            fix="set --train.sync_bn=false: BatchNorm then uses each micro-batch's statistics",
        )
    synchronized: nn.Module = convert_sync_batchnorm(model)
    return synchronized


def scaled_lr(config: DistillConfig) -> float:
    """The learning rate scaled linearly to the global batch size."""
    return config.optim.lr * config.train.global_batch_size / config.optim.base_batch_size


def describe_lr(config: DistillConfig) -> str:
    """One line of text about the scaled learning rate."""
    optim, batch = config.optim, config.train.global_batch_size
    return (
        f"{optim.name}: learning rate {optim.lr:g} x {batch} / {optim.base_batch_size} = {scaled_lr(config):g} "
        f"(global batch {batch}, micro-batches of {config.train.micro_batch_size})"
    )


def learning_rate(config: DistillConfig, step: int, per_epoch: int) -> float:
    """The learning rate at a step; steps are numbered from 0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=scaled_lr(config))
    steps = config.train.epochs * per_epoch
    schedule = make_schedule(optimizer, config.optim, scaled_lr(config), steps, per_epoch)
    schedule.step_update(schedule_step(config.optim, step, per_epoch))
    return float(optimizer.param_groups[0]["lr"])


def describe_extension(config: DistillConfig, before: int, step: int, per_epoch: int) -> str:
    """One line of text about the schedule when a run with `before` epochs is extended after `step` steps."""
    optim, after = config.optim, config.train.epochs
    text = f"extending {config.run} from {before} to {after} epochs after step {step}: "
    if optim.schedule != "cosine" or step == 0:
        return text + f"with the {optim.schedule} schedule, the result is the same as {after} epochs from the start"
    old = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=before))
    rates = learning_rate(old, step - 1, per_epoch), learning_rate(config, step, per_epoch)
    old_rate, new_rate = (f"{rate:.3g}" for rate in rates)
    change = f"changes from {old_rate} to {new_rate}" if old_rate != new_rate else f"stays at {new_rate}"
    return text + (
        f"the cosine is recomputed for {after} epochs, so the learning rate {change}; a run with {after} epochs from "
        "the start would have had different learning rates so far (for an exact extension, use "
        "optim.schedule=restarts)"
    )
