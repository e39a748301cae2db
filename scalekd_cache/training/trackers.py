"""Experiment trackers: log a run's metrics to wandb, mlflow, trackio, a CSV file, or a user-supplied function.

In: a run folder, its options, and values by step. Out: the same values in the tracker, logged with its own library.
Invariant: values are written to metrics.jsonl first, then sent to the tracker. If a tracker fails, the run continues.
The run's tracker ID is stored in the run folder, so that a resumed run continues the same tracker run.
"""

import csv
import importlib
import io
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from scalekd_cache.config.base import flat
from scalekd_cache.errors import UserError, import_optional
from scalekd_cache.store.checked_files import read_file
from scalekd_cache.store.durable_files import write_atomically
from scalekd_cache.training.metrics import read_metrics

Logger = Callable[[int, Mapping[str, float]], None]
"""Function called on rank 0 with the step and values of every line in metrics.jsonl."""
PROJECT = "scalekd-cache"
ID, CSV = "tracker.json", "metrics.csv"
LIBRARIES = ("wandb", "mlflow", "trackio")


def check_tracker(name: str) -> None:
    """Raise `UserError` if the tracker's package is not installed."""
    if name in LIBRARIES:
        import_optional(name, f"train.tracker={name} needs {name}", name)


def start_tracker(name: str, run: Path, options: Mapping[str, Any], report: Callable[[str], None]) -> Logger | None:
    """Start the logger for `train.tracker`. Returns None for tensorboard, because all runs write TensorBoard events.

    Args:
        name: the value of `train.tracker`.
        run: the run folder, whose name is used as the run name in the tracker.
        options: the run's options.
        report: prints a line.

    Raises:
        UserError: the tracker cannot be started.
    """
    if name == "csv":
        return CsvFile(run)
    return Tracker(name, run, options, report) if name in LIBRARIES else None


class CsvFile:
    """Writes metrics.jsonl as a table, metrics.csv, with one column per value, at each evaluation and at the end."""

    def __init__(self, run: Path) -> None:
        self._run = run

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        if "top1" in values or "held_out_loss" in values:
            self.close()

    def close(self) -> None:
        """Write the file."""
        lines, _ = read_metrics(self._run)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(self._run / CSV, text.getvalue().encode())


class Tracker:
    """One session of a run in wandb, trackio or mlflow."""

    def __init__(self, name: str, run: Path, options: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self._name, self._report, self._works = name, report, True
        check_tracker(name)
        library, kept = importlib.import_module(name), _kept_id(run, name)
        config = {key: value if isinstance(value, int | float) else str(value) for key, value in flat(options).items()}
        try:
            if name == "mlflow":
                library.set_experiment(PROJECT)
                session = library.start_run(run_id=kept, run_name=run.name)
                if kept is None:  # mlflow rejects changed values in a resumed run
                    library.log_params(config)
                kept = session.info.run_id
                self._log, self._finish = library.log_metrics, library.end_run
            else:
                kept = kept or uuid.uuid4().hex
                place = {"id": kept, "dir": str(run)} if name == "wandb" else {}
                session = library.init(project=PROJECT, name=run.name, resume="allow", config=config, **place)
                self._log, self._finish = session.log, session.finish
        except Exception as error:  # these packages connect to servers and can raise anything
            raise UserError(
                f"cannot start the tracker {name}",
                got=error,
                fix=f"check your {name} settings (for wandb offline: WANDB_MODE=offline), or remove train.tracker",
            ) from error
        write_atomically(run / ID, json.dumps({name: kept}).encode())

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self._log(dict(values), step=step))

    def close(self) -> None:
        """End the session."""
        self._attempt(self._finish)

    def _attempt(self, act: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # a failing tracker must not end the run, whatever it raises
            self._works = False
            self._report(f"the tracker {self._name} failed and was turned off; metrics.jsonl is complete: {error}")


def _kept_id(run: Path, name: str) -> str | None:
    """This run's tracker ID from an earlier session."""
    if not os.path.lexists(run / ID):
        return None
    try:
        kept = TypeAdapter(dict[str, str]).validate_json(read_file(run / ID, "a tracker ID file", 1 << 12))
    except (UserError, ValueError):
        return None
    return kept.get(name)
