"""How many processes a command starts."""

import pytest
import torch
from small_cache import shared_cache

from pipelines import distill, launcher
from scalekd_cache.errors import UserError
from scalekd_cache.loader.batch_size import usable_ranks


@pytest.mark.parametrize(("given", "nproc", "expected"), [
    ({}, None, 8), ({"device": "cuda"}, None, 8), ({}, 2, 2), ({"device": "cpu"}, None, None),
    ({"device": "cuda:3"}, None, None), ({"device": "cuda:0"}, 2, 2),
])  # fmt: skip
def test_every_visible_gpu_gets_a_process(monkeypatch, given, nproc, expected):
    """On a node with 8 GPUs, unless --nproc or --device says otherwise; None: the command runs in this process."""
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launcher, "ENVIRONMENT", {})
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 8)
    monkeypatch.setattr(launcher, "_torchrun", lambda options, count, command: started.append(count) or 0)
    options = launcher.LaunchConfig(nproc=nproc)
    code = launcher.launch(options, "distill", given, ["scalekd", "distill"], lambda given, nproc: None)
    assert (code, started) == ((None, []) if expected is None else (0, [expected]))


def test_no_more_processes_than_share_the_micro_batches(monkeypatch, capsys):
    """On a node with 8 GPUs, `distill` with a batch of 2 micro-batches uses 2; --nproc is not changed."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 8)
    command, given = distill.COMMAND, {"cache": str(shared_cache().root), "student.name": "resnet18"}
    given |= {"train.global_batch_size": "32", "train.micro_batch_size": "16"}
    assert launcher.processes_per_node(launcher.LaunchConfig(), given, command._fit) == 2
    assert "note: using 2 of 8 GPUs" in capsys.readouterr().err
    assert launcher.processes_per_node(launcher.LaunchConfig(nproc=8), given, command._fit) == 8
    assert [usable_ranks(count, 3) for count in (1, 2, 8, 9)] == [1, 2, 2, 3]


@pytest.mark.parametrize("nnodes", ["two", "0", "1:", "4:x", "-1", "1.5"])
def test_the_number_of_nodes_is_checked(nnodes):
    with pytest.raises(UserError, match="nnodes"):
        launcher.LaunchConfig(nnodes=nnodes, node_rank=0, master_addr="first")


def test_deepspeed_needs_a_list_of_several_nodes():
    with pytest.raises(UserError, match=r"cannot start --nnodes 4[\s\S]*--hostfile"):
        launcher.LaunchConfig(launcher="deepspeed", nnodes="4", node_rank=1, master_addr="first")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nproc": 2, "master_port": 29777}, "--num_gpus 2 --master_port 29777"),
        ({"hostfile": "hosts"}, "--master_port 29500 --hostfile hosts"),
        ({"hostfile": "hosts", "nproc": 4}, "--num_gpus 4 --master_port 29500 --hostfile hosts"),
        ({"hostfile": "hosts", "node_rank": 1}, "--master_port 29500 --hostfile hosts --no_ssh --node_rank 1"),
    ],
)
def test_what_deepspeed_gets(monkeypatch, options, expected):
    started = []
    monkeypatch.setattr(launcher.os, "execv", lambda program, words: started.append(words[2:]))
    launcher._deepspeed(launcher.LaunchConfig(launcher="deepspeed", **options), options.get("nproc", 1), ["module"])
    assert " ".join(started[0]) == f"{expected} --module module"


@pytest.mark.parametrize(("given", "expected"), [(3, "3"), (None, "2")])
def test_threads_set_by_the_user_replace_the_variable(monkeypatch, given, expected):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(launcher, "ENVIRONMENT", {})
    monkeypatch.setattr(launcher, "visible_gpus", lambda: 1)
    before = torch.get_num_threads()
    options = launcher.LaunchConfig(threads=given)
    assert launcher.launch(options, "verify", {}, ["scalekd", "verify"], lambda given, nproc: None) is None
    assert launcher.os.environ["OMP_NUM_THREADS"] == expected
    assert torch.get_num_threads() == (given or before)
    torch.set_num_threads(before)


@pytest.mark.parametrize("text", ["false", "0", "no"])
def test_an_option_that_is_off_skips_no_checks(text):
    with pytest.raises(UserError, match="there is no cache nowhere"):
        distill.check({"cache": "nowhere", "student.name": "resnet18", "follow": text}, 1)
