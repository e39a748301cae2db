"""Counts reads from the device and waits in a real training loop; provides an engine for any device."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from commands import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select, aten._unique2)
"""Operators whose result the host needs: on a GPU each waits for everything enqueued before it."""
PACKAGE, LIBRARIES = ROOT / "scalekd_cache", Path(torch.__file__).parents[1]
HOST_READS = "_get_value"
"""Function of torch and timm that reads an optimizer's number of steps, a host tensor on a GPU machine too."""


def caller(*also):
    """The function of this project, or of the libraries `also`, that is being executed: "trainer.py Trainer._step"."""
    frame = sys._getframe(2)
    while frame is not None:
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname.partition(".<locals>")[0]
        for root in (PACKAGE, *(LIBRARIES / library for library in also)):
            if file.is_relative_to(root):
                return f"{file.relative_to(root.parent if root != PACKAGE else root)} {name}"
        frame = frame.f_back
    return "elsewhere"


class ReadCounter(TorchDispatchMode):
    """Counts the operators whose result the host reads, by caller."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS and HOST_READS not in (sys._getframe(n).f_code.co_name for n in range(1, 5)):
            self.reads[caller("deepspeed")] += 1
        return func(*args, **(kwargs or {}))


class PlainEngine:
    """The part of DeepSpeed's engine that the trainer uses at ZeRO 0, on any device."""

    def __init__(self, model, optimizer, accumulation):
        self.module, self.optimizer, self.accumulation, self.micros = model, optimizer, accumulation, 0

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss):
        (loss / self.accumulation).backward()

    def step(self):
        self.micros += 1
        if self.micros % self.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def counted_calls(monkeypatch, owner, name, replaced=None):
    """Counts the calls of a function in a list; calls `replaced` instead."""
    calls, original = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(caller("deepspeed"))
        return (replaced or original)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield calls
