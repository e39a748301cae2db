"""Every command, with every file that it opens replaced in eight ways, must end with an error message or a finding.

An audit hook finds the files in one run of each command. Each case is a forked child with time and memory limits. The
modules that this run has imported are imported before the fork: a case costs what the command does with its files.
`PYTHONPATH=.:tests/support python tests/pipelines/test_enumeration.py COMMAND...` prints the whole table.
"""

import contextlib
import errno
import faulthandler
import importlib
import itertools
import os
import re
import resource
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, cache_flags, flags
from image_files import encoded, picture, write
from store_cases import write_cache

from scalekd_cache.store.verify import verify_cache

LIMIT_OF_A_CASE_S = 20.0
"""Limit in CPU seconds, so that a busy machine does not matter; in wall time the limit is ten times as long."""
IDLE_S = 15.0
"""Seconds without CPU use after which a case counts as a hang; name servers and cold disks take seconds too."""
MEMORY_BYTES = 2 << 30
SPARSE_BYTES = 64 << 30
KINDS = ("missing", "empty", "cut", "folder", "loop", "fifo", "unreadable", "huge")

COMMANDS = {
    "cache_teacher": "{cache_again}",
    "distill": "--cache cache --run half --student.name test_resnet {train}",
    "distill --dry-run": "--cache cache --run new --student.name test_resnet {train} --dry-run",
    "evaluate": "--run run",
    "probe": "--backbone run --data data --workers 0",
    "finetune": "--init run --data data --out tuned {tune}",
    "finetune --model": "--model demo_swin --weights teacher.safetensors --data data --out tuned {tune}",
    "export": "--run run --out out",
    "report": "--run run --out page.html",
    "verify": "--cache cache --deep",
    "repair": "--cache cache",
    "inspect_cache": "--cache cache --index 0 --view 0 --out view.jpg",
    "plan": "{cache_again}",
    "prove": "--cache cache --views 4",
    "publish": "--cache cache --to place --data-license mit --teacher-license mit",
    "pull": "--url cache --cache pulled",
    "pull --without-pixels": "--url cache --cache pulled --without-pixels --data data",
    "import_upstream": "--ckpt upstream.pth --out imported",
    "cache_teacher unlabeled": "{soft_again}",
    "distill unlabeled": "--cache soft --run new --student.name test_resnet {train}",
    "probe unlabeled": "--backbone soft_run --data data --workers 0",
    "report unlabeled": "--run soft_run --out page.html",
    "verify unlabeled": "--cache soft",
    "repair unlabeled": "--cache soft",
}
"""`fetch` and `costs` open no user files; `distill` resumes an interrupted run and finishes it."""
ONLY = {"unlabeled": r"soft/heldout.*|soft/manifest.*|list\.txt|pictures/.*|soft_run/export/.*|soft_run/[a-z]*\.json"}
"""By the last word of a command: the files to replace; other commands replace the others."""
FINE = (
    # commands, `file kind`, text that the command must print, and why exit code 0 is correct
    ("(cache_teacher|repair).*", r"(cache|soft)/\S+ \w+", "", "rebuilt"),
    ("repair", r"teacher\.safetensors \w+", "", "an intact cache needs no teacher"),
    ("distill", r"half/checkpoints/\S+ \w+", "skipped: ", "the run resumes from an earlier one, or from step 1"),
    ("distill.*", r"(soft_)?run/summary\.json \w+", "", "of another run: compared with when it is readable"),
    ("distill", r"half/metrics.jsonl (missing|empty|cut)", "", "later lines are appended"),
    ("distill", r"half/(cache.json|config.yaml) missing", "recreated", "the command has the same options"),
    ("distill", r"half/\.lock (missing|empty|cut|huge)", "", "a lock file is never read"),
    ("distill", r"half/report\.html \w+", "half/report.html", "the page is written again, or a line says why not"),
    ("evaluate", r"data/train/\S+ \w+", "", "only the class folders of train/ matter"),
    ("probe|finetune.*|evaluate", r"data/\S+ (missing|folder)", "", "not in the dataset"),
    ("probe|finetune.*|evaluate", r"data/\S+ (empty|cut)", "could not be read", "counted and skipped"),
    ("plan|cache_teacher|distill", r"data/\S+ \w+", "", "the cache has the pixels"),
    ("distill.*", r"(pictures/\S+|list\.txt) \w+", "no usable validation", "the cache has the training images"),
    ("distill.*", r"pictures/\S+ (empty|cut)", "could not be read", "counted and skipped"),
    ("plan", r"cache/plan\.json missing", "", "older caches have none; the manifest has the same options"),
    ("verify", r"cache/plan\.json missing", "plan.json", "older caches have none; a note reports it"),
    ("verify", r"teacher\.safetensors (missing|folder|loop|fifo)", "teacher", "a line reports it"),
    ("pull --without-pixels", r"cache/units/\S+\.tar huge", "", "the result has the published hash"),
    ("export", r"run/summary\.json missing", "", "an unfinished run is exported from its last checkpoint"),
    ("report.*", r"\S+ \w+", "", "the page shows the available data, with a note about the rest"),
)
WRITE = ("cache_teacher", "distill", "repair", "finetune", "publish", "pull")
"""Commands that keep what they have committed when they fail; all others leave no new file then."""
TEMPORARY = re.compile(r"(^|/)\.(tmp|aside)-(?!pull/)|\.tmp$")
"""Files that nobody needs; a pull that is rerun needs those in `.tmp-pull`."""
NEVER_ENDS_WELL = ("import_upstream",)
"""Commands that reject their own file in the small world."""
NOTE = re.compile(r'<p class="note">(.*?)</p>', re.DOTALL)


def build(world: Path) -> None:
    """A dataset of 16 images, a list of 9 images, a file that claims to be an upstream checkpoint."""
    for split, count in (("train", 8), ("val", 2)):
        for label in ("cat", "dog"):
            for number in range(count):
                write(world / "data" / split / label / f"{number:02d}.png", encoded(picture(number, (64, 64))))
    for number in range(9):
        write(world / "pictures" / f"{number}.png", encoded(picture(number, (64, 64))))
    (world / "list.txt").write_text("".join(f"pictures/{number}.png\n" for number in range(9)))
    (world / "upstream.pth").write_bytes(b"PK\x03\x04 not a checkpoint")


def words_of(command: str) -> list[str]:
    stage1 = {
        "recipe": "demo",
        "cache.samples_per_shard": 8,
        "cache.num_views": 1,
        "teacher.batch_size": 8,
    }
    train = {"train.epochs": 1, "train.global_batch_size": 8, "train.micro_batch_size": 8, "train.checkpoint_steps": 1,
             "train.keep_checkpoints": 2}  # fmt: skip
    again = {
        name: " ".join(map(str, cache_flags(name, "teacher.safetensors", **stage1, **{"data.source": source}))).replace(
            "--data.max_samples 96", ""
        )
        for name, source in (("cache", "data"), ("soft", "list.txt"))
    }
    return (
        COMMANDS[command]
        .format(
            cache_again=again["cache"],
            soft_again=again["soft"],
            train=" ".join(flags(train)),
            tune=" ".join(flags({"epochs": 1, "batch": 8, "workers": 0, "views.randaugment_ops": 0})),
        )
        .split()
    )


class World:
    """A copy of the small world. Before each case, the files that the last case has changed are restored."""

    def __init__(self, folder: Path) -> None:
        self.original, self.place = folder / "original", folder / "world"
        self._whole: dict[Path, tuple[int, ...]] = {}

    def keep(self) -> None:
        """Take the world as it is now as the whole one."""
        shutil.copytree(self.place, self.original)
        self._whole = self.files()

    def put_back(self) -> None:
        now = self.files()
        for name in now.keys() - self._whole.keys():
            remove(self.place / name)
        for name in sorted(self._whole):  # folders come before their files
            if now.get(name) == self._whole[name]:
                continue
            remove(self.place / name)
            if (self.original / name).is_dir():
                (self.place / name).mkdir()
            else:
                shutil.copyfile(self.original / name, self.place / name)
                self._whole[name] = state(self.place / name)

    def files(self) -> dict[Path, tuple[int, ...]]:
        """State of every file and folder by its path in the world."""
        return {path.relative_to(self.place): state(path) for path in self.place.rglob("*")}

    def new_files(self) -> list[str]:
        """Files that are not part of the whole world."""
        new = self.files().keys() - self._whole.keys()
        return sorted(str(name) for name in new if not (self.place / name).is_dir())


def state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced; of a folder, only that it is one."""
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        return (found.st_mode,)
    return found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hook(log: int, root: str, broken: os.stat_result | None):
    def hook(event, arguments):
        if event == "import" and log >= 0:
            os.write(log, f"{arguments[0]}\n".encode())
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(os.fspath(arguments[0])))
        if broken is not None and os.path.exists(path) and os.path.samestat(os.stat(path), broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if log >= 0 and path.startswith(root):
            os.write(log, f"{path}\n".encode())

    return hook


def _child(command: str, words: list[str], place: Path, output: Path, log: int, broken: os.stat_result | None) -> None:
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
        faulthandler.enable()  # a hang is ended by SIGABRT: the output shows where it was
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


def call(command: str, world: World, log: int = -1, broken: os.stat_result | None = None) -> tuple[int, str]:
    """(exit code, output); a command that hangs is ended by SIGABRT, code -6, and its output shows where it was."""
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
            os.kill(pid, signal.SIGABRT)
            time.sleep(1)
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def _asleep_after(pid: int) -> tuple[str, ...] | None:
    """CPU time of a sleeping process; None while it runs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return tuple(fields[11:15]) if fields[0] == "S" else None


def files_of(command: str, world: World) -> list[str]:
    """Files that the command opens, one of each kind; names that differ only in numbers count as one.

    What the command has imported is imported here, for the forked children."""
    world.put_back()
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), writing)
        status, output = call(command, world, writing)
        os.close(reading), os.close(writing)
        log.seek(0)
        assert status == 0 or command in NEVER_ENDS_WELL, f"{command} fails on whole files: {output}"
        lines = log.read().decode().splitlines()
    for module in lines:
        if not module.startswith((os.sep, "pipelines")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    opened = {os.path.relpath(line, world.place) for line in lines if line.startswith(os.sep)}
    whole = [str(path.relative_to(world.original)) for path in sorted(world.original.rglob("*")) if path.is_file()]
    only = ONLY.get(command.split()[-1])
    found = [name for name in whole if name in opened and (only is None or re.fullmatch(only, name))]
    return list({re.sub(r"\d+", "0", re.sub(r"/(cat|dog)/", "/c/", name)): name for name in reversed(found)}.values())


@contextlib.contextmanager
def replaced(world: World, name: str, kind: str) -> Iterator[os.stat_result | None]:
    """Replace a file; yields the file that cannot be read, if that is the damage."""
    world.put_back()
    file = world.place / name
    if kind == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "huge":
        os.truncate(file, SPARSE_BYTES)
    elif kind == "unreadable":
        with open(file, "rb") as opened:  # while it is open, no new file gets its number
            yield os.fstat(opened.fileno())
        return
    else:
        file.unlink()
        put(file, kind)
    yield None


def put(file: Path, kind: str) -> None:
    """Put an empty file, or something that is not a regular file, in a place that is free; nothing for "missing"."""
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "fifo":
        os.mkfifo(file)


def verdict(command: str, case: str, status: int, output: str, notes: set[str], new: list[str]) -> str | None:
    """The problem with an outcome; None for an error message, a finding, or a file that may be missing."""
    if status < 0:
        return f"hangs or was killed by signal {-status}"
    if "Traceback (most recent call last)" in output or '  File "' in output:
        return f"traceback: {output.strip().splitlines()[-1][:160]}"
    allowed = any(
        re.fullmatch(names, command) and re.fullmatch(file, case) and text in output for names, file, text, _ in FINE
    )
    if status not in (1, 2) and not (status == 0 and allowed):
        return f"status {status}"
    errors = len(re.findall(r"^error: ", output, re.MULTILINE))
    if errors != (status == 2):
        return f"status {status} with {errors} error messages"
    left = [name for name in new if TEMPORARY.search(name) or (status != 0 and command.split()[0] not in WRITE)]
    if left:
        return f"status {status} leaves {', '.join(left)}"
    # A neighboring run, in which a baseline is looked for, is another run's business.
    other = case.startswith("data/") or (command == "report" and case.startswith("soft_run/summary.json "))
    silent = command.startswith("report") and status == 0 and not notes and not other
    return "status 0, and no note on the page" if silent else None


def notes_of(world: World) -> set[str]:
    """The notes on the page of a report."""
    page = world.place / "page.html"
    return set(NOTE.findall(page.read_text(encoding="utf-8"))) if page.exists() else set()


def faults(command: str, world: World) -> list[str]:
    """`file kind: what is wrong` of every case."""
    found, names, started = [], files_of(command, world), time.monotonic()
    usual = notes_of(world)
    for name, kind in itertools.product(names, KINDS):
        now = time.monotonic()
        with replaced(world, name, kind) as broken:
            status, output = call(command, world, broken=broken)
        wrong = verdict(command, f"{name} {kind}", status, output, notes_of(world) - usual, world.new_files())
        if wrong is not None:
            found.append(f"{name} {kind}: {wrong}\n{output[-500:]}")
        print(f"{command} {name} {kind}: {wrong or 'fine'} ({time.monotonic() - now:.1f} s)", flush=True)
    print(f"{command}: {len(names)} files, {len(names) * len(KINDS)} cases, {time.monotonic() - started:.0f} s")
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
    runs = {"half": "run", "new": "soft_run"}
    for command in ("cache_teacher", "distill", "cache_teacher unlabeled", "distill unlabeled"):
        words = [runs.get(word, word) for word in words_of(command)]
        done = subprocess.run([sys.executable, "-m", f"pipelines.{command.split()[0]}", *words], cwd=place,
                              env=environment, capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    interrupt(place / "run", place / "half")
    world.keep()
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
    assert faults(command, world) == []


if __name__ == "__main__":
    here = small_world(Path(tempfile.mkdtemp()))
    for one in sys.argv[1:] or COMMANDS:
        print(*faults(one, here), sep="\n")
    shutil.rmtree(here.place.parent)
