"""The small files of a run's folder, checked when they are read: options, facts of the cache, summary, metrics.

In: a run's folder, which another machine, version or person may have written. Out: values whose types were checked.
Invariant: a damaged file is a `UserError` that names it and the way to go on; a damaged line of metrics is left out
and counted; nothing is read beyond a limit, and nothing but regular files is opened.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import yaml
from pydantic import Field
from typing_extensions import TypedDict

from scalekd_cache.config.base import flat
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import StudentConfig
from scalekd_cache.errors import UserError, unknown_name
from scalekd_cache.store.checked_files import checked, open_file, read_checked, read_file, unreadable
from scalekd_cache.store.durable_files import write_atomically

Summary = dict[str, Any]
OPTIONS = "config.yaml"
FACTS = "cache.json"
"""What a run keeps of its cache: fingerprint, image size, class names, where the data is."""
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
OPTIONS_BYTES = SUMMARY_BYTES = 1 << 17
FACTS_BYTES = 1 << 26
LINES_BYTES = 1 << 30
"""Longest file of lines that a run resumes: about 3 million logged steps."""
SHOWN_BYTES = 1 << 27
"""Longest metrics that a report shows."""
LINE_BYTES = 1 << 20
WRITTEN_OPTIONS = ("cache", "student", "train", "device")
"""Some of the options that every config.yaml has, the last one among them."""
AGAIN = "remove this file and rerun `make distill` with the options of this run: it is written again"
T = TypeVar("T")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class SummaryFields(TypedDict):
    """summary.json; fields that are not required came with later versions."""

    student: str
    teacher: str
    targets: str
    top1: Finite | None
    top5: Finite | None
    teacher_top1: Finite | None
    epochs: Count
    steps: Count
    seed: int
    views: Count
    bytes_per_view: Finite
    cache_fingerprint: str
    images_per_s: Finite
    minutes: Finite
    has_classifier: NotRequired[bool]
    val_images: NotRequired[Count]
    zero: NotRequired[Count]
    world_size: NotRequired[Count]
    codec: NotRequired[str]
    export_max_logit_difference: NotRequired[Finite]


class CacheFacts(TypedDict):
    """cache.json"""

    fingerprint: str
    views: Annotated[int, Field(ge=1, lt=2**31)]
    image_size: Annotated[int, Field(ge=1, le=2048)]
    class_names: list[str]
    data: dict[str, Any]


class SampleLine(TypedDict):
    """A line of samples-r00000.jsonl."""

    step: Count
    micro: Count
    view: Count
    ids: list[int]


class _NoAliases(yaml.SafeLoader):
    """YAML without aliases, which we never write: a few lines of them stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read_config(run: Path) -> dict[str, Any]:
    """The options a run was started with.

    Raises:
        UserError: the folder holds no run, or the file is damaged.
    """
    file = run / OPTIONS
    if not os.path.lexists(file):
        raise no_run(run, OPTIONS)
    data = read_file(file, "a run's configuration", OPTIONS_BYTES)
    try:
        config = _NoAliases(data).get_single_data()
    except Exception as error:  # PyYAML's constructors raise errors of many kinds
        raise UserError("a run's configuration is damaged", got=error, where=file, fix=AGAIN) from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise UserError("a run's configuration is damaged", got=type(config).__name__, where=file, fix=AGAIN)
    if missing := [name for name in WRITTEN_OPTIONS if name not in config]:  # a file that ends early is YAML too
        raise UserError("a run's configuration is damaged", got=f"no {missing[0]}", where=file, fix=AGAIN)
    return config


def student_options(run: Path) -> StudentConfig:
    """The student among the options of a run.

    Raises:
        UserError: as `read_config`, or it is no student.
    """
    return _checked_part(read_config(run).get("student"), StudentConfig, run / OPTIONS)


def text_option(options: Mapping[str, Any], name: str) -> str:
    """An option of a run as text, for people; options are only compared, never trusted."""
    return str(flat(options).get(name, "not known"))


def read_facts(run: Path) -> dict[str, Any]:
    """What a run keeps of its cache.

    Raises:
        UserError: the folder holds no run that has begun, or the file is damaged.
    """
    file = run / FACTS
    if not os.path.lexists(file):
        raise no_run(run, FACTS)
    try:
        return dict(read_checked(file, CacheFacts, "what a run keeps of its cache", FACTS_BYTES))
    except UserError as error:
        raise UserError(str(error), fix=AGAIN) from error


def data_of(run: Path, source: str | None) -> DataConfig:
    """The data set of a run's cache: where it was when the run began, or at another place (`source`).

    Raises:
        UserError: as `read_facts` and `read_config`, or the place is not a data set's.
    """
    names = DataConfig.__dataclass_fields__
    kept = {name: value for name, value in read_facts(run)["data"].items() if name in names}
    place = source or read_config(run).get("data") or kept.get("source")
    return _checked_part({**kept, "source": place}, DataConfig, run / FACTS)


def _checked_part(part: Any, kind: type[T], file: Path) -> T:
    """A part of a file as one of our dataclasses."""
    try:
        return checked(json.dumps(part, default=str), kind, "a part of it", file)
    except (UserError, ValueError, RecursionError) as error:
        raise UserError("a run's file is damaged", got=str(error).strip(), where=file, fix=AGAIN) from error


def read_summary(run: Path) -> Summary | None:
    """The summary of a run, None before it is finished.

    Raises:
        UserError: the file is damaged.
    """
    file = run / SUMMARY
    if not os.path.lexists(file):
        return None
    try:
        return dict(read_checked(file, SummaryFields, "a run's summary", SUMMARY_BYTES))
    except UserError as error:
        fix = "remove this file and rerun `make distill` with the options of this run: it measures and writes it again"
        raise UserError(f"a run's summary is damaged: {error}", fix=fix) from error


def no_run(run: Path, name: str) -> UserError:
    """The error of a folder that holds no run, with the runs beside it that have the nearest names."""
    if run.is_file():
        return UserError(f"{run} is a file, no run: give the folder of a run (RUN=)")
    there = [str(run.parent / file.parent.name) for file in run.absolute().parent.glob(f"*/{OPTIONS}")]
    return unknown_name("run", str(run), there, f"RUN=, a folder with {name}")


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl, and how many are left out because they are damaged.

    Raises:
        UserError: the file cannot be read, or is too large.
    """
    if not os.path.lexists(run / METRICS):
        return [], 0
    lines = [values for _, values in _lines(run / METRICS, dict[str, Finite], SHOWN_BYTES)]
    whole = [{**values, "step": int(values["step"])} for values in lines if values is not None]
    return whole, len(lines) - len(whole)


def keep_lines(file: Path, kind: type[Any], step: int) -> int:
    """Drop the lines of steps after `step`, lost with the last interruption, and those that are damaged.

    Returns:
        How many are damaged.
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
    """Each whole line with its values, None for a damaged one. What follows the last newline is being written now, or
    was cut by a kill: it is no line."""
    try:
        with io.BufferedReader(open_file(file, "a file of lines")) as reader:  # type: ignore[type-var]
            while line := reader.readline(LINE_BYTES):
                limit_bytes -= len(line)
                whole = line.endswith(b"\n")
                if limit_bytes < 0 or (not whole and len(line) == LINE_BYTES):
                    raise UserError("a file of lines is too large", where=file)
                if whole:
                    yield line, _values(line, kind, file)
    except (UserError, OSError) as error:
        text = str(error if isinstance(error, UserError) else unreadable(error, file, "a file of lines"))
        raise UserError(text, fix="move this file away and rerun: the run begins a new one") from error


def _values(line: bytes, kind: type[Any], file: Path) -> Any:
    try:
        values: Any = checked(line, kind, "a line", file)
    except UserError:
        return None
    step = values.get("step", -1)
    return values if 0 <= step < 2**53 and step == int(step) else None
