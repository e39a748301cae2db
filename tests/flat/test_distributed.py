"""Rank and device of this process, and communication between the processes of stage 1."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from commands import LIMIT_S

from scalekd_cache.distributed import EXIT_RESUMABLE, Peers, Process, this_process
from scalekd_cache.errors import RunInterrupted

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


def test_a_process_alone_waits_for_nobody():
    peers = Peers(Process(0, 1, CPU))
    assert [peers.add("claims", 1) for _ in range(3)] == [1, 2, 3]
    assert peers.add("other", 5) == 5
    assert peers.wait("never published")
    peers.publish("x")


TWO = """
import time
from scalekd_cache.distributed import Peers, this_process
with Peers(this_process("cpu")) as peers:
    rank = peers.process.rank
    if rank == 0:
        time.sleep(0.5)
        peers.publish("go")
    peers.wait("go")
    mine = []
    while (number := peers.add("claims", 1) - 1) < 100:
        mine.append(number)
    print(mine)
    if rank == 1:
        time.sleep(1)  # process 0, which keeps the store, must not leave first
        print(peers.add("claims", 0))
"""


def test_two_processes_share_every_claim_and_the_first_leaves_last():
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
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    second, claims = outputs[1].splitlines()
    assert sorted(json.loads(outputs[0]) + json.loads(second)) == list(range(100))
    assert claims == "102"


@pytest.fixture
def store(monkeypatch):
    """A launcher's store, as torchrun provides; in a list, so that a test can remove it."""
    kept = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept[0].port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return kept


def peers_of(rank, timeout_s=1.0):
    return Peers(Process(rank, 2, CPU), timeout_s)


def test_a_slow_process_is_waited_for(store):
    with peers_of(0) as slow, peers_of(1) as other:
        later = threading.Timer(2.5, slow.publish, ("planned",))
        later.start()
        seen = []
        assert other.wait("planned", 0, lambda: seen.append(1))
        assert len(seen) > 2
        assert slow.wait("never published", 0)  # a rank does not wait for itself


def test_a_process_without_a_sign_of_life_is_given_up(store):
    with peers_of(0) as first:
        with peers_of(1) as second:
            second.publish("here")
            assert first.wait("here", 1)
        begun = time.monotonic()
        assert not first.wait("never", 1)
        assert 0.9 < time.monotonic() - begun < 10
        assert first.wait("here", 1)  # its published values remain
    with peers_of(1) as second, pytest.raises(RunInterrupted, match="no heartbeat from rank 0") as stop:
        second.wait("never")
    assert stop.value.exit_code == EXIT_RESUMABLE


def test_without_a_store_a_process_ends_and_asks_for_a_restart(store):
    peers = peers_of(1)
    assert peers.add("claims", 1) == 1
    store.clear()
    for call in (lambda: peers.add("claims", 1), lambda: peers.publish("x"), lambda: peers.wait("x")):
        with pytest.raises(RunInterrupted, match="rerun the same command") as stop:
            call()
        assert stop.value.exit_code == EXIT_RESUMABLE
    assert peers.get("x") is None
