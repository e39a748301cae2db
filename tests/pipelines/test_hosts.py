"""Both stages on two hosts (network namespaces), with torchrun and deepspeed, and with one host lost during the run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import (
    ENV,
    STUDENT,
    TRAIN_OPTIONS,
    assert_same_losses,
    cache_flags,
    distill_flags,
    file_bytes,
    read_json,
    run,
    steps_of,
)
from hosts import INTERFACE, Command, Hosts
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PORT = 29611
IMAGES = {
    "data.max_samples": 400,
    "cache.samples_per_shard": 4,
    "cache.num_views": 2,
    "teacher.batch_size": 4,
    "teacher.check_classes": "false",
}
"""100 units of two views of four images."""


@pytest.fixture
def hosts(tmp_path):
    with Hosts(tmp_path) as both:
        yield both


def make_words(target, options, **variables):
    """`make <target>` on one of the hosts."""
    pairs = " ".join(f"{name}={value}" for name, value in options.items())
    given = [f"{name}={value}" for name, value in variables.items()]
    return ["make", target, "VENV=none", f"PYTHON={sys.executable}", "WORKERS=0", *given, f"SET={pairs}"]


def torchrun(hosts, target, options, nnodes=2, **variables):
    """The command on both hosts."""
    for host in range(2):
        variables = {**variables, "MASTER_ADDR": hosts.names[0], "MASTER_PORT": PORT}
        yield hosts.start(host, *make_words(target, options, NNODES=nnodes, NODE_RANK=host, **variables))


def stage1(folder, weights, **changes):
    variables = {"CACHE": folder, "TEACHER_WEIGHTS": weights, "VIEWS": IMAGES["cache.num_views"]}
    return {**{name: value for name, value in IMAGES.items() if name != "cache.num_views"}, **changes}, variables


def units(folder):
    return len(list((folder / "units").glob("g*"))) if (folder / "units").is_dir() else 0


@pytest.fixture(scope="module")
def untouched(workshop, weights):
    """A cache made by one process."""
    folder = workshop / "caches" / "hosts-alone"
    run("cache_teacher", *cache_flags(folder, weights, **IMAGES))
    return file_bytes(folder)


def assert_same_cache(folder, untouched):
    """Temporary files of a killed process on another host are kept, because their writer may still be running."""
    found = {name: value for name, value in file_bytes(folder).items() if ".tmp-" not in name}
    assert found.keys() == untouched.keys()
    assert [name for name in found if found[name] != untouched[name] and name != "plan.json"] == []


@pytest.mark.parametrize("lost", [0, 1], ids=["the first host lost", "the second host lost"])
def test_stage_1_when_a_host_is_lost(lost, hosts, weights, untouched, tmp_path):
    """Without the first host, which holds the counters, the other one reports an error; without the second the first
    finishes."""
    folder = tmp_path / "cache"
    options, variables = stage1(folder, weights, peer_timeout_minutes=0.1)
    both = list(torchrun(hosts, "cache-teacher", options, **variables))
    both[0].until(lambda: units(folder) >= 2)
    hosts.kill(lost)
    other = both[1 - lost]
    if lost == 0:
        assert other.wait() != 0
        assert "lost a process or a node" in other.output()
        assert units(folder) < 100
        for command in list(torchrun(hosts, "cache-teacher", options, **variables)):
            assert command.wait() == 0, command.output()[-4000:]
    else:
        other.until(lambda: "next: make distill" in other.output())
        assert "no heartbeat from rank 1 for 6 s; rank 0 redoes that rank's unit" in other.output()
        hosts.kill(0)  # torchrun waits five minutes for the other torchrun
    assert_same_cache(folder, untouched)


RUN = {**TRAIN_OPTIONS, "train.epochs": 6, "train.checkpoint_steps": 2, "train.timeout_minutes": 0.3}


@pytest.fixture(scope="module")
def uninterrupted(workshop, cache):
    """The result of two undisturbed processes on one host."""
    folder = workshop / "runs" / "hosts-alone"
    run("distill", *distill_flags(cache, folder, **RUN), nproc=2)
    return folder


def distill_words(cache, folder):
    return {"STUDENT": STUDENT, "CACHE": cache, "RUN": folder}


def assert_same_student(folder, expected, statistics=True):
    """Losses of every step and exported weights; BatchNorm statistics depend on the number of processes."""
    assert_same_losses(folder, expected, 1e-4)
    ours, theirs = (load_file(one / "export" / "model.safetensors") for one in (folder, expected))
    assert ours.keys() == theirs.keys()
    parts = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in theirs if statistics or not name.endswith(parts)]
    assert len(names) > 30
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def trained(folder):
    return len(steps_of(folder)) if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("way", ["killed", "killed first", "cable"])
def test_stage_2_when_a_host_is_lost(way, hosts, cache, uninterrupted, workshop):
    """The remaining host names the stalled rank and exits within the timeout; a rerun on both finishes the run."""
    folder = workshop / "runs" / f"hosts-{way.replace(' ', '-')}"
    lost = 0 if way == "killed first" else 1
    both = list(torchrun(hosts, "distill", RUN, **distill_words(cache, folder)))
    both[0].until(lambda: trained(folder) >= 5)
    if way == "cable":
        hosts.cut(lost)
    hosts.kill(lost)
    other = both[1 - lost]
    assert other.wait() != 0
    assert "distributed hang" in other.output(), other.output()[-4000:]
    if way == "cable":
        hosts.mend(lost)
    for command in list(torchrun(hosts, "distill", RUN, **distill_words(cache, folder))):
        assert command.wait() == 0, command.output()[-4000:]
    assert_same_student(folder, uninterrupted)


HOSTFILE = "host-a slots=1\nhost-b slots=1\n"


def deepspeed_words(folder, cache, run_folder, **variables):
    hostfile = folder / "hosts"
    hostfile.write_text(HOSTFILE)
    more = {"HOSTFILE": hostfile, "MASTER_ADDR": "host-a", "MASTER_PORT": PORT, **variables}
    return make_words("distill", RUN, **distill_words(cache, run_folder), **more)


def test_deepspeed_on_each_host_without_ssh(hosts, cache, uninterrupted, workshop, tmp_path):
    folder = workshop / "runs" / "hosts-no-ssh"
    words = [deepspeed_words(tmp_path, cache, folder, NODE_RANK=host) for host in range(2)]
    both = [hosts.start(host, *words[host]) for host in range(2)]
    both[0].until(lambda: trained(folder) >= 5)
    hosts.kill(1)
    assert both[0].wait() != 0
    assert "distributed hang" in both[0].output(), both[0].output()[-4000:]
    for command in [hosts.start(host, *words[host]) for host in range(2)]:
        assert command.wait() == 0, command.output()[-4000:]
    assert read_json(folder / "summary.json")["world_size"] == 2
    assert_same_student(folder, uninterrupted)


def test_deepspeed_with_ssh(hosts, cache, uninterrupted, workshop, tmp_path):
    """One command on the first host; a real sshd on both."""
    if not (shutil.which("sshd", path="/usr/sbin") and shutil.which("pdsh")):
        pytest.skip("needs openssh-server and pdsh")
    programs, folder = ssh_between(hosts, tmp_path), workshop / "runs" / "hosts-ssh"
    environment = tmp_path / "deepspeed_env"
    handed_on = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PATH": programs}
    environment.write_text("".join(f"{name}={value}\n" for name, value in handed_on.items()))
    words = deepspeed_words(tmp_path, cache, folder)
    command = hosts.start(0, *words, PATH=programs, DS_ENV_FILE=str(environment), PDSH_RCMD_TYPE="ssh")
    assert command.wait() == 0, command.output()[-4000:]
    assert read_json(folder / "summary.json")["world_size"] == 2
    assert_same_student(folder, uninterrupted)


def ssh_between(hosts, folder):
    """Start sshd on both hosts with new keys; returns a PATH whose ssh uses them."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n IdentityFile {folder}/user\n StrictHostKeyChecking no\n UserKnownHostsFile {folder}/known\n"
        " LogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    for host in range(2):
        hosts.start(host, "/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config")
    return f"{folder / 'bin'}:{ENV['PATH']}"


def workers(hosts, host, module):
    """Process ids of a host's ranks."""
    return [pid for pid in hosts.pids(host) if f"-u -m {module}" in hosts.words_of(pid)]


@pytest.mark.parametrize("stage", [1, 2])
def test_torchrun_starts_a_killed_process_again(stage, hosts, weights, cache, untouched, uninterrupted, workshop):
    """NNODES=1:2: after a kill, torchrun restarts all processes; after the loss of a host, the other one finishes."""
    folder = workshop / ("caches" if stage == 1 else "runs") / f"elastic-{stage}"
    if stage == 1:
        target, module = "cache-teacher", "pipelines.cache_teacher"
        options, variables = stage1(folder, weights, peer_timeout_minutes=0.1)
    else:
        target, module = "distill", "pipelines.distill"
        options, variables = RUN, distill_words(cache, folder)
    both = list(torchrun(hosts, target, options, nnodes="1:2", **variables))
    both[0].until(lambda: (units(folder) if stage == 1 else trained(folder)) >= 4)
    (victim,) = workers(hosts, 1, module)
    os.kill(victim, signal.SIGKILL)
    if stage == 1:
        both[0].until(lambda: "next: make distill" in both[0].output())
        assert both[0].wait() == 0
        assert both[1].wait() == 0, both[1].output()[-4000:]
        assert_same_cache(folder, untouched)
        return
    both[0].until(lambda: trained(folder) >= 9)
    assert "resuming" in both[0].output()
    hosts.kill(1)
    assert both[0].wait() == 0, both[0].output()[-4000:]
    assert read_json(folder / "summary.json")["world_size"] == 1
    assert_same_student(folder, uninterrupted, statistics=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_torchrun_saves_once(number, cache, workshop):
    """All processes save one checkpoint of the same step; torchrun does not forward their exit code."""
    folder = workshop / "runs" / f"signal-{number.name}"
    options = {**RUN, "train.epochs": 200}
    words = make_words("distill", options, NPROC=2, **distill_words(cache, folder))
    command = Command(words, ENV, workshop / f"{number.name}.log")
    try:
        command.until(lambda: trained(folder) >= 3)
        family = psutil.Process(command.process.pid).children(recursive=True)
        (agent,) = [one for one in family if one.cmdline()[1:3] == ["-m", "torch.distributed.run"]]
        agent.send_signal(number)
        command.wait()
    finally:
        command.end()
    print(number.name, command.process.returncode, command.output()[-3000:])
    assert command.output().count(f"{number.name}: checkpoint saved at step") == 2  # printed by each process
    last = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoints/step-*"))
    assert last == trained(folder)
