"""pipelines/launch/slurm.sh on a SLURM of this machine alone: preempted, it is queued again and finishes."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from commands import ENV, LIMIT_S, ROOT, distill_flags, read_json, steps_of
from hosts import Command

pytestmark = pytest.mark.slow
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SEARCH = f"{os.environ['PATH']}:/usr/sbin"
EPOCHS, STEPS = 8, 24
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
"""The shortest wait of a job that is queued again is the life of a credential, two minutes by default."""


def free_ports(count):
    with_sockets = [socket.socket() for _ in range(count)]
    for one in with_sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in with_sockets]
    for one in with_sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path):
    """Starts the controller and the one node; a function that runs a client command."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs SLURM and root: {', '.join(missing) or 'not root'}")
    host = socket.gethostname().partition(".")[0]
    file = tmp_path / "slurm.conf"
    file.write_text(CONF.format(host=host, ports=free_ports(2), folder=tmp_path, cpus=os.cpu_count()))
    environment = {**ENV, "SLURM_CONF": str(file), "PATH": f"{ENV['PATH']}:/usr/sbin"}
    (tmp_path / "state").mkdir()
    (tmp_path / "spool").mkdir()
    daemons = [
        Command([name, "-D", "-f", file], environment, tmp_path / f"{name}.log") for name in ("slurmctld", "slurmd")
    ]

    def client(*words):
        done = subprocess.run(
            [str(word) for word in words], env=environment, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, (words, done.stderr, *(daemon.output()[-2000:] for daemon in daemons))
        return done.stdout

    try:
        daemons[0].until(
            lambda: "idle" in subprocess.run(["sinfo", "-h"], env=environment, text=True, capture_output=True).stdout,
            60,
        )
        yield client
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING"], env=environment, capture_output=True)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.end()


def test_a_preempted_job_is_queued_again_and_finishes(slurm, cache, workshop, tmp_path):
    folder, log = workshop / "runs" / "slurm", tmp_path / "job.log"
    words = distill_flags(cache, folder, **{"train.epochs": EPOCHS, "train.eval_epochs": EPOCHS})
    job = slurm(
        "sbatch", "--parsable", "--ntasks", 2, "--overcommit", "--output", log, "--chdir", ROOT,
        "--export", f"ALL,PYTHON={sys.executable},GLOO_SOCKET_IFNAME=lo",
        ROOT / "pipelines" / "launch" / "slurm.sh", "distill", *words,
    ).strip()  # fmt: skip

    def until(happened):
        end = time.monotonic() + LIMIT_S
        while not happened():
            assert time.monotonic() < end, (
                log.read_text()[-4000:] if log.exists() else "",
                slurm("scontrol", "show", "job", job),
            )
            time.sleep(0.2)

    def done():
        return len(steps_of(folder)) if (folder / "metrics.jsonl").exists() else 0

    until(lambda: done() >= 2)
    slurm("scancel", "--signal=USR1", job)
    until(lambda: "requeued (restart 1)" in log.read_text())
    stopped = done()
    assert stopped < STEPS
    assert f"SIGUSR1: checkpoint saved at step {stopped}" in log.read_text()
    until(lambda: (folder / "summary.json").exists())
    assert f"resuming {folder} at step {stopped + 1} of {STEPS}" in log.read_text()
    assert [line["step"] for line in steps_of(folder)] == list(range(1, STEPS + 1))
    summary = read_json(folder / "summary.json")
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job))
