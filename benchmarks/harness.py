"""What the benchmarks share: timing in turn, ratios inside one run, results that keep the figures before them.

In: functions to time. Out: benchmarks/results/<name>.json, and its table in docs/BENCHMARKS.md between
`<!-- <name> -->` and `<!-- end -->`. Invariant: a ratio compares two things done in turn, so that a busy moment hits
both; the figures of the run before stay beside the new ones.
"""

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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "BENCHMARKS.md"
PACKAGES = ("torch", "timm", "deepspeed", "webdataset", "zarr", "numcodecs", "numpy", "pillow")


class Figure(NamedTuple):
    """One measured line of a table."""

    what: str
    value: float
    spread: tuple[float, float] | None
    """Smallest and largest of the repeats."""
    unit: str
    """`x` for a ratio."""
    rates: str
    """The absolute figures behind it, in words; they depend on the machine."""
    goal: str
    """What it is compared with."""
    gap: str
    """Why it is not better; empty where nothing is left."""


def peak_memory_bytes() -> int:
    """The most memory this process has had resident; getrusage would hand down the peak of the one that started it."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def timed(action: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(repeats: int, **actions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each action, one after another in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            seconds[name].append(timed(action))
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
) -> Figure:
    """Our rate over the baseline's: the median over the repeats."""
    ratios = [b / a for a, b in zip(seconds[ours], seconds[baseline], strict=True)]
    mine, other = (amount / statistics.median(seconds[name]) for name in (ours, baseline))
    return Figure(what, statistics.median(ratios), (min(ratios), max(ratios)), "x",
                  f"{mine:,.4g} {unit} beside {other:,.4g}", goal, gap)  # fmt: skip


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": commit.stdout.strip(),
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


def publish(name: str, figures: Sequence[Figure], raw: Mapping[str, Any], *, note: str = "") -> None:
    """Write the results and their table, and print the table.

    Args:
        name: of the file and of the place in docs/BENCHMARKS.md.
        figures: the table's rows.
        raw: options, seconds: what the figures were made of.
        note: a sentence under the table.
    """
    RESULTS.mkdir(exist_ok=True)
    file, facts = RESULTS / f"{name}.json", machine()
    before = json.loads(file.read_text()) if file.exists() else {}
    previous = {row["what"]: row["value"] for row in before.get("figures", [])}
    table = _table(figures, facts, previous, before.get("machine", {}), note)
    content = {
        "machine": facts,
        "raw": raw,
        "figures": [figure._asdict() for figure in figures],
        "previous": {"machine": before.get("machine"), "figures": previous},
    }
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    _put_table(name, table)
    print(table, f"\n{file}")


def _table(figures: Sequence[Figure], facts: Mapping[str, Any], previous: Mapping[str, float],
           before: Mapping[str, Any], note: str) -> str:  # fmt: skip
    where = facts["accelerator"] or f"{facts['cores']} cores of {facts['cpu']}"
    lines = [
        f"`{facts['command']}`, commit {facts['commit']}, {facts['date']}: {where}, {facts['threads']} threads, "
        f"load {facts['load'][0]:.1f} at the end."
    ]
    if previous:
        lines[0] += f" Before: commit {before.get('commit')}, load {before.get('load', ['?'])[0]}."
    lines += ["", "| what | figure (min to max) | before | rates | goal | what is left |", "|---|---|---|---|---|---|"]
    for row in figures:
        spread = f" ({row.spread[0]:.3g} to {row.spread[1]:.3g})" if row.spread else ""
        old = f"{previous[row.what]:.3g}" if row.what in previous else ""
        lines.append(
            f"| {row.what} | {row.value:.3g} {row.unit}{spread} | {old} | {row.rates} | {row.goal} | {row.gap} |"
        )
    return "\n".join([*lines, *(["", note] if note else [])])


def _put_table(name: str, table: str) -> None:
    text = PAGE.read_text()
    start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
    head, found, rest = text.partition(start)
    assert found, f"{PAGE} has no place for {name}: add {start!r} and {end!r}"
    old, found, tail = rest.partition(end)
    assert found, f"the place for {name} in {PAGE} has no end"
    assert "<!--" not in old, f"the place for {name} in {PAGE} has no line of its own before its end"
    PAGE.write_text(head + start + table + end + tail)
