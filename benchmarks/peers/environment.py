"""The environment of the peers in build/peers, created on first use.

In: the three requirements files of this folder. Out: a virtual environment with the peers that also sees every package
of the running environment, so that ours and the peers share one PyTorch and one process.
Invariant: the running environment is never changed; the new one is complete if its stamp matches the files.
"""

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.harness import ROOT

FOLDER = ROOT / "build" / "peers"
APART = FOLDER / "apart"
HERE = Path(__file__).parent
FILES = {
    "requirements.txt": [],
    "requirements-no-deps.txt": ["--no-deps"],
    "requirements-apart.txt": ["--no-deps", "--target", str(APART)],
}
"""Requirements files in the order of installation, and the options of pip for each."""


def restart_with_peers(module: str) -> None:
    """Return if the peers can be imported; otherwise make their environment and replace this process by
    `python -m module` in it, with the same arguments.

    Raises:
        subprocess.CalledProcessError: the packages cannot be installed (no package index, for example).
    """
    if Path(sys.prefix) == FOLDER:
        return
    make_environment()
    python = FOLDER / "bin" / "python"
    os.execv(python, [str(python), "-m", module, *sys.argv[1:]])


def make_environment() -> None:
    """Make build/peers unless it is complete: about 600 MB, a minute or two."""
    stamp = FOLDER / "installed.sha256"
    wanted = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing the peers into {FOLDER.relative_to(ROOT)} (about 600 MB, a minute or two)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    python = FOLDER / "bin" / "python"
    paths = {"base": str(FOLDER), "platbase": str(FOLDER)}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    (own / "running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name, options in FILES.items():
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run([*command, "-r", str(HERE / name)], check=True)
    stamp.write_text(wanted)


def versions(*packages: str) -> str:
    """The installed versions of packages, for the note under a table."""
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
