"""Stage 2: train a student from a cache (`make distill STUDENT=resnet50`); --dry-run runs the checks only."""

import os

from pipelines.command import check_cache_path, check_recipe_given, parse, run, value_of, without_flag
from scalekd_cache.config.recipes import has_changed, training_options
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.store.growing import read_cache_facts
from scalekd_cache.store.manifest import ManifestFacts
from scalekd_cache.store.path import StoredPath
from scalekd_cache.store.remote.remote_path import open_place


def main(argv: list[str]) -> None:
    """Parse the options of stage 2, compare RECIPE= with the cache, then train or print the dry run."""
    argv, dry = without_flag(argv, "--dry-run")
    cache = open_place(value_of(argv, "--cache") or DistillConfig().cache)
    facts = None if "--help" in argv or "-h" in argv else _facts(cache, argv)
    given = value_of(argv, "--recipe")
    section = (
        training_options(given, facts.recipe, facts.distill) if facts else training_options(given or "demo", "demo", {})
    )
    config = parse(DistillConfig, "distill", argv, section, __doc__ or "")
    assert facts is not None
    if not given and has_changed(facts.recipe, facts.distill):
        _print_rank0(
            f"recipe {facts.recipe} has changed since stage 1; this run uses the options stored in the cache "
            f"(RECIPE={facts.recipe} uses the file)"
        )
    check_recipe_given(argv, facts.view_recipe, cache)
    from scalekd_cache.distributed import this_process
    from scalekd_cache.training.dry_run import plan_distill
    from scalekd_cache.training.series import distill_series, series_table, single_runs, summarize_series

    process, runs = this_process(config.device), single_runs(config)
    if dry:
        for one in runs:
            process.print_rank0("\n".join(plan_distill(one, process)))
        return
    summaries = distill_series(runs, process)
    if len(runs) > 1:
        process.print_rank0(series_table(summarize_series(summaries)))


def _facts(cache: StoredPath, argv: list[str]) -> ManifestFacts:
    """The facts of the cache. With --follow, wait for a cache that no writer has started yet."""
    follow = value_of(argv, "--follow") in ("true", "True", "yes", "1")
    if not follow:
        check_cache_path(value_of(argv, "--cache") or DistillConfig().cache)
    minutes = value_of(argv, "--follow_timeout_minutes") or str(DistillConfig().follow_timeout_minutes)
    timeout_s = (
        60 * float(minutes) if minutes.replace(".", "", 1).isdigit() else 0.0
    )  # the parser reports an invalid value
    return read_cache_facts(cache, follow, timeout_s, _print_rank0)


def _print_rank0(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    run(main)
