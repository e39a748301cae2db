"""Two simulated hosts: connected network namespaces with one address each, on one file system."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import ENV, LIMIT_S, ROOT

NAMES = ("a", "b")
INTERFACE = "eth0"


def _ip(*words):
    return subprocess.run(["ip", *map(str, words)], check=True, text=True, capture_output=True).stdout


class Command:
    """A command running on a host, with its output in a file."""

    def __init__(self, words, environment, log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, happened):
        """Wait until a condition holds while the command runs."""
        end = time.monotonic() + LIMIT_S
        while not happened():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()[-4000:]}"
            assert time.monotonic() < end, f"not after {LIMIT_S} s:\n{self.output()[-4000:]}"
            time.sleep(0.02)

    def wait(self):
        """Its exit code."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {LIMIT_S} s:\n{self.output()[-4000:]}") from None

    def end(self) -> None:
        """Kill it and every process it started, including torchrun's, which have separate sessions."""
        with contextlib.suppress(psutil.NoSuchProcess):
            whole = psutil.Process(self.process.pid)
            for process in [*whole.children(recursive=True), whole]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Hosts:
    """A context manager; at its end processes on the hosts are killed and the namespaces removed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spaces = [f"skd{os.getpid()}{name}" for name in NAMES]
        self.addresses = ["10.201.7.1", "10.201.7.2"]
        self.names = ["host-a", "host-b"]
        self.commands = 0

    def __enter__(self):
        try:
            for space in self.spaces:
                _ip("netns", "add", space)
                hosts = Path("/etc/netns", space, "hosts")  # ip netns exec mounts it over /etc/hosts
                hosts.parent.mkdir(parents=True)
                lines = [f"{address} {name}" for address, name in zip(self.addresses, self.names, strict=True)]
                hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
            _ip("link", "add", INTERFACE, "netns", self.spaces[0], "type", "veth", "peer", "name", INTERFACE,
                "netns", self.spaces[1])  # fmt: skip
            for space, address in zip(self.spaces, self.addresses, strict=True):
                _ip("-n", space, "addr", "add", f"{address}/24", "dev", INTERFACE)
                for link in ("lo", INTERFACE):
                    _ip("-n", space, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        return self

    def __exit__(self, *_) -> None:
        for host, space in enumerate(self.spaces):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                self.kill(host)
                _ip("netns", "del", space)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)

    def start(self, host: int, *words, **environment) -> Command:
        self.commands += 1
        own = {"GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": str(ROOT)}
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[host]]
        inside = ["ip", "netns", "exec", self.spaces[host], *named, *words]
        log = self.folder / f"host-{NAMES[host]}-{self.commands}.log"
        return Command(inside, {**ENV, **own, **environment}, log)

    def kill(self, host: int) -> None:
        """Send SIGKILL to every process on a host."""
        for _ in range(3):  # a process may have started another one in the meantime
            for pid in self.pids(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def pids(self, host: int) -> list[int]:
        """All processes on a host."""
        return [int(pid) for pid in _ip("netns", "pids", self.spaces[host]).split()]

    @staticmethod
    def words_of(pid: int) -> str:
        """A process's command line."""
        try:
            return Path("/proc", str(pid), "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has exited in the meantime
            return ""

    def cut(self, host: int) -> None:
        """Disconnect the network: no connection is closed, and no packet arrives."""
        _ip("-n", self.spaces[host], "link", "set", INTERFACE, "down")

    def mend(self, host: int) -> None:
        _ip("-n", self.spaces[host], "link", "set", INTERFACE, "up")
