"""Make the damaged parts of a cache again, and nothing else (`make repair CACHE=dir`)."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command import parse, run


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Options of `repair`; all others stand in the cache."""

    cache: str = "caches/demo"
    """Folder of the cache."""
    data: str | None = None
    """Where the data set lies now (None: where it was)."""
    teacher_weights: str | None = None
    """File of the teacher's weights (None: where it was)."""
    pixels_from: str | None = None
    """Where the cache lies whose pixels are shared (None: where it was)."""
    workers: int = 0
    """Worker processes that decode images and draw views (0: in the main process)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def main(argv: list[str]) -> int:
    """Say what was damaged, what was made again, and what is left; exit status 1 when something is left."""
    config = parse(RepairConfig, "repair", argv, {}, __doc__ or "")
    root = Path(config.cache)
    from pipelines.verify import check_folder, line_of

    check_folder(root)
    from scalekd_cache.audit.repair import repair_cache
    from scalekd_cache.distributed import this_process

    done = repair_cache(
        root,
        this_process(config.device),
        data=config.data,
        weights=config.teacher_weights,
        pixels_from=config.pixels_from,
        workers=config.workers,
    )
    if not done.found:
        print(f"{root}: whole, nothing to do")
        return 0
    print(f"{len(done.found)} problems were found:")
    for problem in done.found:
        print("  " + line_of(problem).replace("\n", "\n  "))
    names = ", ".join(f"g{group:03d}-r{range_id:05d}" for group, range_id in done.units)
    print(f"units made again: {names or 'none'}")
    for problem in done.left:
        print(f"left: {line_of(problem)}")
    print(f"{root}: {len(done.left)} problems left" if done.left else f"{root}: whole (every byte checked)")
    return 1 if done.left else 0


if __name__ == "__main__":
    run(main)
