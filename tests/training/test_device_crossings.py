"""Where the real training loop crosses between host and device, and that nothing in it waits for the device.

There is no device here: meta tensors stand for it, and operators that would wait are counted on the CPU.
"""

import pytest
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from device_trace import DEVICE, DeviceTrace, PlainEngine, ReadCounter, counted_calls
from small_cache import CPU
from small_trainer import STEPS, Lines, config_of, trainer_of

from scalekd_cache.training.trainer import Trainer, start_processes

MICROS, LOGS = 2, 1
"""Micro-batches of a step, and logged steps (the last of an epoch)."""


@pytest.fixture(scope="module", autouse=True)
def processes():
    start_processes(CPU)


class MetaTrainer(Trainer):
    """The real trainer, loop and optimizer on meta tensors; DeepSpeed needs a real device."""

    def _initialize(self, model, optimizer):
        return PlainEngine(model, optimizer, MICROS)


IN_A_STEP = {("host to device", "loader/loader.py Batch.to"): 4 * MICROS}
AT_A_LOG = {
    ("device to host", "training/trainer.py Trainer._average"): 1,
    ("device to host", "training/watchdog.py Watchdog.first_nonfinite"): 1,
}
"""Every crossing of the loop, with its count: the four tensors of each micro-batch; the figures that are logged."""


@pytest.mark.parametrize(("targets", "optim"), [("cached", "adamw"), ("live", "sgd"), ("none", "lamb")])
def test_every_crossing_is_in_the_list(monkeypatch, targets, optim):
    """A whole epoch: the next batch, its targets, student, heads, losses, backward, optimizer, average, one log."""
    train = {"targets": targets, "epochs": 1, "log_every": 100}
    process = CPU._replace(device=DEVICE)
    trainer = trainer_of(config_of(train=train, optim={"name": optim}), process=process, kind=MetaTrainer)
    lines, per_step = Lines(), []
    with counted_calls(monkeypatch, dist, "all_reduce", lambda *args, **kwargs: None), DeviceTrace() as trace:
        for _ in trainer.train(lines):
            per_step.append(dict(trace.crossings))
            trace.crossings.clear()
    assert trace.mixed == []
    assert per_step == [IN_A_STEP] * (STEPS - 1) + [{**IN_A_STEP, **AT_A_LOG}]
    assert lines.steps == [STEPS]
    assert all(parameter.is_meta for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("zero", "optim"), [(0, "adamw"), (0, "sgd"), (0, "lamb"), (1, "adamw"), (2, "sgd"), (3, "sgd")]
)
def test_nothing_waits_between_logged_steps(monkeypatch, zero, optim):
    """With DeepSpeed's engine: no value is read, no synchronization and no exchange of ours until a logged step.

    At ZeRO 1 to 3, DeepSpeed reads the norm of the gradient, once or twice an optimizer step.
    """
    average = 0.5 if optim == "adamw" else 0.0
    train = {"zero": zero, "log_every": 100, "ema_decay": average, "epochs": 2, "log_samples": True}
    trainer = trainer_of(config_of(train=train, optim={"name": optim, "clip_norm": 5.0}))
    per_step = []
    with (
        counted_calls(monkeypatch, get_accelerator(), "synchronize") as waits,
        counted_calls(monkeypatch, dist, "all_reduce") as exchanges,
        ReadCounter() as counter,
    ):
        for _ in trainer.train(Lines()):
            assert trainer.signal_of_any_rank(0) == 0
            per_step.append((dict(counter.reads), len(waits), [name for name in exchanges if "deepspeed" not in name]))
            counter.reads.clear()
            waits.clear()
            exchanges.clear()
    unlogged = [found for step, found in enumerate(per_step, 1) if step % STEPS and step > 1]  # ZeRO 3 plans in step 1
    assert len(unlogged) == 2 * (STEPS - 1) - 1
    for reads, waited, exchanged in unlogged:
        assert (waited, exchanged) == (0, [])
        assert all(name.startswith("deepspeed/runtime") for name in reads)
        assert sum(reads.values()) <= (2 if zero else 0), reads
    assert "training/watchdog.py Watchdog.first_nonfinite" in per_step[STEPS - 1][0]
