"""The engine at ZeRO 0 in this process (stages 1 to 3 in another one), and the functions that set it up."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_cache import CPU, SAMPLES, shared_cache
from torch import nn

from scalekd_cache.config import DistillConfig, OptimConfig, StudentConfig, TrainConfig, to_plain
from scalekd_cache.distill import make_heads
from scalekd_cache.engine import (
    STUDENT_FILE,
    DistillModel,
    Trainer,
    consolidated_student,
    deepspeed_config,
    make_optimizer,
    make_schedule,
    scaled_lr,
    start_processes,
)
from scalekd_cache.errors import UserError
from scalekd_cache.loader import CacheLoader
from scalekd_cache.order import Order
from scalekd_cache.processes import Process
from scalekd_cache.report import RunFolder
from scalekd_cache.student import build_student
from scalekd_cache.tail_file import load_tail
from scalekd_cache.teacher_spec import TeacherSpec

USED, GLOBAL, MICRO = 48, 16, 8
STEPS = USED // GLOBAL


def config_of(*, train=None, optim=None, student="resnet10t") -> DistillConfig:
    small = {"epochs": 2, "global_batch_size": GLOBAL, "micro_batch_size": MICRO, "log_every": 1, "shuffle_block": 8}
    adam = {"name": "adamw", "lr": 1e-3, "base_batch_size": GLOBAL}
    return DistillConfig(
        student=StudentConfig(name=student),
        optim=OptimConfig(**{**adam, **(optim or {})}),
        train=TrainConfig(**{**small, **(train or {})}),
    )


def trainer_of(config: DistillConfig) -> Trainer:
    cache, train = shared_cache(), config.train
    torch.manual_seed(train.seed)
    student = build_student(config.student, num_classes=10, image_size=64)
    tail = heads = None
    if train.targets != "none":
        tail = load_tail(cache.root / "tail.safetensors", TeacherSpec.from_json(cache.manifest.teacher["spec"]))
        heads = make_heads(config, student, tail)
    order = Order(num_samples=USED, block=train.shuffle_block, window=train.shuffle_window, seed=train.seed)
    loader = CacheLoader(
        cache, order, epochs=train.epochs, global_batch=train.global_batch_size, micro_batch=train.micro_batch_size
    )
    return Trainer(config, CPU, loader, DistillModel(config, student, heads), tail, None, cache.manifest.codec)


@pytest.fixture(scope="session")
def processes():
    start_processes(CPU)


class Lines:
    """A run folder that keeps the lines."""

    def __init__(self):
        self.steps, self.lines = [], []

    def log(self, step, values):
        self.steps.append(step)
        self.lines.append(dict(values))

    def column(self, name):
        return [line[name] for line in self.lines]


def finish(trainer: Trainer) -> Lines:
    lines = Lines()
    list(trainer.train(lines))
    return lines


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 32), (2, 16), (16, 2)])
def test_world_size_changes_accumulation_only(world_size, accumulation):
    config = config_of(train={"global_batch_size": 256}, optim={"clip_norm": 2.5})
    made = deepspeed_config(config, CPU._replace(world_size=world_size))
    assert made["train_batch_size"] == 256
    assert made["train_micro_batch_size_per_gpu"] == MICRO
    assert made["gradient_accumulation_steps"] == accumulation
    assert made["gradient_clipping"] == 2.5
    assert made["torch_autocast"] == {"enabled": False, "dtype": "bfloat16"}


def test_a_deepspeed_file_is_merged_below(tmp_path):
    file = tmp_path / "ds.json"
    config = config_of(train={"zero": 2, "deepspeed": str(file), "precision": "bfloat16"})
    own = {"reduce_bucket_size": 1000, "stage": 1}
    file.write_text(json.dumps({"zero_optimization": own, "wall_clock_breakdown": True, "train_batch_size": GLOBAL}))
    made = deepspeed_config(config, CPU)
    assert made["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 2}
    assert made["wall_clock_breakdown"] is True
    assert made["torch_autocast"]["enabled"] is True


@pytest.mark.parametrize(
    "given",
    [{"train_batch_size": 64}, {"gradient_clipping": 1.0}, {"bf16": {"enabled": True}}, {"fp16": {}}, {"optimizer": {}},
     {"scheduler": {}}, {"torch_autocast": {"enabled": True}}, {"gradient_accumulation_steps": 7}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_keys_that_the_recipe_decides_are_refused(tmp_path, given):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match="what the recipe decides") as error:
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)
    assert next(iter(given)) in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_a_deepspeed_file_that_is_none_is_refused(tmp_path, text):
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match="DeepSpeed JSON cannot be read"):
        deepspeed_config(config_of(train={"deepspeed": str(file)}), CPU)


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_weight_decay_reaches_the_weights_it_is_meant_for(name, decay_all):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optim = OptimConfig(name=name, weight_decay=0.02, decay_norm_and_bias=decay_all, momentum=0.8)
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
    for step in (20, 21, 50, 99):
        assert found[step] == pytest.approx(0.04 + 0.5 * (0.4 - 0.04) * (1 + math.cos(math.pi * step / 100)))
    assert rates(OptimConfig(), 100, 10)[0] == pytest.approx(0.4)


def test_steps_with_warm_up():
    found = rates(OptimConfig(schedule="step", step_epochs=3, warmup_epochs=0.5), 100, 10)
    for step in range(5):
        assert found[step] == pytest.approx(0.4 * step / 5)
    for step, power in ((5, 0), (29, 0), (30, 1), (59, 1), (60, 2), (99, 3)):
        assert found[step] == pytest.approx(0.4 * 0.1**power)


def test_a_warm_up_longer_than_the_run_does_not_break_it():
    assert rates(OptimConfig(warmup_epochs=20), 5, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, found_last(5)])


def found_last(steps):
    return 0.2 * (1 + math.cos(math.pi * (steps - 1) / steps))


def test_the_learning_rate_is_scaled_to_the_batch():
    config = config_of(train={"global_batch_size": 64}, optim={"lr": 0.1, "base_batch_size": 256})
    assert scaled_lr(config) == pytest.approx(0.025)


def test_training(processes, tmp_path):
    """One run, looked at from all sides: students change, tails do not, and nothing frozen is saved."""
    trainer = trainer_of(config_of(optim={"warmup_epochs": 1}))
    before = trainer.student_state()
    tail_before = {name: value.clone() for name, value in trainer.tail.state_dict().items()}
    lines, epochs = Lines(), []
    for epoch in trainer.train(lines):
        epochs.append(epoch)
        assert trainer.loader.step == (epoch + 1) * STEPS
        trainer.save(tmp_path / "checkpoints")
    assert epochs == [0, 1]
    assert lines.steps == list(range(1, 2 * STEPS + 1))
    assert lines.column("epoch") == [0] * STEPS + [1] * STEPS
    expected = [0.0, 1e-3 / 3, 2e-3 / 3] + [5e-4 * (1 + math.cos(math.pi * step / 6)) for step in (3, 4, 5)]
    assert lines.column("lr") == pytest.approx(expected)
    terms = [name for name in lines.lines[0] if name not in ("epoch", "lr", "loss", "images_per_s", "data_wait")]
    assert len(terms) == 6
    for line in lines.lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
        assert 0 <= line["data_wait"] <= 1
    assert lines.column("loss")[-1] < lines.column("loss")[0]

    after = trainer.student_state()
    assert all(
        not torch.equal(before[name], after[name]) for name in after if name.endswith(("conv1.weight", "fc.bias"))
    )
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in trainer.tail.parameters())
    assert all(torch.equal(value, trainer.tail.state_dict()[name]) for name, value in tail_before.items())

    trained = set(trainer.engine.module.state_dict())
    assert {name.partition(".")[0] for name in trained} == {"student", "heads"}
    assert not [name for name in trained if "tail" in name or "teacher" in name]
    frozen = {tuple(value.shape): value for value in tail_before.values() if value.ndim > 1}
    folder = tmp_path / "checkpoints" / f"step-{2 * STEPS:08d}"
    saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    assert set(saved["module"]) == trained
    for value in saved["module"].values():
        assert tuple(value.shape) not in frozen or not torch.equal(value, frozen[tuple(value.shape)])
    student = load_file(folder / STUDENT_FILE)
    assert student.keys() == after.keys()
    assert all(torch.equal(student[name], after[name]) for name in after)
    plain = consolidated_student(trainer.config, after, 10, 64)
    assert not plain.training


def test_an_accumulated_gradient_is_the_mean_over_micro_batches(processes):
    """One SGD step on two micro-batches equals the same step computed by hand."""
    config = config_of(
        optim={"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}, train={"targets": "none"}
    )
    trainer = trainer_of(config)
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    batches = list(trainer.loader)[:2]
    trainer.loader.step = 0
    steps = trainer.train(Lines())
    original = trainer._step

    def only_one(step, iterator):
        if step == 1:
            raise InterruptedError
        return original(step, iterator)

    trainer._step = only_one
    with pytest.raises(InterruptedError):
        list(steps)
    moved = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    by_hand = trainer_of(config).model
    for batch in batches:
        (by_hand(batch.images, batch.labels, None, None).total / 2).backward()
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(parameter.detach(), start[name])
        torch.testing.assert_close(moved[name], start[name] - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_on_a_cpu(processes):
    trainer = trainer_of(config_of(train={"precision": "bfloat16", "epochs": 1}))
    seen = []
    trainer.model.student.model.conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    lines = finish(trainer)
    assert torch.bfloat16 in seen
    assert all(math.isfinite(value) for value in lines.column("loss"))
    norms = [module for module in trainer.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    for module in norms:
        assert module.weight.dtype == module.running_mean.dtype == torch.float32
    state = trainer.student_state()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_the_moving_average_is_what_leaves_the_run(processes, tmp_path):
    config = config_of(train={"ema_decay": 0.7, "epochs": 1, "targets": "none"})
    trainer = trainer_of(config)
    average = {name: value.clone() for name, value in trainer.student_state().items()}
    update = trainer.ema.update

    def follow(model, step):
        update(model, step)
        for name, value in model.named_parameters():
            average[name].lerp_(value.detach(), 0.3 if step > 1 else 1.0)  # timm starts after the first steps

    trainer.ema.update = follow
    finish(trainer)
    state, raw = trainer.student_state(), trainer.model.student.model.state_dict()
    for name, _ in trainer.model.student.model.named_parameters():
        torch.testing.assert_close(state[name], average[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(state[name], raw[name])
    trainer.save(tmp_path)
    other = trainer_of(dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=2)))
    assert other.resume(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in other.student_state().items())


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(processes, tmp_path):
    config = config_of(train={"epochs": 3, "keep_checkpoints": 2}, optim={"name": "sgd", "lr": 0.01})
    whole = trainer_of(config)
    assert not whole.resume(tmp_path)
    lines = Lines()
    for _ in whole.train(lines):
        whole.save(tmp_path)
    folders = sorted(path.name for path in tmp_path.glob("step-*"))
    assert folders == [f"step-{2 * STEPS:08d}", f"step-{3 * STEPS:08d}"]
    (tmp_path / "latest").write_text(folders[0])
    resumed = trainer_of(dataclasses.replace(config, train=dataclasses.replace(config.train, workers=2)))
    assert resumed.resume(tmp_path)
    assert resumed.loader.step == 2 * STEPS
    rest = finish(resumed)
    assert rest.steps == lines.steps[2 * STEPS :]
    assert rest.column("lr") == lines.column("lr")[2 * STEPS :]
    assert rest.column("loss") == pytest.approx(lines.column("loss")[2 * STEPS :], rel=1e-5)
    expected = whole.student_state()
    for name, value in resumed.student_state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_another_order_is_refused(processes, tmp_path):
    trainer = trainer_of(config_of(train={"epochs": 1, "targets": "none"}))
    finish(trainer)
    trainer.save(tmp_path)
    with pytest.raises(UserError, match="another order"):
        trainer_of(config_of(train={"epochs": 1, "targets": "none", "shuffle_block": 16})).resume(tmp_path)


def test_a_loss_that_is_not_finite_names_the_step_and_is_never_saved(processes, tmp_path):
    trainer = trainer_of(config_of(train={"log_every": 10}))
    original, calls = trainer._targets, []

    def broken(batch):
        calls.append(1)
        targets = original(batch)
        return targets._replace(logits=targets.logits * float("nan")) if len(calls) == 4 else targets

    trainer._targets = broken
    folder = RunFolder(tmp_path / "run", to_plain(trainer.config))
    folder.start_metrics(0)
    with pytest.raises(UserError, match="loss is not finite") as error:
        for _ in trainer.train(folder):
            trainer.save(tmp_path)
    assert f"step {STEPS}" in str(error.value)
    assert "logit" in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list(tmp_path.glob("step-*"))


ZERO = """
import sys, torch
sys.path[:0] = [{tests!r}]
from test_engine import CPU, Lines, config_of, finish, start_processes, trainer_of
from scalekd_cache.student import build_student
start_processes(CPU)
results = {{}}
for stage in (0, 1, 2, 3):
    config = config_of(train={{"zero": stage, "epochs": 1}}, optim={{"warmup_epochs": 1}})
    trainer = trainer_of(config)
    shapes = {{n: v.shape for n, v in build_student(config.student, num_classes=10, image_size=64).model.state_dict().items()}}
    lines = finish(trainer)
    state = trainer.student_state()
    assert {{n: v.shape for n, v in state.items()}} == shapes, stage
    assert not [n for n in trainer.engine.module.state_dict() if "tail" in n], stage
    results[stage] = lines.column("lr"), lines.column("loss"), state
    if stage == 3:
        trainer.save(__import__("pathlib").Path({folder!r}))
        again = trainer_of(config)
        assert again.resume(__import__("pathlib").Path({folder!r}))
        assert all(torch.equal(v, state[n]) for n, v in again.student_state().items())
for stage in (1, 2, 3):
    assert results[stage][0] == results[0][0] and len(set(results[0][0])) == 3, (stage, results[stage][0])
    for mine, plain in zip(results[stage][1], results[0][1], strict=True):
        assert abs(mine - plain) < 1e-3 * abs(plain), (stage, results[stage][1], results[0][1])
    for name, value in results[stage][2].items():
        torch.testing.assert_close(value, results[0][2][name], rtol=1e-2, atol=1e-3)
print("all stages agree")
"""


def test_all_zero_stages_train_alike(tmp_path):
    script = ZERO.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "checkpoints"))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all stages agree" in done.stdout


def test_micro_batches_must_be_shared_evenly():
    with pytest.raises(UserError, match="cannot be shared evenly"):
        CacheLoader(
            shared_cache(), Order(num_samples=SAMPLES, block=8, window=8, seed=0), epochs=1, global_batch=32,
            micro_batch=16, world_size=3,
        )  # fmt: skip


def test_process_is_a_plain_tuple():
    assert Process(0, 1, torch.device("cpu")) == CPU
