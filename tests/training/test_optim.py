"""Optimization: weight decay groups, schedules, learning rate scaling, and rejected options."""

import math

import pytest
import torch
from torch import nn

from scalekd_cache.config.stage2 import DistillConfig, OptimConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.training.optim import (
    describe_lr,
    make_optimizer,
    make_schedule,
    parameter_groups,
    scaled_lr,
    schedule_step,
    synchronize_batchnorm,
)

torch.set_num_threads(1)
EPOCH = 4


def names_without_decay(no_decay: str) -> set[str]:
    student = build_student(StudentConfig(name="vit_tiny_patch16_224"), num_classes=5, image_size=32)
    heads = ScaleKDHeads(ScaleKDConfig(), student.tap_shapes, (192, 2, 2), (192, 2, 2), layer_norm=True)
    model = nn.ModuleDict({"student": student, "heads": heads})
    groups = parameter_groups(model, OptimConfig(no_decay=no_decay, weight_decay=0.05))
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name for name, p in model.named_parameters() if id(p) in spared}


def test_decay_filters():
    assert names_without_decay("nothing") == set()
    position = names_without_decay("position")
    assert {"student.model.pos_embed", "student.model.cls_token", "heads.s3.spatial.pos_embed"} <= position
    assert len(position) == 2 + 4
    all_spared = names_without_decay("norm_bias_position")
    assert position < all_spared
    assert {"student.model.norm.weight", "heads.s4.frequency.pos_attention.k.bias"} <= all_spared
    assert not {"student.model.head.weight", "heads.s3.spatial.query", "heads.s3.spatial.ffn.0.weight"} & all_spared


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_every_optimizer_steps(name):
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, OptimConfig(name=name, weight_decay=0.1, momentum=0.5), lr=0.1)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0.5
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_what_a_recipe_leaves_to_the_optimizer_is_upstreams():
    def defaults(name: str) -> dict[str, object]:
        return make_optimizer(nn.Linear(3, 2), OptimConfig(name=name), lr=0.1).param_groups[0]

    assert (defaults("sgd")["nesterov"], defaults("sgd")["dampening"]) == (False, 0)
    assert (tuple(defaults("adamw")["betas"]), defaults("adamw")["eps"]) == ((0.9, 0.999), 1e-8)
    lamb = defaults("lamb")
    assert (tuple(lamb["betas"]), lamb["eps"], lamb["max_grad_norm"]) == ((0.9, 0.999), 1e-6, 1.0)
    assert not lamb["trust_clip"]
    assert not lamb["always_adapt"]


def rates(optim: OptimConfig, epochs: int, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make_schedule(optimizer, optim, lr, epochs * EPOCH, EPOCH)
    seen = []
    for step in range(epochs * EPOCH):
        schedule.step_update(schedule_step(optim, step, EPOCH))
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_upstreams_cosine_is_held_within_epochs_and_starts_after_the_warm_up():
    optim = OptimConfig(warmup_epochs=2, warmup_start=0.25, min_lr=0.01, schedule_per_epoch=True)
    seen = rates(optim, epochs=10)
    assert seen[:8] == pytest.approx([0.25 + 0.75 * step / 8 for step in range(8)])
    for epoch in range(2, 10):
        expected = 0.01 + 0.99 * (1 + math.cos(math.pi * (epoch - 2) / 8)) / 2
        assert seen[epoch * EPOCH : (epoch + 1) * EPOCH] == pytest.approx([expected] * EPOCH)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant", "restarts"])
@pytest.mark.parametrize("warm", [0.25, 0.5, 2.5])
def test_a_warm_up_that_ends_within_an_epoch_reaches_the_full_rate(schedule, warm):
    """The rest of that epoch has the full rate, and no later rate is that of a warm-up step."""
    optim = OptimConfig(schedule=schedule, warmup_epochs=warm, schedule_per_epoch=True, step_epochs=5, cycle_epochs=8)
    seen, first = rates(optim, epochs=8), round(warm * EPOCH)
    end = math.ceil(warm) * EPOCH
    assert seen[:first] == pytest.approx([step / first for step in range(first)])
    assert seen[first:end] == pytest.approx([1.0] * (end - first))
    assert all(len({round(rate, 9) for rate in seen[at : at + EPOCH]}) == 1 for at in range(end, len(seen), EPOCH))


def test_cosine_by_step_and_steps_of_ten():
    smooth = rates(OptimConfig(), epochs=5)
    assert smooth == pytest.approx([(1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)])
    stairs = rates(OptimConfig(schedule="step", step_epochs=2), epochs=5)
    assert stairs == pytest.approx([1.0] * 8 + [0.1] * 8 + [0.01] * 4)


def test_learning_rate_is_scaled_and_reported():
    config = DistillConfig(
        optim=OptimConfig(name="lamb", lr=5e-3, base_batch_size=2048),
        train=TrainConfig(global_batch_size=512, micro_batch_size=64),
    )
    assert scaled_lr(config) == pytest.approx(1.25e-3)
    assert describe_lr(config) == (
        "lamb: learning rate 0.005 x 512 / 2048 = 0.00125 (global batch 512, micro-batches of 64)"
    )


def test_sync_bn_is_refused_on_a_cpu():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(UserError, match=r"needs a GPU[\s\S]*sync_bn=false"):
        synchronize_batchnorm(model, Process(0, 1, torch.device("cpu")))
    assert isinstance(synchronize_batchnorm(model, Process(0, 1, torch.device("cuda", 0)))[0], nn.SyncBatchNorm)
