"""Activation checkpointing: the same losses, gradients and statistics as without it, or an error."""

import dataclasses

import pytest
import torch
from small_cache import CPU
from small_trainer import config_of, finish, trainer_of
from torch import nn

from scalekd_cache.config.stage2 import DistillConfig, ScaleKDConfig, StudentConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.activation_checkpointing import FirstPass
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.heads import ScaleKDHeads
from scalekd_cache.training.trainer import start_processes

torch.set_num_threads(1)
STUDENTS = ["resnet18", "resnet50", "mobilenetv1", "convnext_atto", "swin_tiny", "vit_tiny_patch16_224", "mixer_s16"]


@pytest.fixture(scope="session")
def processes():
    start_processes(CPU)


def passes(name, grad_checkpointing, steps=2, **options):
    """Losses, gradients, buffers and bytes kept for the backward pass of a few training steps of student and heads."""
    torch.manual_seed(0)
    config = StudentConfig(name=name, grad_checkpointing=grad_checkpointing, **options)
    student = build_student(config, num_classes=5, image_size=64)
    heads = ScaleKDHeads(ScaleKDConfig(), student.tap_shapes, (24, 4, 4), (48, 2, 2), student.layer_norm)
    tail = nn.Conv2d(24, 48, 2, 2).requires_grad_(False)
    if grad_checkpointing:
        heads.checkpoint_gradients()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        output = student(torch.randn(4, 3, 64, 64))
        maps = heads(output.s3, output.s4, tail)
        loss = output.logits.square().mean() + sum(part.square().mean() for part in maps[:4])
        loss.backward()
        losses.append(loss.item())
    modules = nn.ModuleList([student.model, heads])
    gradients = {name: value.grad for name, value in modules.named_parameters()}
    return losses, gradients, dict(modules.named_buffers()), student


@pytest.mark.parametrize("name", STUDENTS)
def test_numbers_are_those_of_a_run_that_keeps_everything(name):
    """Drop path is on if the model has it: the recomputation must drop the same paths."""
    options = {} if name.startswith("mobilenet") else {"drop_path": 0.3}
    plain, ours = passes(name, False, **options), passes(name, True, **options)
    assert ours[0] == plain[0]
    assert plain[0][0] != plain[0][1]
    for expected, got in zip(plain[1:3], ours[1:3], strict=True):
        assert expected.keys() == got.keys()
        assert all(value is not None and torch.equal(value, got[key]) for key, value in expected.items())
    counts = [value.item() for key, value in ours[2].items() if key.endswith("num_batches_tracked")]
    assert set(counts) <= {2}
    assert bool(counts) is not ours[3].layer_norm
    state = ours[3].model.state_dict()
    assert state.keys() == plain[3].model.state_dict().keys()
    for module in ours[3].modules():
        assert not isinstance(module, nn.BatchNorm2d) or module.momentum == 0.1


def test_it_keeps_less():
    kept = {False: 0, True: 0}
    for on in kept:

        def count(value, on=on):
            kept[on] += value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            passes("resnet18", on, steps=1)
    assert 0 < kept[True] < kept[False] / 2


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_logs_the_same_losses(processes, zero):
    def losses_and_student(on):
        config = config_of(train={"zero": zero, "epochs": 1})
        student = StudentConfig(name="test_resnet", grad_checkpointing=on)
        trainer = trainer_of(dataclasses.replace(config, student=student))
        return finish(trainer).column("loss"), trainer.student_state()

    plain, ours = losses_and_student(False), losses_and_student(True)
    assert ours[0] == plain[0]
    assert all(torch.equal(value, ours[1][name]) for name, value in plain[1].items())


def test_what_cannot_be_equal_is_refused():
    with pytest.raises(UserError, match="activation checkpointing"):
        build_student(StudentConfig(name="dla34", grad_checkpointing=True), num_classes=5, image_size=64)
    with pytest.raises(UserError, match="SyncBatchNorm"):
        DistillConfig(student=StudentConfig(grad_checkpointing=True), train=TrainConfig(sync_bn=True))
    with pytest.raises(UserError, match="running statistics"):
        FirstPass(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), "a model")
