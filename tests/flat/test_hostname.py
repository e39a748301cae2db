"""Multi-process commands start on a machine whose host name does not resolve, with every launcher."""

import subprocess
import sys

import pytest
from commands import ENV, LIMIT_S, ROOT

PROBE = """
import os
import torch
import torch.distributed as dist
from scalekd_cache.distributed import Peers, this_process

process = this_process("cpu")
with Peers(process) as peers:
    peers.add("here", 1)
if process.world_size == 1:  # as engine.py has it
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo")
ranks = torch.tensor([process.rank + 1])
dist.all_reduce(ranks)
print(f"sum of ranks: {int(ranks)};", end="")  # one write: lines of two ranks can mix
dist.barrier()
dist.destroy_process_group()
"""
can_rename = subprocess.run(["unshare", "-u", "true"], capture_output=True, check=False).returncode == 0
needs_rename = pytest.mark.skipif(not can_rename, reason="a host name of its own needs root")


@needs_rename
@pytest.mark.parametrize(
    ("nproc", "launcher"),
    [(2, "torchrun"), pytest.param(2, "deepspeed", marks=pytest.mark.slow)],
)
def test_a_host_name_that_does_not_resolve(nproc, launcher, tmp_path):
    (tmp_path / "probe_of_processes.py").write_text(PROBE)
    (tmp_path / "start.py").write_text(
        "import sys\nfrom pipelines import launcher\n"
        f"options = launcher.LaunchConfig(nproc={nproc}, launcher='{launcher}')\n"
        f"sys.exit(launcher._{launcher}(options, {nproc}, ['probe_of_processes']))\n"
    )
    words = [sys.executable, tmp_path / "start.py"]
    shell = f"hostname node-17.invalid; exec {' '.join(map(str, words))}"
    done = subprocess.run(
        ["unshare", "-u", "bash", "-c", shell],
        cwd=ROOT,
        env={**ENV, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        timeout=LIMIT_S,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count(f"sum of ranks: {nproc * (nproc + 1) // 2}") == nproc
