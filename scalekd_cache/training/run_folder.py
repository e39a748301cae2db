"""The run folder: its lock, and the files written during training.

In: options, loss terms and accuracies. Out: config.yaml, cache.json, metrics.jsonl, TensorBoard events, summary.json.
Invariant: a run folder belongs to one set of options and one job at a time. metrics.jsonl has one line per logged step,
in order, even after a resume.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import yaml

from scalekd_cache.config.base import flat, to_plain
from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.config.stage2 import FEW_CLASSES_WEIGHTS, PUBLISHED_WEIGHTS, DistillConfig, ScaleKDConfig
from scalekd_cache.errors import UserError, counted, require_folder, shell_command
from scalekd_cache.store.checked_files import check_regular
from scalekd_cache.store.durable_files import disk_errors, fsync_path, remove_stale, write_atomically
from scalekd_cache.store.locks import lock, open_lock
from scalekd_cache.store.plan import check_output_folder
from scalekd_cache.training.metrics import EventFile, drop_lines_after, read_metrics
from scalekd_cache.training.run_files import (
    FACTS,
    METRICS,
    OPTIONS,
    SUMMARY,
    Finite,
    Summary,
    no_run_to,
    read_config,
    read_facts,
    read_summary,
)
from scalekd_cache.training.trackers import CSV, ID, CsvFile, Logger, Tracker

LOCK = ".lock"
FOLDERS = ("checkpoints", "tensorboard", "export")
FREE_OPTIONS = {"run", "cache", "data", "device", "teacher_weights", "train.workers", "train.zero"}
FREE_OPTIONS |= {
    f"train.{name}"
    for name in ("keep_checkpoints", "checkpoint_epochs", "checkpoint_steps", "log_samples", "timeout_minutes")
}
FREE_OPTIONS |= {f"remote.{name}" for name in RemoteConfig.__dataclass_fields__}
FREE_OPTIONS |= {"train.compile", "train.channels_last", "train.cudnn_benchmark"}
FREE_OPTIONS |= {"follow", "follow_timeout_minutes", "pixels_from", "resume", "extend", "train.seeds", "train.tracker"}
"""Options that may change when a run is resumed, because they set only paths and resources."""


class RunFolder:
    """A training run's folder, locked by rank 0."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        """Open or create the folder.

        Raises:
            UserError: the folder belongs to a run with different options, or another process is training in it.
        """
        self.path = path
        self._events: EventFile | None = None
        self._loggers: list[Logger] = []
        require_folder(path, "--run")
        check_output_folder(path, "--run")  # before anything is created
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        with disk_errors(path, 0):
            path.mkdir(parents=True, exist_ok=True)
            check_paths(path)
            self._lock = self._take_lock()
        try:
            remove_stale(path)
            check_config(path, config)
        except BaseException:
            self.close()  # a live traceback, e.g., in a notebook, would hold the lock
            raise
        self._config = dict(config)

    def close(self) -> None:
        """Close the trackers and release the lock. If the run has written nothing, remove its folder."""
        for logger in self._loggers:
            if isinstance(logger, CsvFile | Tracker):
                logger.close()
        self._loggers = []
        with contextlib.suppress(OSError):
            if os.listdir(self.path) == [LOCK]:
                (self.path / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()

    def _take_lock(self) -> IO[bytes]:
        """Take the lock and hold it for this object's lifetime. Does nothing on a file system without locks."""
        file = open_lock(self.path / LOCK)
        try:
            lock(file, self.path / LOCK, wait=False)
        except BlockingIOError as error:
            file.close()
            what = f"another process is training in {self.path}: wait for it, or choose a different --run"
            raise UserError(what) from error
        return file

    @property
    def checkpoints(self) -> Path:
        """The checkpoint folder."""
        return self.path / "checkpoints"

    def summary(self) -> Summary | None:
        """The run's summary; None before the run is finished."""
        return read_summary(self.path)

    def set_weights(self, scalekd: ScaleKDConfig) -> None:
        """Set the feature weights that `write_facts` writes; by then the rule has turned them into numbers."""
        self._config["scalekd"] = to_plain(scalekd)

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write the options, and the cache facts that later commands need without the cache.

        Called after all checks, so that a rejected command leaves no options that conflict with the corrected command.
        """
        file = self.path / OPTIONS
        epochs = flat(self._config).get("train.epochs")
        if not file.exists():
            write_atomically(file, yaml.safe_dump(self._config, sort_keys=False).encode())
        elif started_epochs(self.path) != epochs:  # the run is being extended
            config = read_config(self.path)
            config["train"]["epochs"] = epochs
            write_atomically(file, yaml.safe_dump(config, sort_keys=False).encode())
        write_atomically(self.path / FACTS, (json.dumps(facts, indent=2) + "\n").encode())

    def start_metrics(self, step: int) -> int:
        """Open the metrics at a step. Damaged lines and lines for later, interrupted steps are dropped.

        Returns:
            The number of damaged lines.
        """
        damaged = drop_lines_after(self.path / METRICS, dict[str, Finite], step)
        with disk_errors(self.path, 0):
            self._events = EventFile(self.path / "tensorboard", step)
        return damaged

    def add_logger(self, logger: Logger | None) -> None:
        """Call a function for each new line in metrics.jsonl."""
        if logger is not None:
            self._loggers.append(logger)

    def reopen(self) -> None:
        """For a run that is being extended: remove the summary.

        Called after `write_facts` and `start_metrics`, so that a rerun after a kill in between still extends the run.
        """
        if os.path.lexists(self.path / SUMMARY):
            (self.path / SUMMARY).unlink()
            fsync_path(self.path)

    def is_evaluated(self, step: int) -> bool:
        """Whether the metrics contain an evaluation after this step. True if they are too large to read."""
        with contextlib.suppress(UserError):
            return any(line["step"] == step and "loss" not in line for line in read_metrics(self.path)[0])
        return True

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line of metrics, and send the same scalars to TensorBoard and the loggers.

        Raises:
            UserError: the disk is full or fails. Earlier lines remain.
        """
        line = json.dumps({"step": step, **values}) + "\n"
        with disk_errors(self.path, len(line)):
            with open(self.path / METRICS, "a", encoding="utf-8") as file:
                file.write(line)
            assert self._events is not None
            self._events.add(step, values)
        for logger in self._loggers:
            logger(step, values)

    def finish(self, summary: Summary) -> None:
        """Write the summary, which marks the run as finished."""
        if self._events is not None:
            self._events.close()
        write_atomically(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def check_paths(run: Path) -> None:
    """Check the paths that a run writes to.

    Raises:
        UserError: a path is taken by something else, such as a folder, a FIFO or a symlink loop.
    """
    for name in (OPTIONS, FACTS, SUMMARY, METRICS, CSV, ID):
        if os.path.lexists(run / name):
            check_regular(run / name, "one of the run's files")
    for name in FOLDERS:
        if os.path.lexists(run / name) and not (run / name).is_dir():
            raise UserError("this path in the run folder must be a folder", where=run / name, fix="move or delete it")


def started_epochs(run: Path) -> int | None:
    """The number of epochs that a run was started with or extended to; None for a folder without options."""
    if not os.path.lexists(run / OPTIONS):
        return None
    epochs = flat(read_config(run)).get("train.epochs")
    return epochs if isinstance(epochs, int) else None


def finished_summary(run: Path, epochs: int, extend: bool) -> Summary | None:
    """A finished run's summary; None if this command, or an earlier one that was killed, extends it to `epochs`."""
    summary = read_summary(run)
    if summary is None or (summary["epochs"] < epochs and (extend or started_epochs(run) == epochs)):
        return None
    return summary


def with_weights_of_run(config: DistillConfig, run: Path) -> DistillConfig:
    """The options of a command for a run folder. Feature weights that are set by rule stay as they were at the start
    of the run, so that a run from before the rule can be resumed."""
    if not os.path.lexists(run / OPTIONS):
        return config
    stored, weights = flat(read_config(run)), {}
    for name, published in PUBLISHED_WEIGHTS.items():
        weight = stored.get(f"scalekd.{name}")
        if getattr(config.scalekd, name) is None and weight in (published, FEW_CLASSES_WEIGHTS[name]):
            weights[name] = weight
    return replace(config, scalekd=replace(config.scalekd, **weights))


def check_config(run: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder is new or contains a run with these options. With `extend`, the run may have fewer epochs.

    Raises:
        UserError: it is a file, contains a run with different options, or `resume` or `extend` is set and there is no
            run.
    """
    require_folder(run, "--run")
    check_output_folder(run, "--run")
    if not os.path.lexists(run / OPTIONS):
        for action in ("resume", "extend"):
            if config.get(action):
                raise no_run_to(action, run)
        return
    stored, given = flat(read_config(run)), flat(config)
    defaults = flat(to_plain(DistillConfig()))  # for options added after the run was started
    names = sorted((stored | given).keys() - FREE_OPTIONS)
    different = [name for name in names if stored.get(name, defaults.get(name)) != given.get(name)]
    before, after = stored.get("train.epochs"), given.get("train.epochs", 0)
    extends = given.get("extend") and isinstance(before, int) and before < after
    if extends:
        different.remove("train.epochs")
    if different == ["train.epochs"] and isinstance(before, int):
        fix = f"to resume it: {_resume(run)}; "
        if before < after:
            fix += f"to extend it, set --extend; to start a new run from its weights, set --init {run} and a new --run"
        else:
            fix += f"to extend it, set --epochs above {before}; " if given.get("extend") else ""
            fix += "to start over, choose a different --run"
        raise UserError(f"{run} contains a run of {counted(before, 'epoch')}, not {after}", fix=fix)
    if different:
        longer = f"extend it: {shell_command('distill', run=run, epochs=after)} --extend"
        own = longer if extends else f"resume it: {_resume(run)}"
        cache = f" (it uses the cache {stored.get('cache')})" if stored.get("cache") != given.get("cache") else ""
        raise UserError(
            f"{run} contains a run with different options{cache}",
            got=", ".join(f"{name}={given.get(name)}" for name in different),
            expected=", ".join(f"{name}={stored.get(name)}" for name in different),
            fix=f"to {own}; for a new run, {_other_run(run, different, given)}"
            + ("" if _has_results(run) else f", or delete {run}, which has no checkpoint"),
        )


def _has_results(run: Path) -> bool:
    checkpoints = run / "checkpoints"
    return os.path.lexists(run / SUMMARY) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _resume(run: Path) -> str:
    """The command that resumes a run with its own options."""
    return f"{shell_command('distill', run=run)} --resume"


def _other_run(run: Path, different: list[str], given: Mapping[str, Any]) -> str:
    """Advice for a run with different options. The example's suffix is the one of the default folder."""
    if "train.targets" not in different:
        return "choose a different --run"
    seed, targets = given["train.seed"], given["train.targets"]
    return f"choose a different --run, for example --run {str(run).removesuffix(f'-seed{seed}')}-{targets}"


def is_locked(run: Path) -> bool:
    """Whether a process is currently training in a run folder."""
    try:
        with open_lock(run / LOCK, make=False) as file:
            lock(file, run / LOCK, wait=False, shared=True)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def check_same_cache(run: Path, fingerprint: str, cache: object) -> None:
    """Check that a run resumes with the cache it started with.

    Raises:
        UserError: the run started with a different cache.
    """
    if os.path.lexists(run / FACTS) and read_facts(run)["fingerprint"] != fingerprint:
        raise UserError(
            f"{run} contains a run that uses a different cache",
            got=f"{cache} with fingerprint {fingerprint[:16]}",
            expected=f"the cache with fingerprint {read_facts(run)['fingerprint'][:16]}",
            fix="choose a different --run, or remove the folder to start over",
        )
