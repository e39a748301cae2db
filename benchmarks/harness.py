"""Code shared by the benchmarks: interleaved timing, subprocesses, results files, the tables of docs/BENCHMARKS.md.

In: functions to time. Out: benchmarks/results/<name>.json, and its table in docs/BENCHMARKS.md or another page, between
`<!-- <name> -->` and `<!-- end -->`. Invariant: a ratio compares two actions that were timed alternately, so that load
on the machine affects both; the results of the previous run are kept next to the new ones.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scalekd_cache.errors import counted

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "docs" / name for name in ("BENCHMARKS.md", "PEERS.md")]
"""Pages with markers for tables."""
PACKAGES = ("torch", "timm", "deepspeed", "webdataset", "zarr", "numcodecs", "numpy", "pillow")


class Measurement(NamedTuple):
    """One row of a table."""

    what: str
    value: float
    spread: tuple[float, float] | None
    """Minimum and maximum over the repeats."""
    unit: str
    """`x` for a ratio."""
    rates: str
    """The absolute rates, as text; they depend on the machine."""
    goal: str
    """The target value, as text."""
    gap: str
    """What limits the result; may be empty."""


def argument_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` starts with the docstring of the script."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def option_words(options: Mapping[str, object]) -> list[str]:
    """{"train.epochs": 2} -> ["--train.epochs", "2"]."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def run_python(*arguments: str) -> str:
    """Run `python *arguments` from the root of the repository; returns its standard output.

    Raises:
        RuntimeError: it failed; the message is the end of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def peak_memory_bytes() -> int:
    """Peak resident memory of this process; getrusage would include the peak of its parent process."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


Clock = Callable[[], float]


def timed(action: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    action()
    return clock() - start


def time_interleaved(
    repeats: int, *, clock: Clock = time.perf_counter, **actions: Callable[[], object]
) -> dict[str, list[float]]:
    """Seconds of each action; every repeat runs all actions once, in order.

    `time.process_time` as the clock: CPU seconds of all threads of this process, on a machine that runs other work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(timed(action, clock))
    return seconds


def ratio(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    ours: str,
    baseline: str,
    *,
    amount: float,
    unit: str,
    goal: str,
    gap: str = "",
) -> Measurement:
    """Our rate divided by the baseline's rate, as the median over the repeats."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[baseline], strict=True)]
    mine, other = (amount / statistics.median(seconds[name]) for name in (ours, baseline))
    rates = f"{mine:,.4g} {unit} vs {other:,.4g}"
    return Measurement(what, statistics.median(ratios), (min(ratios), max(ratios)), "x", rates, goal, gap)


def commit() -> str:
    """The short hash of the checkout's commit; empty outside a checkout."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> dict[str, Any]:
    """The hardware, software versions, commit and command of this run."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(name: str, content: Mapping[str, Any], *, allow_nan: bool = False) -> Path:
    """Write `content` and the machine it was measured on to benchmarks/results/<name>.json; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(), **content}, indent=1, allow_nan=allow_nan)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def publish_table(name: str, figures: Sequence[Measurement], raw: Mapping[str, Any], *, note: str = "") -> None:
    """Write the results file, put the table into the page of the documentation that has its marker, and print it.

    Args:
        name: name of the results file and of the marker.
        figures: rows of the table.
        raw: options and raw timings.
        note: text below the table.
    """
    file, facts = RESULTS / f"{name}.json", machine()
    before = json.loads(file.read_text()) if file.exists() else {}
    previous = {row["what"]: row["value"] for row in before.get("figures", [])}
    table = _table(figures, facts, previous, before.get("machine", {}), note)
    content = {
        "raw": raw,
        "figures": [figure._asdict() for figure in figures],
        "previous": {"machine": before.get("machine"), "figures": previous},
    }
    write_results(name, content)
    _put_table(name, table)
    print(table, f"\n{file}")


def _table(
    figures: Sequence[Measurement],
    facts: Mapping[str, Any],
    previous: Mapping[str, float],
    before: Mapping[str, Any],
    note: str,
) -> str:
    where = facts["accelerator"] or counted(facts["cores"], f"{facts['cpu']} core")
    lines = [
        f"`{facts['command']}`, commit {facts['commit']}, {facts['date']}: {where}, "
        f"{counted(facts['threads'], 'thread')}, load {facts['load'][0]:.1f} at the end."
    ]
    if previous:
        lines[0] += f" Previous: commit {before.get('commit')}, load {before.get('load', ['?'])[0]}."
    lines += [
        "",
        "| what | result (min to max) | previous | rates | goal | remaining cost |",
        "|---|---|---|---|---|---|",
    ]
    for row in figures:
        spread = f" ({row.spread[0]:.3g} to {row.spread[1]:.3g})" if row.spread else ""
        old = f"{previous[row.what]:.3g}" if row.what in previous else ""
        value = f"{row.value:.3g}{'' if row.unit.startswith('%') else ' '}{row.unit}{spread}"
        lines.append(f"| {row.what} | {value} | {old} | {row.rates} | {row.goal} | {row.gap} |")
    return "\n".join([*lines, *(["", note] if note else [])])


def _put_table(name: str, table: str) -> None:
    start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    page = next((page for page in PAGES if start in page.read_text()), None)
    assert page is not None, f"no page has a marker for {name}; add {start!r} and {end!r} to one of {PAGES}"
    head, _, rest = page.read_text().partition(start)
    old, found, tail = rest.partition(end)
    assert found, f"the marker for {name} in {page} has no end marker"
    assert "<!--" not in old, f"the end marker for {name} in {page} must be on a line of its own"
    page.write_text(head + start + table + end + tail)
