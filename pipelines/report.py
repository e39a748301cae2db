"""Write a report as one HTML file (`make report CACHE=dir`, `make report RUN=dir`, `make report RUNS="a b c"`)."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command import check_cache_place, parse, run
from scalekd_cache.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `report`: one of `cache`, `run` and `runs`, and what is looked at."""

    cache: str | None = None
    """Folder or URL of a finished cache."""
    run: str | None = None
    """Folder of a run, finished or still going."""
    runs: str | None = None
    """Folders of several runs, separated by spaces, to be compared."""
    out: str | None = None
    """File to write (None: beside the cache, in the run's folder, or beside the first of several runs)."""
    views: int = 1000
    """Cache: views that are read to find outliers."""
    asked: int = 64
    """Cache: of those, how many the teacher is shown again when it is at hand (0: none)."""
    images: int | None = None
    """Cache: images in the gallery (None: 8). Runs: validation images that are judged (None: 1000; 0: none)."""
    seed: int = 0
    """Chooses them."""
    data: str | None = None
    """Where the data set lies now (None: where it was)."""
    teacher_weights: str | None = None
    """File of the teacher's weights (None: where it was)."""
    pixels_from: str | None = None
    """Folder or URL of the cache whose pixels are shared (None: where it was)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        given = [name for name in ("cache", "run", "runs") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                "a report is of one thing",
                got=" and ".join(given) or "nothing",
                expected="one of cache, run and runs",
                fix='give CACHE=dir, RUN=dir or RUNS="dir dir"',
            )


def main(argv: list[str]) -> None:
    """Write the report and say where it is."""
    config = parse(ReportConfig, "report", argv, {}, __doc__ or "")
    from scalekd_cache.reports.page import write_page

    path, page = _of_cache(config) if config.cache else _of_runs(config)
    path = Path(config.out) if config.out else path
    size = write_page(path, page)
    print(f"{path}: {size / 1e6:.1f} MB, opens in any browser without a network")


def _of_cache(config: ReportConfig) -> tuple[Path, str]:
    """Where a cache's report goes by default, and its page."""
    from scalekd_cache.distributed import this_process
    from scalekd_cache.reports.cache import CacheReport, cache_report
    from scalekd_cache.store.reader import Cache

    assert config.cache is not None
    options = CacheReport(
        views=config.views,
        asked=config.asked,
        images=8 if config.images is None else config.images,
        seed=config.seed,
        data=config.data,
        teacher_weights=config.teacher_weights,
        pixels_from=config.pixels_from,
    )
    check_cache_place(config.cache)
    cache = Cache.open(config.cache)
    page = cache_report(cache, options, this_process(config.device))
    folder = cache.root.parent if isinstance(cache.root, Path) else Path()
    return folder / f"{cache.root.name}.report.html", page


def _of_runs(config: ReportConfig) -> tuple[Path, str]:
    """Where the report of a run, or of several, goes by default, and its page."""
    from scalekd_cache.distributed import this_process
    from scalekd_cache.reports.run_data import RunReport
    from scalekd_cache.reports.runs import run_report

    paths = [Path(config.run)] if config.run else [Path(word) for word in (config.runs or "").split()]
    options = RunReport(
        images=1000 if config.images is None else config.images,
        data=config.data,
        teacher_weights=config.teacher_weights,
    )
    page = run_report(paths, options, this_process(config.device))
    return paths[0] / "report.html" if config.run else paths[0].parent / "comparison.html", page


if __name__ == "__main__":
    run(main)
