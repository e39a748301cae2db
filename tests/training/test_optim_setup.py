"""Setup of the engine: DeepSpeed's configuration, optimizer, schedule (the trainer is in test_trainer.py)."""

import json
import math
import os

import pytest
import torch
from small_cache import CPU, SAMPLES, shared_cache
from small_trainer import GLOBAL, MICRO, config_of
from torch import nn

from scalekd_cache.config.stage2 import OptimConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.loader.order import Order
from scalekd_cache.training.optim import deepspeed_config, make_optimizer, make_schedule, scaled_lr


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 32), (2, 16), (16, 2)])
def test_world_size_changes_accumulation_only(world_size, accumulation):
    config = config_of(train={"global_batch_size": 256}, optim={"clip_norm": 2.5})
    made = deepspeed_config(config, CPU._replace(world_size=world_size))
    assert made["train_batch_size"] == 256
    assert made["train_micro_batch_size_per_gpu"] == MICRO
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["gradient_clipping"] == 2.5
    assert made["torch_autocast"]["enabled"] is False
    assert made["timers"] == {"throughput": {"enabled": False}}


def test_a_deepspeed_file_is_merged_below(tmp_path):
    file = tmp_path / "ds.json"
    config = config_of(train={"zero": 2, "deepspeed": str(file), "precision": "bfloat16"})
    own = {"reduce_bucket_size": 1000, "stage": 1}
    file.write_text(json.dumps({"zero_optimization": own, "wall_clock_breakdown": True, "train_batch_size": GLOBAL}))
    made = deepspeed_config(config, CPU)
    assert made["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 2}
    assert made["wall_clock_breakdown"] is True
    assert made["torch_autocast"]["enabled"] is True
    assert made["torch_autocast"]["lower_precision_safe_modules"] == []


@pytest.mark.parametrize(
    "given",
    [{"train_batch_size": 64}, {"gradient_clipping": 1.0}, {"bf16": {"enabled": True}}, {"fp16": {}}, {"optimizer": {}},
     {"scheduler": {}}, {"torch_autocast": {"enabled": True}}, {"gradient_accumulation_steps": 7}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_keys_that_the_recipe_decides_are_refused(tmp_path, given):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match="conflicts with the recipe") as error:
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)
    assert next(iter(given)) in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "endless"])
def test_a_deepspeed_file_that_is_no_small_file_is_refused(tmp_path, kind):
    file = tmp_path / "ds.json"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        with file.open("wb") as opened:
            opened.truncate(1 << 40)
    with pytest.raises(UserError, match=r"the DeepSpeed JSON is (not a regular file|too large)"):
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)


@pytest.mark.parametrize("value", [5, [], "2", None])
def test_deepspeed_options_of_another_type_are_refused(tmp_path, value):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": value}))
    with pytest.raises(UserError, match="zero_optimization in the DeepSpeed JSON is not an object"):
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_an_invalid_deepspeed_file_is_refused(tmp_path, text):
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="the DeepSpeed JSON is"):
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_weight_decay_reaches_the_weights_it_is_meant_for(name, decay_all):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optim = OptimConfig(
        name=name, weight_decay=0.02, no_decay="nothing" if decay_all else "norm_bias_position", momentum=0.8
    )
    optimizer = make_optimizer(model, optim, 0.3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.02 if decay_all or parameter.ndim > 1 else 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    if name == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def rates(optim, steps, epoch, lr=0.4):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make_schedule(optimizer, optim, lr, steps, epoch)
    found = []
    for step in range(steps):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_with_warm_up():
    found = rates(OptimConfig(warmup_epochs=2, warmup_start=0.25, min_lr=0.1), 100, 10)
    for step in (0, 1, 10, 19):  # linear from 0.25 x lr
        assert found[step] == pytest.approx(0.1 + (0.4 - 0.1) * step / 20)
    for step in (20, 21, 50, 99):  # then a cosine over the remaining steps
        assert found[step] == pytest.approx(0.04 + 0.5 * (0.4 - 0.04) * (1 + math.cos(math.pi * (step - 20) / 80)))
    assert rates(OptimConfig(), 100, 10)[0] == pytest.approx(0.4)


def test_steps_with_warm_up():
    found = rates(OptimConfig(schedule="step", step_epochs=3, warmup_epochs=0.5), 100, 10)
    for step in range(5):
        assert found[step] == pytest.approx(0.4 * step / 5)
    for step, power in ((5, 0), (29, 0), (30, 1), (59, 1), (60, 2), (99, 3)):
        assert found[step] == pytest.approx(0.4 * 0.1**power)


def test_a_warm_up_longer_than_the_run_does_not_break_it():
    assert rates(OptimConfig(warmup_epochs=20), 5, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_learning_rate_is_scaled_to_the_batch():
    config = config_of(train={"global_batch_size": 64}, optim={"lr": 0.1, "base_batch_size": 256})
    assert scaled_lr(config) == pytest.approx(0.025)


def test_micro_batches_must_be_shared_evenly():
    with pytest.raises(UserError, match="cannot be divided evenly"):
        CacheLoader(
            shared_cache(),
            Order(num_samples=SAMPLES, block=8, window=8, seed=0),
            epochs=1,
            global_batch=32,
            micro_batch=16,
            world_size=3,
        )
