"""Rebuild only the damaged parts of a cache."""

from pathlib import Path

from pipelines.command import WORKERS, Command, Given, run
from scalekd_cache.audit import RERUN_VIEWS
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build, options_class
from scalekd_cache.errors import counted


@options_class()
class RepairConfig:
    """Options of `repair`; all other settings are read from the cache."""

    cache: str = "caches/demo"
    """The cache folder."""
    data: str | None = None
    """Path of the dataset (default: the path recorded in the cache)."""
    teacher_weights: str | None = None
    """The teacher's weights file (default: the path recorded in the cache)."""
    pixels_from: str | None = None
    """Folder of the cache that stores the shared pixels (default: the path recorded in this cache)."""
    records: int = RERUN_VIEWS
    """Number of random views on which to re-run the teacher in the check, as for `verify --deep` (0: none)."""
    seed: int = 0
    """Seed for the random sample."""
    workers: int = 0
    """Number of worker processes that decode images and sample views (0: use the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(given: Given) -> int:
    """Print what was damaged, what was rebuilt and what could not be repaired. Returns exit code 1 if problems
    remain."""
    config = build(RepairConfig, {"workers": default_workers()}, given)
    root = Path(config.cache)
    from pipelines.verify import line_of
    from scalekd_cache.store.cache_folder import check_cache_path

    check_cache_path(str(root))
    from scalekd_cache.audit.repair import repair_cache
    from scalekd_cache.distributed import this_process

    done = repair_cache(
        root,
        this_process(config.device),
        data=config.data,
        weights=config.teacher_weights,
        pixels_from=config.pixels_from,
        records=config.records,
        seed=config.seed,
        workers=config.workers,
    )
    if not done.found:
        print(f"{root}: no problems, nothing to do")
        return 0
    print(f"{counted(len(done.found), 'problem')} found:")
    for problem in done.found:
        print("  " + line_of(problem).replace("\n", "\n  "))
    names = ", ".join(f"g{group:03d}-r{range_id:05d}" for group, range_id in done.units)
    print(f"units rebuilt: {names or 'none'}")
    for problem in done.left:
        print(f"not repaired: {line_of(problem)}")
    print(
        f"{root}: {counted(len(done.left), 'problem')} left"
        if done.left
        else f"{root}: no problems (every byte checked)"
    )
    return 1 if done.left else 0


COMMAND = Command("repair", main, [RepairConfig], __doc__, defaults={"workers": WORKERS})

if __name__ == "__main__":
    run(COMMAND)
