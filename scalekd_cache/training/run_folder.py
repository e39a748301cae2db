"""What a run leaves behind for people: its folder, metrics, summary and the closing table.

In: configuration, loss terms, accuracies. Out: config.yaml, metrics.jsonl, TensorBoard events, summary.json, a table.
Invariant: a run folder belongs to one configuration and one process group at a time; metrics.jsonl has one line a
logged step, in order, also after a resume.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from scalekd_cache.config.base import flat
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError, require_folder
from scalekd_cache.models.evaluate import percent, teacher_accuracy
from scalekd_cache.store.checked_files import check_regular
from scalekd_cache.store.durable_files import explained, remove_stale, write_atomically
from scalekd_cache.store.locks import lock, open_lock
from scalekd_cache.training.run_files import (
    FACTS,
    METRICS,
    OPTIONS,
    SUMMARY,
    Finite,
    Summary,
    keep_lines,
    read_config,
    read_facts,
    read_summary,
)

LOCK = ".lock"
FOLDERS = ("checkpoints", "tensorboard", "export")
FREE_OPTIONS = {"run", "cache", "data", "device", "teacher_weights", "train.workers", "train.zero"}
FREE_OPTIONS |= {
    f"train.{name}"
    for name in ("keep_checkpoints", "checkpoint_epochs", "checkpoint_steps", "log_samples", "timeout_minutes")
}
FREE_OPTIONS |= {f"remote.{name}" for name in RemoteConfig.__dataclass_fields__}
FREE_OPTIONS |= {"follow", "follow_timeout_minutes", "pixels_from"}
"""Options that may change between two sessions of one run: places and means, not what is computed."""


class RunFolder:
    """The folder of one training run, held by one process (rank 0)."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Open or create the folder.

        Raises:
            UserError: when it belongs to a run with other options, or to one that is still going.
        """
        self.path = path
        self._events: EventFile | None = None
        require_folder(path, "RUN")
        with explained(path, 0):
            path.mkdir(parents=True, exist_ok=True)
            check_places(path)
            self._lock = self._take_lock()
        remove_stale(path)
        check_config(path, config)
        self._config = dict(config)

    def _take_lock(self) -> IO[bytes]:
        """The lock, held as long as this object is; without effect on a file system that has no locks."""
        file = open_lock(self.path / LOCK)
        try:
            lock(file, self.path / LOCK, wait=False)
        except BlockingIOError as error:
            file.close()
            what = f"the run {self.path} is still going, in another process: wait for it, or choose another RUN="
            raise UserError(what) from error
        return file

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def summary(self) -> Summary | None:
        """The summary of a finished run, None before it is finished."""
        return read_summary(self.path)

    def keep_facts(self, facts: Mapping[str, Any]) -> None:
        """Keep the options and what later commands need to know of the cache, which may be gone by then.

        Called when nothing can be refused any more: a command that was refused leaves no options that would refuse the
        corrected one.
        """
        file = self.path / OPTIONS
        if not file.exists():
            write_atomically(file, yaml.safe_dump(self._config, sort_keys=False).encode())
        write_atomically(self.path / FACTS, (json.dumps(facts, indent=2) + "\n").encode())

    def start_metrics(self, step: int) -> int:
        """Open the metrics at a step: lines of later steps, lost with the last interruption, are dropped.

        Returns:
            How many lines of earlier steps are damaged; they are dropped too.
        """
        damaged = keep_lines(self.path / METRICS, dict[str, Finite], step)
        with explained(self.path, 0):
            self._events = EventFile(self.path / "tensorboard", step)
        return damaged

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics; scalars go to TensorBoard too.

        Raises:
            UserError: the disk is full or fails; the lines before stay.
        """
        line = json.dumps({"step": step, **values}) + "\n"
        with explained(self.path, len(line)):
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line)
            assert self._events is not None
            self._events.add(step, values)

    def finish(self, summary: Summary) -> None:
        """Write the summary: from now on the run is finished."""
        if self._events is not None:
            self._events.close()
        write_atomically(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


class EventFile:
    """A file of TensorBoard events, written at once.

    torch's `SummaryWriter` writes in a thread, which meets a full disk later and prints a traceback.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed by `close`
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Viewers drop what an interrupted session logged for later steps.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """The scalars of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary as Scalars

        scalars = Scalars(value=[Scalars.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=scalars))

    def close(self) -> None:
        """No more events."""
        self._file.close()


def check_places(run: Path) -> None:
    """What a run writes is new, or was written by a run.

    Raises:
        UserError: something else (a folder, a FIFO, a link loop) has the name of one of its files or folders.
    """
    for name in (OPTIONS, FACTS, SUMMARY, METRICS):
        if os.path.lexists(run / name):
            check_regular(run / name, "a file of the run")
    for name in FOLDERS:
        if os.path.lexists(run / name) and not (run / name).is_dir():
            raise UserError("a folder of the run is not a folder", where=run / name, fix="move what is there away")


def check_config(run: Path, config: Mapping[str, Any]) -> None:
    """A folder is new, or of a run with these options.

    Raises:
        UserError: a file, or a run with other options.
    """
    require_folder(run, "RUN")
    if not os.path.lexists(run / OPTIONS):
        return
    kept, asked = flat(read_config(run)), flat(config)
    names = sorted((kept | asked).keys() - FREE_OPTIONS)
    different = [name for name in names if kept.get(name) != asked.get(name)]
    if different:
        raise UserError(
            "the run's folder holds a run with other options",
            got=", ".join(f"{name}={asked.get(name)}" for name in different),
            expected=", ".join(f"{name}={kept.get(name)}" for name in different),
            where=run / OPTIONS,
            fix="choose another RUN=, or remove the folder to start again",
        )


def is_going(run: Path) -> bool:
    """Whether a process on this machine is training in a run's folder now."""
    try:
        with open_lock(run / LOCK, make=False) as file:
            lock(file, run / LOCK, wait=False, shared=True)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def check_same_cache(run: Path, fingerprint: str, cache: object) -> None:
    """A run that has begun goes on, or is finished, with one cache.

    Raises:
        UserError: when the cache given is another one.
    """
    if os.path.lexists(run / FACTS) and read_facts(run)["fingerprint"] != fingerprint:
        raise UserError(
            "the run's folder holds a run on another cache",
            got=f"{cache} with fingerprint {fingerprint[:16]}",
            expected=f"the cache with fingerprint {read_facts(run)['fingerprint'][:16]}",
            where=run,
            fix="choose another RUN=, or remove the folder to start again",
        )


def alone_summary(run: Path, summary: Summary) -> Summary | None:
    """The finished run of the same student without a teacher (TARGETS=none) next to this run, at equal steps.

    A neighbor that cannot be read is passed over: it is not this run's.
    """
    for folder in sorted(run.absolute().parent.glob(f"*/{SUMMARY}")):
        try:
            other = read_summary(folder.parent)
        except UserError:
            continue
        same = ("student", "steps", "seed", "cache_fingerprint")
        if other and other.get("targets") == "none" and all(other.get(name) == summary.get(name) for name in same):
            return other
    return None


def closing_table(run: Path, summary: Summary) -> str:
    """What a person wants to know at the end of a run, a line each."""
    alone = alone_summary(run, summary) if summary["targets"] != "none" else None
    facts = {"spec": {"has_classifier": summary.get("has_classifier", True)}, "top1": summary["teacher_top1"]}
    teacher = teacher_accuracy(facts)
    rows = [
        ("teacher", f"{summary['teacher']}, {teacher}"),
        ("student", f"{summary['student']}, top-1 {percent(summary['top1'])}, top-5 {percent(summary['top5'])}"),
        ("targets", str(summary["targets"])),
        ("alone", f"top-1 {percent(alone['top1'])} at equal steps" if alone else "not run (TARGETS=none)"),
        ("epochs", f"{summary['epochs']} ({summary['steps']} steps, {summary['images_per_s']:.0f} images/s)"),
        ("minutes", f"{summary['minutes']:.1f}"),
        ("cache", f"{summary['views']} views, {summary['bytes_per_view']:,.0f} bytes a view, pixels included"),
        ("run", str(run)),
        ("export", str(run / "export")),
    ]
    if summary["targets"] == "none":
        rows = [row for row in rows if row[0] != "alone"]
    width = max(len(name) for name, _ in rows)
    line = "-" * 72
    return "\n".join([line, *(f"{name:<{width}}  {text}" for name, text in rows), line])
