"""Who this process is, and what stage 1's processes tell each other."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from scalekd_cache.errors import UserError
from scalekd_cache.processes import Peers, Process, autocast_dtype, this_process

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_alone_without_a_launcher():
    assert this_process("cpu") == Process(0, 1, CPU)


def test_the_launcher_says_who_this_is(monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert this_process("cpu") == Process(3, 4, CPU)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_process("cuda").device == torch.device("cuda", 1)
    assert this_process("cuda:0").device == torch.device("cuda", 0)
    assert chosen == [1, 0]
    with pytest.raises(UserError, match="not there") as error:
        this_process("cuda:2")
    assert "one of 2 devices" in str(error.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_process("auto").device == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_process("auto").device == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "", "cuda:-1"])
def test_unknown_devices(name):
    with pytest.raises(UserError, match="unknown device"):
        this_process(name)


def test_precision():
    assert autocast_dtype("auto", CPU) == torch.float32
    assert autocast_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
    assert autocast_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_a_process_alone_waits_for_nobody():
    peers = Peers(Process(0, 1, CPU))
    assert [peers.add("claims", 1) for _ in range(3)] == [1, 2, 3]
    assert peers.add("other", 5) == 5
    peers.wait("never announced")
    peers.announce("x")


TWO = """
import sys, time, torch
from scalekd_cache.processes import Peers, this_process
peers = Peers(this_process("cpu"))
rank = peers.process.rank
if rank == 0:
    time.sleep(0.5)
    peers.announce("go")
peers.wait("go")
mine = []
while (number := peers.add("claims", 1) - 1) < 100:
    mine.append(number)
peers.announce(f"{rank} done")
for other in range(2):
    peers.wait(f"{other} done")
print(mine, peers.add("claims", 0))
peers.announce(f"{rank} out")
if rank == 0:
    peers.wait("1 out")
"""


def test_two_processes_share_every_claim():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO],
            env={**os.environ, **address, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    shares = [eval(output.rpartition(" ")[0]) for output in outputs]
    assert sorted(shares[0] + shares[1]) == list(range(100))
    assert {output.rpartition(" ")[2].strip() for output in outputs} == {"102"}
