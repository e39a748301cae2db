"""Servers on free ports of this machine: one that fails on demand, nginx, and an S3-compatible one."""

import contextlib
import http.server
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from commands import LIMIT_S

PIECE = 4096


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves a folder without range support, like Python's server; `faults` defines failures.

    A fault is (path suffix, kind, times). Kinds: a status; drop: the connection breaks halfway; short: half
    of the body, without a length; flipped: one byte changed; zeros; endless; slow: nothing for a while; held: half of
    the body, then nothing until `release` is set; drip: a byte at a time; a URL or path: a redirect.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.log = Path(folder), [], []
        self.release, self.reached = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, end, kind, times=10**6):
        self.faults.append([end, kind, times])

    def gets(self, end=""):
        """Number of requests for files with this path suffix."""
        return sum(method == "GET" and path.endswith(end) for method, path in self.log)

    def fault_of(self, path):
        with self.lock:
            for fault in self.faults:
                if path.endswith(fault[0]) and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    def handle_error(self, request, client_address):
        """Clients that disconnect are expected."""


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method):
        server, path = self.server, self.path
        with server.lock:
            server.log.append((method, path))
        file = server.folder / path.partition("?")[0].lstrip("/")
        fault = server.fault_of(path) if method == "GET" else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if isinstance(fault, str) and "/" in fault:
            self.send_response(302)
            self.send_header("Location", fault)
            self.end_headers()
            return
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        if fault == "slow":
            time.sleep(1.5)
        self.send_response(200)
        if fault not in ("short", "endless"):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if method == "GET":
            self.body(data, fault)

    def body(self, data, fault):
        half = len(data) // 2
        if fault == "flipped":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        elif fault == "zeros":
            data = bytes(len(data))
        elif fault == "short":
            data = data[:half]
        elif fault in ("drop", "held"):
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.server.reached.set()
            if fault == "held":
                self.server.release.wait(LIMIT_S)
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for at in range(len(data)) if fault == "drip" else ():
            self.wfile.write(data[at : at + 1])
            time.sleep(0.05)
        if fault == "drip":
            return
        self.wfile.write(data)
        while fault == "endless":
            self.wfile.write(bytes(1 << 16))


@contextlib.contextmanager
def faulty_server(folder):
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def nginx(folder, work):
    """nginx serving a folder, with its configuration and files in `work`; yields its URL. /closed/ returns 403."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    port = free_port()
    places = "".join(
        f"{name}_temp_path {work}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = work / "nginx.conf"
    config.write_text(
        f"daemon off; pid {work}/pid; error_log {work}/error.log; {user_line()}\nevents {{}}\nhttp {{ access_log off;\n"
        f"{places}server {{ listen 127.0.0.1:{port}; root {folder};\nlocation /closed/ {{ deny all; }} }} }}\n"
    )
    process = subprocess.Popen([binary, "-p", str(work), "-c", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def user_line():
    """Workers run as the user of the tests, because other users cannot read temporary folders."""
    return "user root;" if os.getuid() == 0 else ""


def wait_for(url, process):
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"the server ended: {process.stderr.read()}")
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"no answer from {url}")
