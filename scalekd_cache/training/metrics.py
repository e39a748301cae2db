"""A run's metrics by step: metrics.jsonl and TensorBoard events.

In: values by step. Out: one JSON object per line, and event files. The lines are read back for reports and on resume.
Invariant: each line is written in a single append and each event is flushed, so a full disk is reported at that step.
On resume, damaged lines and lines for lost steps are dropped.
"""

import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import checked, open_file, unreadable
from scalekd_cache.store.durable_files import write_atomically
from scalekd_cache.training.run_files import METRICS, Finite

LINES_BYTES = 1 << 30
"""Maximum size of metrics.jsonl for resuming a run, enough for about 3 million logged steps."""
SHOWN_BYTES = 1 << 27
"""Maximum size of metrics.jsonl for a report."""
LINE_BYTES = 1 << 20


class EventFile:
    """A TensorBoard event file, flushed after each event.

    torch's `SummaryWriter` writes in a background thread, so a full disk causes a traceback at some later step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed by `close`
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Viewers drop an interrupted session's events from this step on.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the scalars for a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary as Scalars

        scalars = Scalars(value=[Scalars.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=scalars))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The valid lines in metrics.jsonl, and the number of damaged ones.

    Raises:
        UserError: the file cannot be read, or is too large.
    """
    if not os.path.lexists(run / METRICS):
        return [], 0
    lines = [values for _, values in _lines(run / METRICS, dict[str, Finite], SHOWN_BYTES)]
    whole = [{**values, "step": int(values["step"])} for values in lines if values is not None]
    return whole, len(lines) - len(whole)


def drop_lines_after(file: Path, kind: type[Any], step: int) -> int:
    """Drop damaged lines, and lines for steps after `step`, whose results were lost in an interruption.

    Returns:
        The number of damaged lines.
    """
    if not os.path.lexists(file):
        return 0
    kept, damaged = [], 0
    for line, values in _lines(file, kind, LINES_BYTES):
        damaged += values is None
        if values is not None and values["step"] <= step:
            kept.append(line)
    write_atomically(file, b"".join(kept))
    return damaged


def _lines(file: Path, kind: type[Any], limit_bytes: int) -> Iterator[tuple[bytes, Any]]:
    """Each line with its values (None: damaged). Text after the last newline is ignored, because it is still being
    written or was cut off by a kill."""
    try:
        with io.BufferedReader(open_file(file, "a JSONL file")) as reader:  # type: ignore[type-var]
            while line := reader.readline(LINE_BYTES):
                limit_bytes -= len(line)
                whole = line.endswith(b"\n")
                if limit_bytes < 0 or (not whole and len(line) == LINE_BYTES):
                    raise UserError("a JSONL file is too large", where=file)
                if whole:
                    yield line, _values(line, kind, file)
    except (UserError, OSError) as error:
        text = str(error if isinstance(error, UserError) else unreadable(error, file, "a JSONL file"))
        fix = None if "what to do: " in text else "move or delete this file, then rerun to start a new one"
        raise UserError(text, fix=fix) from error


def _values(line: bytes, kind: type[Any], file: Path) -> Any:
    try:
        values: Any = checked(line, kind, "a line", file)
    except UserError:
        return None
    step = values.get("step", -1)
    return values if 0 <= step < 2**53 and step == int(step) else None
