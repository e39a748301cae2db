"""Writes the report at the end of training, in a second or two.

In: the folders of finished runs. Out: report.html in each folder and, for several runs, a comparison next to them.
Invariant: a report that fails never fails the run. A run's report that is newer than the run is kept, because
`scalekd report` may have written it, with predictions.
"""

from collections.abc import Sequence
from pathlib import Path

from scalekd_cache.distributed import Process
from scalekd_cache.training.run_files import MAX_RUNS, SUMMARY


def write_reports(runs: Sequence[Path], process: Process) -> None:
    """Write the missing and outdated reports on rank 0, and print the path of the one that covers all runs."""
    if process.rank != 0:
        return
    place = runs[0]
    try:
        from scalekd_cache.reports.page import write_page
        from scalekd_cache.reports.run_data import RunReport
        from scalekd_cache.reports.runs import run_report

        for run in runs:
            place = run / "report.html"
            if not place.exists() or place.stat().st_mtime < (run / SUMMARY).stat().st_mtime:
                write_page(place, run_report([run], RunReport(quick=True), process))
        if 1 < len(runs) <= MAX_RUNS:
            # `scalekd report` writes its comparisons to comparison.html.
            place = runs[0].parent / f"{runs[0].name}-and-{len(runs) - 1}-more.html"
            write_page(place, run_report(list(runs), RunReport(quick=True), process))
        process.print_rank0(f"report: {place} (without predictions on validation images)")
    except Exception as error:  # such as a missing package or a full disk
        reason = str(error).partition("\n")[0] or type(error).__name__
        process.print_rank0(f"could not write the report {place}: {reason}")
