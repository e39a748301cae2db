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
import shutil
import time
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
LOCAL = {"wandb": "wandb", "mlflow": "mlruns"}
"""Folders that trackers create in the run folder."""
MLFLOW = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Environment variables for mlflow, unless they are set. By default, it retries an unreachable server for minutes."""
HELP = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline to log into the run folder",
    "mlflow": "correct or unset MLFLOW_TRACKING_URI; without it, mlflow logs into the run folder",
    "trackio": "check your trackio settings (TRACKIO_DIR is the folder it writes to)",
}
"""What to do if a tracker cannot be started."""


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
        folder = run / LOCAL[name] if name in LOCAL else None
        is_new = folder is not None and not folder.exists()
        try:
            if name == "mlflow":
                kept, self._log, self._finish = _mlflow_run(library, run, kept, config)
            else:
                kept = kept or uuid.uuid4().hex
                place = {"id": kept, "dir": str(run)} if name == "wandb" else {}
                session = library.init(project=PROJECT, name=run.name, resume="allow", config=config, **place)
                self._log, self._finish = session.log, session.finish
        except Exception as error:  # these packages connect to servers and can raise anything
            if folder is not None and is_new:
                shutil.rmtree(folder, ignore_errors=True)
            fix = f"{HELP[name]}; to train without it, remove --tracker {name}"
            raise UserError(f"cannot start the tracker {name}", got=str(error).strip(), fix=fix) from error
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


def _mlflow_run(
    library: Any, run: Path, kept: str | None, config: Mapping[str, Any]
) -> tuple[str, Callable[..., None], Callable[[], None]]:
    """Start or resume an mlflow run: its ID, and functions that log values and end the run.

    A client is used instead of mlflow's global state, because each run of a series has its own folder. Without a
    tracking URI, mlflow writes to that folder, which it allows only if MLFLOW_ALLOW_FILE_STORE is set. If that folder
    was deleted, a resumed run starts a new mlflow run.
    """
    for name, value in MLFLOW.items():
        os.environ.setdefault(name, value)
    place = None if library.is_tracking_uri_set() else (run / LOCAL["mlflow"]).resolve()
    if place is not None and not place.exists():
        kept = None
    client = library.MlflowClient(None if place is None else place.as_uri())
    entities = library.entities
    if kept is None:
        found = client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else client.create_experiment(PROJECT)
        kept = str(client.create_run(experiment, run_name=run.name).info.run_id)
        params = [entities.Param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(params), 100):  # the most that mlflow accepts at once
            client.log_batch(kept, params=params[start : start + 100])
    else:  # mlflow rejects changed options in a resumed run
        client.update_run(kept, status="RUNNING")

    def log(values: Mapping[str, float], step: int) -> None:
        now = time.time_ns() // 1_000_000
        client.log_batch(kept, metrics=[entities.Metric(key, value, now, step) for key, value in values.items()])

    return kept, log, lambda: client.set_terminated(kept)


def _kept_id(run: Path, name: str) -> str | None:
    """This run's tracker ID from an earlier session."""
    if not os.path.lexists(run / ID):
        return None
    try:
        kept = TypeAdapter(dict[str, str]).validate_json(read_file(run / ID, "a tracker ID file", 1 << 12))
    except (UserError, ValueError):
        return None
    return kept.get(name)
