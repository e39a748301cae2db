"""Verify a cache: either sizes and fingerprints, or every byte and record."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.command import Command, Given, run, typed_command
from scalekd_cache.audit import RERUN_VIEWS
from scalekd_cache.config.options import build, options_class
from scalekd_cache.errors import UserError, counted
from scalekd_cache.store.manifest import NAME as MANIFEST

if TYPE_CHECKING:
    from scalekd_cache.audit.rerun_teacher import TeacherAgreement
    from scalekd_cache.store.path import StoredPath
    from scalekd_cache.store.verify import CheckResult
    from scalekd_cache.store.verify_unit import Problem


@options_class()
class VerifyConfig:
    """Options of `verify`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache."""
    deep: bool = False
    """Also hash every file, decode every record, and re-run the teacher on a random sample."""
    json: bool = False
    """Print one JSON object instead of text."""
    records: int = RERUN_VIEWS
    """With `deep`: number of random views on which to re-run the teacher, if its weights are available (0: none)."""
    seed: int = 0
    """Seed for the random sample."""
    data: str | None = None
    """Path of the dataset (default: the path recorded in the cache); needed only for replayed views."""
    teacher_weights: str | None = None
    """The teacher's weights file (default: the path recorded in the cache)."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (default: the path recorded in this cache)."""
    device: str = "auto"
    """Device for the teacher: auto, cpu, cuda or cuda:N."""


def main(given: Given) -> int:
    """Print every problem with its location. Returns exit code 1 if there are problems, otherwise 0."""
    config = build(VerifyConfig, given)
    from scalekd_cache.store.cache_folder import check_cache_path
    from scalekd_cache.store.remote.remote_path import open_place

    root = open_place(config.cache)
    if isinstance(root, Path):
        check_cache_path(str(root))  # a mistyped path is not a damaged cache
    findings, agreement = _check(config)
    facts = _as_json(config, _fidelity(root), findings, agreement) | {"next": _next(config, root, findings)}
    if config.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts, findings, agreement)
    return 1 if findings.problems else 0


def _check(config: VerifyConfig) -> "tuple[CheckResult, TeacherAgreement | None]":
    """Run the check. Torch is imported only for a deep check."""
    if not config.deep:
        from scalekd_cache.store.verify import check_cache

        return check_cache(config.cache), None
    from scalekd_cache.audit.verify_cache import verify_deep
    from scalekd_cache.distributed import this_process
    from scalekd_cache.progress import progress

    bar = progress("verify", 0, "unit", rank=int(os.environ.get("RANK", "0")))

    def show(done: int, units: int) -> None:
        bar.total = units
        bar.update(done - bar.n)

    report = verify_deep(
        config.cache,
        data=config.data,
        weights=config.teacher_weights,
        pixels_from=config.pixels_from,
        records=config.records,
        seed=config.seed,
        device=this_process(config.device).device,
        progress=show,
    )
    bar.close()
    return report.findings, report.agreement


def line_of(problem: "Problem") -> str:
    """Describe a problem in one line: location, problem, sample."""
    named = f" (sample {problem.key})" if problem.key and problem.key not in problem.what else ""
    return f"{problem.where}: {problem.what}{named}"


def _next(config: VerifyConfig, root: "StoredPath", findings: "CheckResult") -> list[str]:
    """Commands that fix the problems found. If no command can fix a problem, its message says what to do."""
    from scalekd_cache.store.manifest import read_manifest
    from scalekd_cache.store.shared_pixels import shared_pixels_path
    from scalekd_cache.store.verify_unit import Part

    problems = findings.problems
    options = {name: getattr(config, name) for name in ("cache", "data", "teacher_weights", "pixels_from")}
    given = {"records": config.records, "seed": config.seed}
    sample = [f"{name}={value}" for name, value in given.items() if value != getattr(VerifyConfig, name)]
    remote = "://" in str(config.pixels_from)
    if remote:  # a repair needs local files
        del options["pixels_from"]
    if findings.expected is None or not isinstance(root, Path):
        return []
    commands = []
    if not remote and any(problem.part is Part.PIXELS and problem.where != MANIFEST for problem in problems):
        pixels = options.get("pixels_from") or shared_pixels_path(root, read_manifest(root).facts)
        commands.append(typed_command("repair", {"cache": str(pixels)}))  # first: the other repair reads them
    if any(problem.part not in (Part.PIXELS, Part.UNKNOWN_FILE) for problem in problems):
        commands.append(typed_command("repair", options, sample))
    return commands


def _fidelity(root: "StoredPath") -> dict[str, Any]:
    from scalekd_cache.store.manifest import read_manifest

    try:
        return read_manifest(root).fidelity
    except UserError:
        return {}


def _print(facts: dict[str, Any], findings: "CheckResult", agreement: "TeacherAgreement | None") -> None:
    for problem in findings.problems:
        print(line_of(problem))
    for note in findings.notes:
        print(f"note: {note}")
    figures = "; ".join(
        f"{name.replace('_', ' ')} {row['mean']:.5f}, 1st percentile {row['p1']:.5f}"
        for name, row in facts["fidelity"].items()
    )
    if figures:
        print(f"fidelity of the stored features, measured in stage 1: {figures}")
    if agreement is not None and agreement.records:
        again = ", ".join(f"{name.replace('_', ' ')} {row['mean']:.5f}" for name, row in agreement.figures.items())
        from scalekd_cache.models.evaluate import percent

        same = agreement.top1_percent
        top1 = "" if same is None else f", same top-1 class for {percent(same)} of the views"
        print(f"teacher re-run on {counted(agreement.records, 'view')}: {again}{top1}")
    depth = "every byte" if facts["deep"] else "sizes and fingerprints"
    state = counted(len(findings.problems), "problem") if findings.problems else "no problems"
    print(f"{facts['cache']}: {state} ({depth} checked, {counted(findings.units, 'unit')})")
    for command in facts["next"]:
        print(f"next: {command}")


def _as_json(
    config: VerifyConfig, fidelity: dict[str, Any], findings: "CheckResult", agreement: "TeacherAgreement | None"
) -> dict[str, Any]:
    return {
        "cache": config.cache,
        "deep": config.deep,
        "whole": not findings.problems,
        "units": findings.units,
        "problems": [{**problem._asdict(), "part": problem.part.value} for problem in findings.problems],
        "notes": findings.notes,
        "fidelity": fidelity,
        "teacher": None
        if agreement is None
        else {"records": agreement.records, "top1_percent": agreement.top1_percent, **agreement.figures},
    }


COMMAND = Command("verify", main, [VerifyConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
