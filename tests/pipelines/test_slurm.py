"""pipelines/launch/slurm.sh: started tasks, requeuing, and a preempted job that finishes on a single-node SLURM."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from commands import ENV, LIMIT_S, ROOT, distill_flags, read_json, steps_of
from hosts import Command

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
"""The minimum wait of a requeued job is the lifetime of a credential, two minutes by default."""


SCRIPT = ROOT / "pipelines" / "launch" / "slurm.sh"
MOCKS = {
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; echo first',
    # srun: skips its options, then runs the task; exits with the code of the step
    "srun": 'echo "srun $*" >> "$CALLS"; while [[ $1 == --* ]]; do shift; done; "$@"; exit "${STATUS:-0}"',
    "task": 'echo "task $* RANK=$RANK LOCAL_RANK=$LOCAL_RANK LOCAL_WORLD_SIZE=$LOCAL_WORLD_SIZE" >> "$CALLS"',
}


def run_script(folder, *words, **variables):
    """Run slurm.sh with mock SLURM programs and a mock Python; returns the recorded calls and the exit code."""
    for name, text in MOCKS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "32"}
    task = {"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x4)"}
    environment = {
        **ENV,
        **job,
        **task,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "PYTHON": "task",
    }
    done = subprocess.run(["bash", SCRIPT, *words], env={**environment, **variables}, capture_output=True, text=True)
    assert "line" not in done.stderr, done.stderr
    return calls.read_text().splitlines(), done.returncode


@pytest.mark.parametrize(
    ("command", "words", "cores", "added"),
    [
        ("distill", [], "12", ["--workers", "12"]),
        ("distill", [], "4", []),
        ("distill", [], None, []),
        ("distill", ["--train.workers", "3"], "12", []),
        ("distill", ["--train.workers=3"], "12", []),
        ("distill", ["--workers", "3"], "12", []),
        ("cache_teacher", ["--workers=0"], "12", []),
        ("cache_teacher", ["--cache.path", "x"], "12", ["--workers", "12"]),
        ("verify", ["--cache", "x"], "12", []),
        ("cache-teacher", ["--data", "x"], "12", ["--workers", "12"]),
    ],
)
def test_a_task_gets_its_cores_and_workers(tmp_path, command, words, cores, added):
    variables = {} if cores is None else {"SLURM_CPUS_PER_TASK": cores}
    calls, status = run_script(tmp_path, command, *words, **variables)
    (srun,) = (line for line in calls if line.startswith("srun"))
    assert status == 0
    assert (f"--cpus-per-task={cores}" in srun.split()) == (cores is not None)
    expected = [
        "task",
        "-m",
        f"pipelines.{command.replace('-', '_')}",
        *words,
        *added,
        "RANK=11",
        "LOCAL_RANK=3",
        "LOCAL_WORLD_SIZE=8",
    ]
    assert calls[-1].split() == expected


@pytest.mark.parametrize(
    ("status", "again"), [(75, True), (134, True), (138, True), (143, True), (1, False), (2, False)]
)
def test_exit_codes_that_requeue_the_job(tmp_path, status, again):
    """134: NCCL's watchdog ended a process after another rank was lost."""
    calls, code = run_script(tmp_path, "distill", STATUS=str(status))
    assert code == status
    assert ("scontrol requeue 7" in calls) == again
    if again:
        calls, _ = run_script(tmp_path, "distill", STATUS=str(status), SLURM_RESTART_COUNT="3", MAX_RESTARTS="3")
        assert "scontrol requeue 7" not in calls


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
    """Starts the controller and the node; returns a function that runs a client command."""
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


@pytest.mark.slow
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
    assert f"resuming {folder} after step {stopped} of {STEPS}" in log.read_text()
    assert [line["step"] for line in steps_of(folder)] == list(range(1, STEPS + 1))
    summary = read_json(folder / "summary.json")
    assert (summary["world_size"], summary["steps"]) == (2, STEPS)
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job))
