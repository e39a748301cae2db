"""Runs commands in separate processes, and kills them or makes their disk fail.

A fork server imports torch and DeepSpeed once. All other processes are forked from it, which saves five seconds of
imports each. The command runs via `__main__`, like `python -m pipelines.cache_teacher`.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from commands import ENV, LIMIT_S

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "scalekd_cache.caching.job",
        "scalekd_cache.training.run",
        "pipelines.command",
        "sklearn.datasets",
        "webdataset",
        "zarr",
        "deepspeed",
    ]
)
KILLED = -signal.SIGKILL
WRITES = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir")
"""Audit events of file operations; fsync has none, but a folder is opened before it is fsynced."""


class Outcome(NamedTuple):
    """Outcome of a job of one or more processes."""

    statuses: list[int]
    """Exit code of each process; -9 for a killed one."""
    output: str
    seconds: float


def warm_up() -> None:
    """Start the fork server and wait for its imports."""
    process = FORKING.Process(target=os.getpid)
    process.start()
    process.join()


def at_operation(number: int, root: Path, act) -> None:
    """Call `act` just before the `number`-th file operation (from 1) of this process below `root`."""
    below, left = f"{root}{os.sep}", [number]

    def hook(event, arguments):
        if event not in WRITES or not left or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        reads = event == "open" and isinstance(arguments[1], str) and not set("wxa+") & set(arguments[1])
        if reads or not f"{path}{os.sep}".startswith(below):
            return
        left[0] -= 1
        if left[0] == 0:
            left.clear()
            act(event, path)

    sys.addaudithook(hook)


def _kill_group(*_) -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def run_command(words, environment, log, root, operation, act=_kill_group, command="cache_teacher") -> None:
    """The body of a forked process."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as in a normal process; here it would be forkserver
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update({**ENV, **environment})
    if operation:
        at_operation(operation, root, act)
    sys.argv = [command, *words]
    runpy.run_module(f"pipelines.{command}", run_name="__main__", alter_sys=True)


class Job:
    """Stage 1, or another command, on several ranks.

    Emulates torchrun: provides the store and the environment, and ends all processes when one dies.
    """

    def __init__(
        self, words, root: Path, log: Path, *, ranks: int = 1, operation: int = 0, command: str = "cache_teacher"
    ) -> None:
        self._log, self._store = log, None
        log.write_text("")
        environment = dict(ENV)  # tests change it; the parent of the forked processes has it as it was at first
        if ranks > 1:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port)}
            environment |= {
                **address,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
        self._start = time.monotonic()
        self.processes = []
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else environment
            hit = operation if rank == ranks - 1 else 0
            arguments = (words, own, str(log), root, hit, _kill_group, command)
            self.processes.append(FORKING.Process(target=run_command, args=arguments))
            self.processes[-1].start()

    def kill(self) -> None:
        """Send SIGKILL to every process and its workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def wait(self, seconds: float = LIMIT_S, *, then_kill: bool = False) -> Outcome:
        """Wait until all exit; a process that fails ends the others. `then_kill` kills all after `seconds` instead."""
        end = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            late = time.monotonic() >= end
            if late or any(process.exitcode for process in self.processes):
                self.kill()
                assert then_kill or not late, f"still running after {seconds} s:\n{self._log.read_text()}"
            time.sleep(0.002)
        for process in self.processes:
            process.join()
        statuses = [process.exitcode for process in self.processes]
        return Outcome(statuses, self._log.read_text(), time.monotonic() - self._start)


def on_a_bad_disk(words, root: Path, log: Path, trouble: str, operation: int, command="cache_teacher", size="8m"):
    """Run a command on a separate disk that fails at an operation, then rerun it on the repaired disk.

    Args:
        words: options of the command.
        root: the cache or run; its parent becomes a small disk that is visible only to these processes.
        log: file for the output of the command.
        trouble: `full`, `read-only` or `denied`.
        operation: number of the file operation before which the failure starts; 0: before the job.
        command: the command.
        size: size of the disk.

    Returns:
        (exit code, output, names in units/) of both jobs, and the final files; None if mounts are not allowed.
    """
    receiver, sender = FORKING.Pipe(duplex=False)
    process = FORKING.Process(target=_bad_disk, args=(words, root, str(log), trouble, operation, sender, command, size))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise AssertionError(f"no result:\n{log.read_text()}") from None
    process.join()
    return result


def _bad_disk(words, root, log, trouble, operation, sender, command, size) -> None:
    disk = root.parent
    if not own_disk(disk, size):
        sender.send(None)
        return
    root.mkdir()
    begin, mend = {
        "full": (lambda *_: fill(disk), lambda: (disk / "ballast").unlink()),
        "read-only": (lambda *_: _mount("-o", "remount,ro", disk), lambda: _mount("-o", "remount,rw", disk)),
        "denied": (lambda *_: _folders(root, 0o555), lambda: _folders(root, 0o755)),
    }[trouble]
    if trouble == "denied":
        _obey_permissions()
    if operation == 0:
        begin()
    results = []
    for hit in (operation, 0):
        Path(log).write_text("")
        child = os.fork()
        if child == 0:
            try:
                run_command(words, {}, log, root, hit, begin, command)
            except SystemExit as end:
                os._exit(end.code or 0)
            finally:  # an unexpected exception
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        units = root / "units"
        names = sorted(path.name for path in units.iterdir()) if units.is_dir() else []
        results.append((status, Path(log).read_text(), names))
        if hit == operation:
            mend()
            operation = -1
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    sender.send((*results, files))


def own_disk(folder: Path, size: str = "8m") -> bool:
    """Mount a tmpfs at `folder` for this process and its children; False if that is not allowed."""
    flags, user = 0x00020000, os.geteuid()  # CLONE_NEWNS
    if user != 0:
        flags |= 0x10000000  # CLONE_NEWUSER
    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        return False
    if user != 0:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    small = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    return private.returncode == small.returncode == 0


def _mount(*words) -> None:
    subprocess.run(["mount", *words], check=True)


def fill(disk: Path, room: int = 1 << 14) -> None:
    """Leave `room` bytes: by default enough for a folder, not for a unit."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 14))
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - room)


def _folders(root: Path, mode: int) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(mode)


def _obey_permissions() -> None:
    """Give up root's right to write everywhere (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER stays)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("<Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("<6I", data.raw))
    words[0] &= ~0b110  # effective, capabilities 1 and 2
    assert libc.capset(header, struct.pack("<6I", *words)) == 0


def phase(root: Path, units: int) -> str:
    """The phase in which a job was killed, derived from its files."""
    names = sorted(path.name for path in (root / "units").iterdir()) if (root / "units").is_dir() else []
    temps = [name for name in names if name.startswith(".tmp-")]
    whole = len(names) - len(temps)
    if (root / "manifest.json").exists():
        return "after the manifest"
    if any(path.name.startswith(".tmp-") for path in root.glob(".tmp-*")):
        return "writing plan, tail or manifest"
    if temps:
        committing = any((root / "units" / name / "unit.json").exists() for name in temps)
        return "committing a unit" if committing else "writing a unit"
    if whole == units:
        return "before the manifest"
    return "between two units" if whole else "before the first unit"
