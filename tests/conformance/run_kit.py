"""Runs a reader of the cache format on the conformance kit (README.md). Needs Python's standard library only.

    python tests/conformance/run_kit.py READER [ARGUMENT ...]

Every case is one run of `READER ... CACHE`. Exit code 1: a case failed.
"""

import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

CASES = Path(__file__).resolve().parent / "cases"
ACCEPTED, REJECTED, UNSUPPORTED = 0, 1, 3
"""Exit codes of a reader."""

TOLERANCE = 1e-5
"""Of values that are not exact, relative to the largest magnitude of the record."""

LIMIT_S = 60


def case_names() -> list[str]:
    return sorted(file.parent.name for file in CASES.glob("*/expected.json"))


def expected_of(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((CASES / name / "expected.json").read_bytes())
    return facts


def place_case(name: str, folder: Path) -> Path:
    """The cache of a case: for a damaged one a copy of its base with the changes, in `folder`."""
    facts = expected_of(name)
    if facts["accept"]:
        return CASES / name / "cache"
    pixels_of = expected_of(facts["base"]).get("pixels_of")
    if pixels_of:
        shutil.copytree(CASES / pixels_of, folder / pixels_of)
    cache = folder / name / "cache"
    shutil.copytree(CASES / facts["base"] / "cache", cache)
    if (CASES / name / "changed").is_dir():
        shutil.copytree(CASES / name / "changed", cache, dirs_exist_ok=True)
    for file in facts["removed"]:
        (cache / file).unlink()
    return cache


def check_case(name: str, reader: Sequence[str]) -> str:
    """Run the reader on a case: "passed", "skipped: ..." or "FAILED: ..."."""
    with tempfile.TemporaryDirectory() as temp:
        command = [*reader, str(place_case(name, Path(temp)))]
        run = subprocess.run(command, capture_output=True, timeout=LIMIT_S)
    message = run.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    facts = expected_of(name)
    if run.returncode == UNSUPPORTED:
        return f"skipped: {message}"
    if not facts["accept"]:
        return (
            "passed" if run.returncode == REJECTED else f"FAILED: exit code {run.returncode}, not {REJECTED} {message}"
        )
    if run.returncode != ACCEPTED:
        return f"FAILED: exit code {run.returncode} {message}"
    try:
        difference = compare(facts, [json.loads(line) for line in run.stdout.decode().splitlines()])
    except (ValueError, KeyError, TypeError) as error:
        difference = f"unreadable output, {error!r}"
    return f"FAILED: {difference}" if difference else "passed"


def compare(facts: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """The first difference between expected.json and the lines that a reader printed; empty if there is none."""
    head, *records = lines
    for field in ("num_samples", "num_views", "class_names", "fingerprint"):
        if head[field] != facts[field]:
            return f"{field}: {head[field]!r}, expected {facts[field]!r}"
    wanted = [record for view in facts["records"] for record in view]
    if len(records) != len(wanted):
        return f"{len(records)} records, expected {len(wanted)}"
    for number, (record, other) in enumerate(zip(records, wanted)):
        for field, value in other.items():
            same = same_values if isinstance(value, dict) and field != "view" else lambda one, two, _: one == two
            if not same(record[field], value, field in facts["exact"]):
                return f"record {number} (key {other['key']!r}): {field} {str(record[field])[:80]}, expected {value}"
    return ""


def same_values(found: str | None, value: dict[str, str], exact: bool) -> bool:
    """Whether the hex float32 values that a reader printed are the expected ones."""
    if found is None:
        return False
    data = bytes.fromhex(found)
    if exact:
        return sha256(data).hexdigest() == value["sha256"]
    ours, theirs = (struct.unpack(f"<{len(one) // 4}f", one) for one in (data, bytes.fromhex(value["first"])))
    limit = TOLERANCE * max(map(abs, theirs))
    return len(ours) == len(theirs) and all(
        math.isclose(one, other, rel_tol=0, abs_tol=limit) for one, other in zip(ours, theirs)
    )


def main() -> None:
    """Print one line per case."""
    results = {name: check_case(name, sys.argv[1:]) for name in case_names()}
    for name, result in results.items():
        print(f"{name}: {result}")
    failed = sum(result.startswith("FAILED") for result in results.values())
    print(f"{len(results)} cases, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main()
