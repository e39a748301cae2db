"""Reads the small files in a run folder: options, cache facts and summary.

In: a run folder, possibly written on a different machine or by a different version. Out: type-checked values.
Invariant: a damaged file raises a `UserError` that names the file and suggests a fix. Sizes are limited, and only
regular files are opened.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import Field
from typing_extensions import TypedDict

from scalekd_cache.config.base import flat
from scalekd_cache.config.options import build, options_of
from scalekd_cache.config.places import default_run
from scalekd_cache.config.recipes import PlainLoader
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig, StudentConfig
from scalekd_cache.errors import UserError, unknown_name
from scalekd_cache.store.checked_files import checked, read_checked, read_file

Summary = dict[str, Any]
OPTIONS = "config.yaml"
FACTS = "cache.json"
"""File with a run's cache facts (fingerprint, class names, dataset) and the student's image size."""
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
MAX_RUNS = 12
"""Maximum number of runs in one report."""
OPTIONS_BYTES = SUMMARY_BYTES = 1 << 17
FACTS_BYTES = 1 << 26
WRITTEN_OPTIONS = ("cache", "student", "train", "device")
"""Options found in every complete config.yaml, including the one that is written last."""
AGAIN = "to recreate this file, remove it and rerun `scalekd distill` with this run's options"
T = TypeVar("T")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class TeacherSummary(TypedDict):
    """A teacher in a run with multiple teachers."""

    name: str
    """The teacher's name in metric names."""
    label: NotRequired[str]
    """The name for tables, marked if the weights are random."""
    share: Finite
    """Weight of its feature losses; the weights of all teachers sum to 1."""
    top1: Finite | None
    fingerprint: str
    """Its cache's fingerprint."""
    held_out: dict[str, Finite]
    """Held-out metrics that compare the student with this teacher; empty for caches with labels."""


class RunSummary(TypedDict):
    """A finished run: the contents of its summary.json. Older files lack some of the optional fields."""

    student: str
    teacher: str
    targets: str
    top1: Finite | None
    top5: Finite | None
    teacher_top1: Finite | None
    """With multiple teachers, the value for the best one."""
    teachers: NotRequired[list[TeacherSummary]]
    """With multiple teachers, one entry per teacher, in the order of the caches."""
    epochs: Count
    steps: Count
    seed: int
    views: Count
    bytes_per_view: Finite
    cache_fingerprint: str
    images_per_s: Finite
    minutes: Finite
    """Training time of all sessions."""
    has_classifier: NotRequired[bool]
    image_size: NotRequired[Count]
    val_images: NotRequired[Count]
    held_out: NotRequired[dict[str, Finite]]
    zero: NotRequired[Count]
    world_size: NotRequired[Count]
    codec: NotRequired[str]
    export_max_logit_difference: NotRequired[Finite]
    run: NotRequired[str]
    """The run folder. This field and the following ones are not stored in the file."""
    runs: NotRequired[list[dict[str, Any]]]
    """With multiple students or seeds, the summaries of all runs; the other fields are those of the first run."""
    series: NotRequired[list[dict[str, Any]]]
    """With multiple students or seeds, one row per student with the mean and standard deviation over the seeds."""


class CacheFacts(TypedDict):
    """The fields of cache.json."""

    fingerprint: str
    views: Annotated[int, Field(ge=1, lt=2**31)]
    image_size: Annotated[int, Field(ge=1, le=2048)]
    class_names: list[str]
    num_classes: NotRequired[Count]
    data: dict[str, Any]
    teacher: NotRequired[str]
    """Name and accuracy of the cache's teacher."""


class SampleLine(TypedDict):
    """A line in samples-r00000.jsonl."""

    step: Count
    micro: Count
    view: Count
    ids: list[int]


def read_config(run: Path) -> dict[str, Any]:
    """The options that a run was started with.

    Raises:
        UserError: the folder does not contain a run, or the file is damaged.
    """
    file = run / OPTIONS
    if not os.path.lexists(file):
        raise missing_run(run, OPTIONS)
    try:
        data = read_file(file, "a run's configuration", OPTIONS_BYTES)
    except UserError as error:
        raise _with_fix(error) from error
    try:
        config = PlainLoader(data).get_single_data()
    except Exception as error:  # PyYAML's constructors raise many types of errors
        raise UserError("the run's configuration is damaged", got=error, where=file, fix=AGAIN) from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        got = "a key that is not a string" if isinstance(config, dict) else type(config).__name__
        expected = "a YAML mapping of option names to values"
        raise UserError("the run's configuration is damaged", got=got, expected=expected, where=file, fix=AGAIN)
    if missing := [name for name in WRITTEN_OPTIONS if name not in config]:  # a truncated file is still valid YAML
        raise UserError("the run's configuration is damaged", got=f"no {missing[0]}", where=file, fix=AGAIN)
    return config


def options_of_run(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run was started with, if this command resumes or extends it; otherwise nothing. The device and
    the number of workers depend on this machine, and a series takes no options from its runs.

    Args:
        given: the command's options, keyed by dotted name.

    Raises:
        UserError: no student is given, and the folder does not contain a run; or as in `read_config`.
    """
    actions = {name: given[name] for name in ("resume", "extend") if name in given}
    chosen = build(DistillConfig, actions)
    student, targets = given.get("student.name"), str(given.get("train.targets") or chosen.train.targets)
    run = given.get("run") or (default_run(str(student), targets) if student else None)
    several = "," in str(student or "") or given.get("train.seeds") is not None
    if run is None or several or not (chosen.resume or chosen.extend):
        return {}
    if not os.path.lexists(Path(run) / OPTIONS):
        if student is None:
            raise no_run_to("resume" if chosen.resume else "extend", Path(run))
        return {}
    used = {option.name for option in options_of(DistillConfig)} - {"device", "train.workers"}
    stored = flat(read_config(Path(run)))
    return {**{name: value for name, value in stored.items() if name in used}, "run": str(run)}


def _with_fix(error: UserError) -> UserError:
    """The error with `AGAIN` as its fix, unless it already has one."""
    return UserError(str(error), fix=None if "what to do: " in str(error) else AGAIN)


def student_options(run: Path) -> StudentConfig:
    """A run's student options.

    Raises:
        UserError: as in `read_config`, or the section is invalid.
    """
    return _checked_part(read_config(run).get("student"), StudentConfig, run / OPTIONS)


def text_option(options: Mapping[str, Any], name: str) -> str:
    """One of a run's options, as text for display. The file is not trusted."""
    return str(flat(options).get(name, "not known"))


def read_facts(run: Path) -> dict[str, Any]:
    """A run's cache facts.

    Raises:
        UserError: the folder does not contain a started run, or the file is damaged.
    """
    file = run / FACTS
    if not os.path.lexists(file):
        raise missing_run(run, FACTS)
    try:
        return dict(read_checked(file, CacheFacts, "a run's cache facts", FACTS_BYTES))
    except UserError as error:
        raise _with_fix(error) from error


def classes_of(facts: Mapping[str, Any]) -> int:
    """Width of a student's classifier, from the run's cache facts; 0 without a classifier."""
    return int(facts.get("num_classes", len(facts["class_names"])))


def data_of(run: Path, source: str | None) -> DataConfig:
    """The dataset that a run's cache was made from, at its recorded path or at `source`.

    Raises:
        UserError: as in `read_facts` and `read_config`, or the path is not a dataset.
    """
    names = DataConfig.__dataclass_fields__
    kept = {name: value for name, value in read_facts(run)["data"].items() if name in names}
    place = source or read_config(run).get("data") or kept.get("source")
    return _checked_part({**kept, "source": place}, DataConfig, run / FACTS)


def _checked_part(part: Any, kind: type[T], file: Path) -> T:
    """Parse a section of a file into one of our dataclasses."""
    try:
        return checked(json.dumps(part, default=str), kind, "a section of the file", file)
    except (UserError, ValueError, RecursionError) as error:
        raise UserError("a file in the run folder is damaged", got=str(error).strip(), where=file, fix=AGAIN) from error


def read_summary(run: Path) -> Summary | None:
    """A run's summary; None before the run is finished.

    Raises:
        UserError: the file is damaged.
    """
    file = run / SUMMARY
    if not os.path.lexists(file):
        return None
    try:
        return dict(read_checked(file, RunSummary, "a run's summary", SUMMARY_BYTES))
    except UserError as error:
        raise _with_fix(error) from error


def missing_run(run: Path, name: str) -> UserError:
    """The error for a folder without a run, which suggests neighboring runs with similar names."""
    if run.is_file():
        return UserError(f"{run} is a file: set --run to a run folder")
    if (run / OPTIONS).is_file():
        fix = "wait a moment, or rerun `distill` with this run's options"
        what = f"this run has no {name}: it is still starting, or it stopped before it wrote the file"
        return UserError(what, where=run, fix=fix)
    return unknown_name("run", str(run), _runs_near(run), f"--run must be a folder that contains {OPTIONS}")


def no_run_to(action: str, run: Path) -> UserError:
    """The error if `action` (resume or extend) is set and the folder has no run; it suggests neighboring runs."""
    fix = f"remove --{action} to start a new run; new seeds and students of a series need a command of their own"
    return unknown_name(f"run to {action} in", str(run), _runs_near(run), fix)


def _runs_near(run: Path) -> list[str]:
    """Runs next to this folder and in it, and the run that it is a part of."""
    beside = [run.parent / file.parent.name for file in run.absolute().parent.glob(f"*/{OPTIONS}")]
    above = [run.parent] if (run.parent / OPTIONS).is_file() else []
    return [str(path) for path in (*beside, *(file.parent for file in run.glob(f"*/{OPTIONS}")), *above)]
