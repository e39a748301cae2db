"""Starts multiple processes: with `--nproc 8`, torchrun or DeepSpeed's launcher runs the same command on every rank.

In: the launch options and the command as typed. Out: the exit code, or None to run in this process.
Invariant: a process that was started by a launcher (RANK is set) never starts a launcher itself. Exit codes are
passed through unchanged.
"""

import importlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from scalekd_cache.config.base import require
from scalekd_cache.config.machine import available_cores, visible_gpus
from scalekd_cache.config.options import options_class
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import check_regular

ENVIRONMENT = {
    # Every start or restart gets a new key-value store, because a shared one would keep values from the last start.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    # Scheduler signals are forwarded to the processes, which then have five minutes to save their state.
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
    "PYTHONUNBUFFERED": "1",
}
"""Environment variables for the processes. Values that are already set are kept."""
OWN_EXIT = r"failed \(exitcode: (1|2|75|130)\)"
"""Torch's log line for a process that exited with one of our exit codes."""
Fit = Callable[[dict[str, Any], int], int]
"""From the given options and the number of GPUs, the number of processes that can share the work."""
REPORTED = "SCALEKD_REPORTED"
"""Environment variable with the folder where ranks record printed errors, so that each error is printed only once."""
STOPPED = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}
"""Exit code for each signal sent to torchrun. The ranks have saved their state, so the run can be resumed."""


@options_class()
class LaunchConfig:
    """Options for starting multiple processes."""

    nproc: int | None = None
    """Number of processes on this node (default: one per visible GPU that can share the batch, or 1 without GPUs)."""
    nnodes: str = "1"
    """Number of nodes; run the command on each of them. A range such as 1:16 makes the job elastic: nodes may join and
    leave."""
    node_rank: int | None = None
    """Rank of this node, starting at 0 (multi-node only)."""
    master_addr: str | None = None
    """Host name or address of node 0 (multi-node only)."""
    master_port: int = 29500
    """A free port on node 0 (multi-node only)."""
    hostfile: str | None = None
    """Hostfile with the nodes, which DeepSpeed's launcher starts over ssh (with node_rank: run the command on
    each node, without ssh)."""
    launcher: Literal["torchrun", "deepspeed"] | None = None
    """torchrun or deepspeed (default: torchrun, or deepspeed if hostfile is set)."""
    restarts: int = 10
    """For elastic jobs: maximum number of restarts."""
    job: str = "scalekd"
    """For elastic jobs: job name, which must be the same on all nodes."""
    local_addr: str | None = None
    """For elastic jobs: this node's address."""
    threads: int | None = None
    """CPU threads per process (default: $OMP_NUM_THREADS or, if not set, cores / processes). With GPUs, always 1."""

    def __post_init__(self) -> None:
        require(self.nproc is None or 1 <= self.nproc <= 1024, "nproc", self.nproc, "1 to 1,024")
        require(self.threads is None or self.threads > 0, "threads", self.threads, "> 0")
        require(0 < self.master_port < 1 << 16, "master_port", self.master_port, "1 to 65,535")
        counted = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.nnodes)
        require(counted is not None, "nnodes", self.nnodes, "a number, or MIN:MAX")
        if self.launcher == "deepspeed" and self.nnodes != "1" and not self.hostfile:
            raise UserError(
                f"--launcher deepspeed cannot start --nnodes {self.nnodes} without a list of the nodes",
                fix="set --hostfile FILE (with --node-rank on every node: without ssh), or --launcher torchrun",
            )
        if self.nnodes != "1" and not self.hostfile:
            for name in ("node_rank", "master_addr"):
                if getattr(self, name) is None:
                    raise UserError(f"--nnodes {self.nnodes} needs --{name.replace('_', '-')} on every node")


def processes_per_node(options: LaunchConfig, given: Mapping[str, Any], fit: Fit = lambda given, gpus: gpus) -> int:
    """`--nproc`, or by default one process per GPU (one process without GPUs, or for a single device: `--device cpu`,
    `cuda:1`). On a single node with several GPUs, `fit` gets the given options and the number of GPUs, and returns how
    many processes can share the work."""
    gpus = 1 if re.fullmatch(r"cpu|.*:\d+", str(given.get("device", ""))) else max(1, visible_gpus())
    if options.nproc or gpus == 1 or options.nnodes != "1" or options.hostfile:
        return options.nproc or gpus
    return fit(dict(given), gpus)


def launch(
    options: LaunchConfig,
    command: str,
    given: dict[str, Any],
    argv: list[str],
    check: Callable[[dict[str, Any], int], None],
    fit: Fit = lambda given, gpus: gpus,
) -> int | None:
    """Start a command's processes and wait for them. `check` is first called with the given options and the
    number of processes on this node, which is that of `processes_per_node`.

    Returns:
        The exit code, or None if the command runs in this process.
    """
    if "RANK" in os.environ:
        return None
    nproc = processes_per_node(options, given, fit)
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        if "torch" in sys.modules:  # a plugin has imported it before it could read the variable
            sys.modules["torch"].set_num_threads(options.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // nproc)))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if nproc == 1 and options.nnodes == "1" and not options.hostfile:
        return None
    check(given, nproc)
    if options.hostfile:
        check_regular(options.hostfile, "--hostfile")
    module = f"pipelines.{command.replace('-', '_')}"
    words = argv[2:] if argv[1:2] and argv[1].replace("_", "-") == command else argv[1:]
    if (options.launcher or ("deepspeed" if options.hostfile else "torchrun")) == "deepspeed":
        return _deepspeed(options, nproc, [module, *words])
    return _torchrun(options, nproc, [module, *words])


def _torchrun(options: LaunchConfig, nproc: int, command: list[str]) -> int:
    """Run torchrun in this process and return the exit code of the first rank that failed."""
    run = importlib.import_module("torch.distributed.run")
    errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    api = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    # Without the --, torchrun would read our --run as an abbreviation of its --run-path.
    words = [*_nodes(options), "--nproc-per-node", str(nproc), "-m", "--", *command]
    for module in (api, importlib.import_module("torch.distributed.elastic.agent.server.api")):
        logging.getLogger(module.__name__).addFilter(_is_news)
    folder = os.environ[REPORTED] = tempfile.mkdtemp(prefix="scalekd-")
    try:
        run.run(run.parse_args(words))
    except errors.ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        return 128 - code if code < 0 else code
    except api.SignalException as stop:
        return STOPPED.get(signal.Signals(stop.sigval), 128 + int(stop.sigval))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Whether to print a torchrun log record. Records about our own exit codes or a forwarded signal are hidden."""
    return record.levelno >= logging.ERROR and not re.search(OWN_EXIT, record.getMessage())


def _nodes(options: LaunchConfig) -> list[str]:
    """The torchrun options that describe the nodes."""
    port = str(options.master_port)
    if options.nnodes == "1":  # use the loopback address, whatever the host name resolves to
        return ["--standalone", "--local-addr", "127.0.0.1"]
    assert options.master_addr is not None
    if ":" not in options.nnodes:
        place = ["--master-addr", options.master_addr, "--master-port", port]
        return ["--nnodes", options.nnodes, "--node-rank", str(options.node_rank), *place]
    host = "1" if options.node_rank == 0 else "0"  # node 0 hosts the rendezvous
    words = ["--nnodes", options.nnodes, "--max-restarts", str(options.restarts), "--rdzv-backend", "c10d"]
    words += ["--rdzv-id", options.job, "--rdzv-endpoint", f"{options.master_addr}:{port}", "--rdzv-conf"]
    return [*words, f"is_host={host}", *(["--local-addr", options.local_addr] if options.local_addr else [])]


def _deepspeed(options: LaunchConfig, nproc: int, command: list[str]) -> int:
    """Replace this process with DeepSpeed's launcher."""
    words = ["--num_gpus", str(nproc)] if options.nproc or not options.hostfile else []
    words += ["--master_port", str(options.master_port)]
    if options.hostfile:
        words += ["--hostfile", options.hostfile]
        words += ["--master_addr", options.master_addr] if options.master_addr else []
        words += ["--no_ssh", "--node_rank", str(options.node_rank)] if options.node_rank is not None else []
    program = Path(sys.executable).parent / "deepspeed"
    os.execv(sys.executable, [sys.executable, str(program), *words, "--module", *command])
