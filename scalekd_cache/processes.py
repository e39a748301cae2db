"""Who this process is among its peers, as its launcher says (torchrun, deepspeed, or nobody).

In: the environment variables RANK, LOCAL_RANK, WORLD_SIZE. Out: `Process` and `Peers`.
Invariant: no process group is started here; stage 2's is DeepSpeed's (`engine.py`).
"""

import os
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed

from scalekd_cache.errors import UserError


class Process(NamedTuple):
    """One process of a job."""

    rank: int
    """Number of this process in the job."""
    world_size: int
    """Processes in the job."""
    device: torch.device
    """Where this process computes."""

    def say(self, text: str) -> None:
        """Print for the whole job, once."""
        if self.rank == 0:
            print(text, flush=True)


def this_process(device: str = "auto") -> Process:
    """Read the launcher's variables; without a launcher the job is this process alone.

    Raises:
        UserError: when the device does not exist here.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return Process(rank, world_size, _device(device, int(os.environ.get("LOCAL_RANK", "0"))))


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError("unknown device", got=name, expected="auto, cpu, cuda or cuda:N", fix="change device")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(
            "the CUDA device is not there",
            got=f"cuda:{index}",
            expected=f"one of {torch.cuda.device_count()} devices",
            fix="lower NPROC, or set device=cpu",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The arithmetic that "auto" means on a device: bfloat16 on a GPU, float32 on a CPU."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


class Peers:
    """What the processes of a job tell each other: claims, counts and milestones.

    torchrun's own key-value store carries it; a process alone needs none. There is no barrier: a rank may be slow.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self._counts: dict[str, int] = {}
        self._store: Any = None
        if process.world_size > 1:
            distributed: Any = torch.distributed
            store, _, _ = next(distributed.rendezvous("env://"))
            # Counters of a job that torchrun restarted begin anew.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = distributed.PrefixStore(f"scalekd_cache/{attempt}", store)

    def add(self, name: str, amount: int) -> int:
        """Add to a shared counter; returns the new value."""
        if self._store is not None:
            return int(self._store.add(name, amount))
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    def tell(self, name: str, value: str) -> None:
        """Leave a word for the others."""
        if self._store is not None:
            self._store.set(name, value)

    def told(self, name: str) -> str | None:
        """What a peer has left; None when it left nothing, or the one who keeps the words is gone."""
        try:
            there = self._store is not None and self._store.check([name])
            return self._store.get(name).decode() if there else None
        except RuntimeError:  # torch's DistStoreError and DistNetworkError
            return None

    def announce(self, name: str) -> None:
        """Say that a milestone is reached."""
        if self._store is not None:
            self._store.set(name, "1")

    def wait(self, name: str, hours: float = 240.0) -> None:
        """Wait until a peer has announced a milestone."""
        if self._store is not None:
            self._store.wait([name], timedelta(hours=hours))
