"""Write a report on a cache or on runs as a single HTML file."""

import shlex
from pathlib import Path

from pipelines.command import Command, Given, run
from scalekd_cache.config.options import build, options_class
from scalekd_cache.config.places import expand_home
from scalekd_cache.errors import UserError


@options_class()
class ReportConfig:
    """Options of `report`: one of `cache`, `run` and `runs`, plus the sample sizes."""

    cache: str | None = None
    """Folder or URL of a finished cache."""
    run: str | None = None
    """Folder of a finished or ongoing run."""
    runs: str | None = None
    """Folders of runs to compare, separated by commas or, in quotes, by spaces: `runs/a,runs/b`. Quote folders whose
    names contain spaces or commas."""
    out: str | None = None
    """Output file (default: next to the cache, inside the run folder, or next to the first run)."""
    views: int = 1000
    """For a cache: number of views to sample when looking for outliers."""
    asked: int = 64
    """For a cache: number of sampled views on which to re-run the teacher, if its weights are available (0: none)."""
    images: int | None = None
    """For a cache: number of images in the gallery (default: 8). For runs: number of validation images to evaluate
    (default: 1000; 0: none)."""
    seed: int = 0
    """Seed for the random samples."""
    data: str | None = None
    """Path of the dataset (default: the path recorded in the cache)."""
    teacher_weights: str | None = None
    """The teacher's weights file (default: the path recorded in the cache)."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (default: the path recorded in this cache)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        given = [name for name in ("cache", "run", "runs") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                "set exactly one of cache, run and runs",
                got=" and ".join(given) or "nothing",
                fix='set --cache dir, --run dir or --runs "dir dir"',
            )


def main(given: Given) -> None:
    """Write the report and print its path."""
    config = build(ReportConfig, given)
    from scalekd_cache.reports.page import check_page_place, write_page

    if config.out:
        check_page_place(Path(config.out))
    path, page = _of_cache(config) if config.cache else _of_runs(config)
    path = Path(config.out) if config.out else path
    size = write_page(path, page)
    print(f"{path}: {size / 1e6:.1f} MB; open it in any browser (works offline)")


def _of_cache(config: ReportConfig) -> tuple[Path, str]:
    """The default output path for a cache report, and the page."""
    from scalekd_cache.distributed import this_process
    from scalekd_cache.reports.cache import CacheReport, cache_report
    from scalekd_cache.store.path import absolute
    from scalekd_cache.store.reader import Cache

    assert config.cache is not None
    options = CacheReport(
        views=config.views,
        teacher_views=config.asked,
        images=8 if config.images is None else config.images,
        seed=config.seed,
        data=config.data,
        teacher_weights=config.teacher_weights,
        pixels_from=config.pixels_from,
    )
    cache = Cache.open(config.cache)
    page = cache_report(cache, options, this_process(config.device))
    root = absolute(cache.root)
    return (root.parent if isinstance(root, Path) else Path()) / f"{root.name}.report.html", page


def _of_runs(config: ReportConfig) -> tuple[Path, str]:
    """The default output path for a report on one or more runs, and the page."""
    from scalekd_cache.distributed import this_process
    from scalekd_cache.reports.run_data import RunReport
    from scalekd_cache.reports.runs import run_report

    paths = [Path(config.run)] if config.run else run_folders(config.runs or "")
    options = RunReport(
        images=1000 if config.images is None else config.images,
        data=config.data,
        teacher_weights=config.teacher_weights,
    )
    page = run_report(paths, options, this_process(config.device))
    return paths[0] / "report.html" if config.run else paths[0].parent / "comparison.html", page


def run_folders(text: str) -> list[Path]:
    """The folders in `runs`, split as a shell would split them, and at commas. A folder that exists is not split at
    the commas in its name.

    Raises:
        UserError: a quotation mark is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        fix = "quote folders whose names contain spaces or quotation marks: --runs \"'my runs/a' 'my runs/b'\""
        raise UserError("cannot split --runs into folders", got=f"{text}: {error}", fix=fix) from error
    parts = [part for word in words for part in ([word] if Path(expand_home(word)).exists() else word.split(","))]
    return [Path(expand_home(part)) for part in parts if part]


COMMAND = Command("report", main, [ReportConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
