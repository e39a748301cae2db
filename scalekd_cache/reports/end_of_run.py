"""Writes the report at the end of training, in a second or two.

In: the folders of finished runs. Out: report.html in each folder and, for several runs, comparison.html next to them.
Invariant: a report that fails never fails the run, and a report that is newer than its runs is kept, because
`scalekd report` may have written it, with predictions.
"""

from collections.abc import Sequence
from pathlib import Path

from scalekd_cache.distributed import Process
from scalekd_cache.training.run_files import SUMMARY


def write_reports(runs: Sequence[Path], process: Process) -> None:
    """Write the missing and outdated reports on rank 0, and print the path of the one that covers all runs."""
    if process.rank != 0:
        return
    places = {run / "report.html": [run] for run in runs}
    if len(runs) > 1:
        places[runs[0].parent / "comparison.html"] = list(runs)
    try:
        from scalekd_cache.reports.page import write_page
        from scalekd_cache.reports.run_data import RunReport
        from scalekd_cache.reports.runs import run_report

        for place, shown in places.items():
            if not _is_new(place, shown):
                write_page(place, run_report(shown, RunReport(quick=True), process))
        process.print_rank0(f"report: {[*places][-1]} (`scalekd report` adds predictions on validation images)")
    except Exception as error:  # such as a missing package, a full disk or more runs than fit on a page
        reason = str(error).partition("\n")[0] or type(error).__name__
        process.print_rank0(f"report: {[*places][-1]} was not written: {reason}; `scalekd report` writes it")


def _is_new(place: Path, runs: Sequence[Path]) -> bool:
    """Whether a report was written after all of these runs had finished."""
    return place.exists() and all(place.stat().st_mtime >= (run / SUMMARY).stat().st_mtime for run in runs)
