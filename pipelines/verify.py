"""Check a cache: sizes and fingerprints, and with --deep every byte (`make verify CACHE=dir [DEEP=1]`)."""

from dataclasses import dataclass

from pipelines.command import parse, run


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Options of `verify`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache."""
    deep: bool = False
    """Also hash every file and check every record's checksum."""


def main(argv: list[str]) -> int:
    """Print every problem with its place; exit status 1 when there is one."""
    config = parse(VerifyConfig, "verify", argv, {}, __doc__ or "")
    from scalekd_cache.store.verify import verify_cache

    problems = verify_cache(config.cache, deep=config.deep)
    for problem in problems:
        print(f"{problem.where}: {problem.what}" + (f" (sample {problem.key})" if problem.key else ""))
    depth = "every byte" if config.deep else "sizes and fingerprints"
    print(
        f"{config.cache}: {len(problems)} problems ({depth} checked)"
        if problems
        else f"{config.cache}: whole ({depth} checked)"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
