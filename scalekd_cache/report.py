"""What a run leaves behind for people: its folder, metrics, summary and the closing table.

In: configuration, loss terms, accuracies. Out: config.yaml, metrics.jsonl, TensorBoard events, summary.json, a table.
Invariant: a run folder belongs to one configuration and one process group at a time; metrics.jsonl has one line a
logged step, in order, also after a resume.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from scalekd_cache.config import RemoteConfig, flat
from scalekd_cache.errors import UserError, mistype, refuse_file
from scalekd_cache.store.files import write_atomically
from scalekd_cache.store.locks import lock, open_lock

Summary = dict[str, Any]
LOCK = ".lock"
FACTS = "cache.json"
"""What a run keeps of its cache: fingerprint, image size, class names, where the data is."""

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
        self._writer: Any = None
        refuse_file(path, "RUN")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
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
        file = self.path / "config.yaml"
        if not file.exists():
            write_atomically(file, yaml.safe_dump(self._config, sort_keys=False).encode())
        write_atomically(self.path / FACTS, (json.dumps(facts, indent=2) + "\n").encode())

    def start_metrics(self, step: int) -> None:
        """Open the metrics at a step: lines of later steps, lost with the last interruption, are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        file = self.path / "metrics.jsonl"
        if file.exists():
            whole = file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline was cut by a kill
            lines = [line for line in whole if json.loads(line)["step"] <= step]
            write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
        self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics; scalars go to TensorBoard too."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: Summary) -> None:
        """Write the summary: from now on the run is finished."""
        if self._writer is not None:
            self._writer.close()
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def check_config(run: Path, config: Mapping[str, Any]) -> None:
    """A folder is new, or of a run with these options.

    Raises:
        UserError: a file, or a run with other options.
    """
    refuse_file(run, "RUN")
    if (run / "config.yaml").exists():
        _check_same_options(run / "config.yaml", config)


def _check_same_options(file: Path, config: Mapping[str, Any]) -> None:
    kept, asked = flat(yaml.safe_load(file.read_text(encoding="utf-8"))), flat(config)
    names = sorted((kept | asked).keys() - FREE_OPTIONS)
    different = [name for name in names if kept.get(name) != asked.get(name)]
    if different:
        raise UserError(
            "the run's folder holds a run with other options",
            got=", ".join(f"{name}={asked.get(name)}" for name in different),
            expected=", ".join(f"{name}={kept.get(name)}" for name in different),
            where=file,
            fix="choose another RUN=, or remove the folder to start again",
        )


def read_summary(run: Path) -> Summary | None:
    """The summary.json of a run, None when it has none."""
    file = run / "summary.json"
    if not file.exists():
        return None
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("a run's summary is damaged", got=error, where=file, fix="remove it and run again") from error
    assert isinstance(summary, dict)
    return summary


def read_config(run: Path) -> dict[str, Any]:
    """The options a run was started with.

    Raises:
        UserError: when the folder holds no run.
    """
    file = run / "config.yaml"
    if not file.exists():
        raise _no_run(run, "config.yaml")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError("a run's configuration is damaged", where=file, fix="start the run again in another folder")
    return config


def _no_run(run: Path, name: str) -> UserError:
    """The error of a folder that holds no run, with the runs beside it that have the nearest names."""
    if run.is_file():
        return UserError(f"{run} is a file, no run: give the folder of a run (RUN=)")
    there = [str(run.parent / file.parent.name) for file in run.absolute().parent.glob("*/config.yaml")]
    return mistype("run", str(run), there, f"RUN=, a folder with {name}")


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
    if (run / FACTS).exists() and read_facts(run)["fingerprint"] != fingerprint:
        raise UserError(
            "the run's folder holds a run on another cache",
            got=f"{cache} with fingerprint {fingerprint[:16]}",
            expected=f"the cache with fingerprint {read_facts(run)['fingerprint'][:16]}",
            where=run,
            fix="choose another RUN=, or remove the folder to start again",
        )


def read_facts(run: Path) -> dict[str, Any]:
    """What `keep_facts` kept.

    Raises:
        UserError: when the folder holds no run that has begun.
    """
    file = run / FACTS
    if not file.exists():
        raise _no_run(run, FACTS)
    facts = json.loads(file.read_text(encoding="utf-8"))
    assert isinstance(facts, dict)
    return facts


def alone_summary(run: Path, summary: Summary) -> Summary | None:
    """The finished run of the same student without a teacher (TARGETS=none) next to this run, at equal steps."""
    for folder in sorted(run.parent.glob("*/summary.json")):
        other = read_summary(folder.parent)
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
        ("student", f"{summary['student']}, top-1 {_percent(summary['top1'])}, top-5 {_percent(summary['top5'])}"),
        ("targets", str(summary["targets"])),
        ("alone", f"top-1 {_percent(alone['top1'])} at equal steps" if alone else "not run (TARGETS=none)"),
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


def teacher_accuracy(teacher: Mapping[str, Any]) -> str:
    """A teacher's accuracy in words, from its entry in the manifest."""
    if not teacher["spec"]["has_classifier"]:
        return "features only (no classifier)"
    return f"top-1 {_percent(teacher['top1'])}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"
