"""Every command, with every file that it opens replaced in eight ways, must end with an error message or a finding.

An audit hook finds the files in one run of each command. Each case is a forked child with time and memory limits.
`PYTHONPATH=.:tests/support python tests/pipelines/test_enumeration.py COMMAND...` prints the whole table.
"""

import errno
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import ROOT, cache_flags, flags
from image_files import encoded, picture, write
from store_cases import write_cache

from scalekd_cache.store.verify import verify_cache

LIMIT_OF_A_CASE_S = 20.0
"""Limit in CPU seconds, so that a busy machine does not matter; in wall time the limit is ten times as long."""
IDLE_S = 3.0
"""Seconds without CPU use after which a case counts as a hang."""
MEMORY_BYTES = 2 << 30
SPARSE_BYTES = 64 << 30
KINDS = ("missing", "empty", "cut", "folder", "loop", "fifo", "unreadable", "huge")

COMMANDS = {
    "cache_teacher": "{cache_again}",
    "distill": "--cache cache --run half --student.name resnet10t {train}",
    "distill --dry-run": "--cache cache --run new --student.name resnet10t {train} --dry-run",
    "evaluate": "--run run",
    "export": "--run run --out out",
    "report": "--run run --out page.html",
    "verify": "--cache cache --deep",
    "repair": "--cache cache",
    "inspect_cache": "--cache cache --index 0 --view 0 --out view.jpg",
    "plan": "{cache_again}",
    "prove": "--cache cache --views 4",
    "import_upstream": "--ckpt upstream.pth --out imported",
}
"""`fetch` and `costs` open no user files; `distill` resumes an interrupted run and finishes it."""
FINE = (
    # commands, `file kind`, and why exit code 0 is correct
    ("cache_teacher|repair", r"cache/\S+ \w+", "rebuilt"),
    ("repair", r"teacher\.safetensors \w+", "an intact cache needs no teacher"),
    ("distill", r"half/checkpoints/\S+ \w+", "a damaged checkpoint is skipped, with a message"),
    ("distill", r"run/summary\.json \w+", "of another run: compared with when it is readable"),
    (
        "distill",
        r"half/(metrics.jsonl (missing|empty|cut)|cache.json missing|\.lock (missing|empty|cut|huge))",
        "not needed to resume; a lock file is never read",
    ),
    ("plan|cache_teacher|evaluate|distill", r"data/\S+ \w+", "unreadable images are counted and skipped"),
    ("verify", r"cache/plan\.json missing", "older caches have none; a note reports it"),
    ("verify", r"teacher\.safetensors (missing|folder|loop|fifo)", "a line reports that the teacher was not run"),
    ("export", r"run/summary\.json missing", "an unfinished run is exported from its last checkpoint"),
    ("report", r"\S+ \w+", "the page shows the available data, with a note about the rest"),
)
SLOW = {"report": 4, "repair": 4, "cache_teacher": 4, "plan": 4, "prove": 4, "distill": 1}
"""Commands that take seconds: this many kinds are tried on each of their files, chosen by SEED."""
NEVER_ENDS_WELL = ("import_upstream",)
"""Commands that reject their own file in the small world."""
NOTE = re.compile(r'<p class="note">(.*?)</p>', re.DOTALL)


def build(world: Path) -> None:
    """A data set of 16 images, its cache, a finished run, a file that claims to be an upstream checkpoint."""
    for split, count in (("train", 8), ("val", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                write(world / "data" / split / label / f"{number:02d}.png", encoded(picture(number, (64, 64))))
    (world / "upstream.pth").write_bytes(b"PK\x03\x04 not a checkpoint")


def words_of(command: str) -> list[str]:
    stage1 = {
        "recipe": "demo",
        "data.source": "data",
        "cache.samples_per_shard": 8,
        "cache.num_views": 1,
        "teacher.batch_size": 8,
    }
    train = {"train.epochs": 1, "train.global_batch_size": 8, "train.micro_batch_size": 8, "train.checkpoint_steps": 1}
    return (
        COMMANDS[command]
        .format(
            cache_again=" ".join(map(str, cache_flags("cache", "teacher.safetensors", **stage1))).replace(
                "--data.max_samples 96", ""
            ),
            train=" ".join(flags(train)),
        )
        .split()
    )


class World:
    """A copy of the small world, restored before each case; large files are links to the original."""

    def __init__(self, folder: Path) -> None:
        self.original, self.place = folder / "original", folder / "world"

    def put_back(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.original, self.place, copy_function=shutil.copyfile)


def _hook(log: int, root: str, broken: str | None):
    def hook(event, arguments):
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(os.fspath(arguments[0])))
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if log >= 0 and path.startswith(root):
            os.write(log, f"{path}\n".encode())

    return hook


def _child(command: str, words: list[str], place: Path, output: Path, log: int, broken: str | None) -> None:
    """Become the command."""
    try:
        os.setsid()
        os.chdir(place)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT_OF_A_CASE_S), int(LIMIT_OF_A_CASE_S)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_hook(log, f"{place}{os.sep}", broken))
        sys.argv = [command, *words]
        runpy.run_module(f"pipelines.{command.split()[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def call(command: str, world: World, log: int = -1, broken: str | None = None) -> tuple[int, str]:
    """(exit code, output); a command that hangs is killed and has code -9."""
    output = world.place.parent / "output"
    pid = os.fork()
    if pid == 0:
        _child(command, words_of(command), world.place, output, log, broken)
    used, since = None, time.monotonic()
    end = since + 10 * LIMIT_OF_A_CASE_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if (state := _asleep_after(pid)) is None or state != used:
            used, since = state, now
        if now > end or now > since + IDLE_S:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _asleep_after(pid: int) -> tuple[str, ...] | None:
    """CPU time of a sleeping process; None while it runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return tuple(fields[11:15]) if fields[0] == "S" else None


def files_of(command: str, world: World) -> list[str]:
    """Files that the command opens, one of each kind; names that differ only in numbers count as one."""
    world.put_back()
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), writing)
        status, output = call(command, world, writing)
        os.close(reading), os.close(writing)
        log.seek(0)
        assert status == 0 or command in NEVER_ENDS_WELL, f"{command} fails on whole files: {output}"
        opened = {os.path.relpath(line, world.place) for line in log.read().decode().splitlines()}
    whole = [str(path.relative_to(world.original)) for path in sorted(world.original.rglob("*")) if path.is_file()]
    found = [name for name in whole if name in opened]
    return list({re.sub(r"\d+", "0", re.sub(r"/(cat|dog)/", "/c/", name)): name for name in reversed(found)}.values())


def replace(world: World, name: str, kind: str) -> str | None:
    """Replace a file; returns the path that cannot be read, if that is the damage."""
    world.put_back()
    file = world.place / name
    data = file.read_bytes()
    file.unlink()
    if kind in ("empty", "cut", "unreadable", "huge"):
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2]}.get(kind, data))
    if kind == "huge":
        os.truncate(file, SPARSE_BYTES)
    put(file, kind)
    return str(file) if kind == "unreadable" else None


def put(file: Path, kind: str) -> None:
    """Replace `file` by something that is not a regular file."""
    if kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "fifo":
        os.mkfifo(file)


def verdict(command: str, case: str, status: int, output: str, notes: set[str]) -> str | None:
    """The problem with an outcome; None for an error message, a finding, or a file that may be missing."""
    if status < 0:
        return f"hangs or was killed by signal {-status}"
    if "Traceback (most recent call last)" in output or '  File "' in output:
        return f"traceback: {output.strip().splitlines()[-1][:160]}"
    allowed = any(re.fullmatch(names, command) and re.fullmatch(file, case) for names, file, _ in FINE)
    if status not in (1, 2) and not (status == 0 and allowed):
        return f"status {status}"
    silent = command == "report" and status == 0 and not notes and not case.startswith("data/")
    return "status 0, and no note on the page" if silent else None


def notes_of(world: World) -> set[str]:
    """The notes on the page of a report."""
    page = world.place / "page.html"
    return set(NOTE.findall(page.read_text(encoding="utf-8"))) if page.exists() else set()


def faults(command: str, world: World, seed: int | None = None) -> list[str]:
    """`file kind: what is wrong` of every case; with a seed, of some of those of slow commands."""
    found, names = [], files_of(command, world)
    usual = notes_of(world)
    sampler = random.Random(seed)
    for name in names:
        kinds = KINDS if seed is None else sampler.sample(KINDS, SLOW.get(command, len(KINDS)))
        for kind in kinds:
            broken = replace(world, name, kind)
            started = time.monotonic()
            status, output = call(command, world, broken=broken)
            wrong = verdict(command, f"{name} {kind}", status, output, notes_of(world) - usual)
            if wrong is not None:
                found.append(f"{name} {kind}: {wrong}")
            print(f"{command} {name} {kind}: {wrong or 'fine'} ({time.monotonic() - started:.1f} s)", flush=True)
    return found


def small_world(folder: Path) -> World:
    """Create the world with the commands themselves."""
    import timm
    import torch
    from safetensors.torch import save_file

    from scalekd_cache.models.teacher import demo_teacher_args
    from scalekd_cache.models.timm_models import DEMO_TIMM_NAME

    torch.set_num_threads(1)
    world = World(folder)
    place = world.place
    build(place)
    torch.manual_seed(0)
    model = timm.create_model(DEMO_TIMM_NAME, num_classes=2, **demo_teacher_args())
    save_file(model.state_dict(), str(place / "teacher.safetensors"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in (
        ["cache_teacher", *words_of("cache_teacher")],
        ["distill", *words_of("distill")],
    ):
        words = ["run" if word == "half" else word for word in command[1:]]
        done = subprocess.run([sys.executable, "-m", f"pipelines.{command[0]}", *words], cwd=place, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    interrupt(place / "run", place / "half")
    shutil.copytree(place, world.original)
    import scalekd_cache.loader.loader
    import scalekd_cache.models.evaluate
    import scalekd_cache.models.student
    import scalekd_cache.models.teacher
    import scalekd_cache.training.run  # noqa: F401

    return world


def interrupt(run: Path, half: Path) -> None:
    """A run as it was after its first of two steps."""
    shutil.copytree(run, half)
    (half / "summary.json").unlink()
    shutil.rmtree(half / "export")
    shutil.rmtree(max((half / "checkpoints").iterdir()))
    assert len(list((half / "checkpoints").iterdir())) == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("enumeration"))


@pytest.mark.parametrize("name", ["v0001.tar", "v0001.idx", "keys.txt", "unit.json"])
@pytest.mark.parametrize("kind", ["loop", "folder", "fifo"])
def test_something_else_in_the_place_of_a_units_file_is_a_finding(name, kind, tmp_path):
    root = write_cache(tmp_path, "webdataset")
    file = root / "units/g000-r00001" / name
    file.unlink()
    put(file, kind)
    assert any("g000-r00001" in problem.where for problem in verify_cache(root, deep=True))


@pytest.mark.ci_slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_any_state_gives_a_message(command, world):
    seed = int(os.environ.get("SEED", "97838"))  # reproducible in CI; other seeds by hand
    print(f"SEED={seed}")
    assert faults(command, world, seed) == []


if __name__ == "__main__":
    here = small_world(Path(tempfile.mkdtemp()))
    for one in sys.argv[1:] or COMMANDS:
        faults(one, here)
