"""The configuration of stage 2, from the options that the user set.

In: options keyed by dotted name. Out: a `DistillConfig`, from the cache's recipe or from the run to resume.
Invariant: the command and the Python function build their configurations here. Importing this module does not import
torch.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd_cache.caching.configure import Given, check_given_recipe, default_recipe
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build
from scalekd_cache.config.places import cache_places, default_cache
from scalekd_cache.config.recipes import has_changed, training_options
from scalekd_cache.config.stage1 import DataConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError, shell_command
from scalekd_cache.progress import print_rank0
from scalekd_cache.store.cache_folder import check_cache_path
from scalekd_cache.store.growing import read_cache_facts
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.training.run_files import OPTIONS, options_of_run


def distill_config(given: Given) -> DistillConfig:
    """Build the stage-2 configuration from defaults, the recipe and the given options, and check all student names.

    If no recipe is given, the cache's recipe is used. A command that resumes or extends a run takes the options that
    are not given from that run.

    Raises:
        UserError: the cache or a student does not exist, an option is invalid, or the given recipe has different views
            than the cache.
    """
    config = _built(given)
    _check_student_names(config)
    return config


def _built(given: Given) -> DistillConfig:
    stored = options_of_run(given)
    if not stored:
        _check_student(given)
    place = cache_place(given)
    waiting = build(DistillConfig, {name: given[name] for name in given if name.startswith("follow")})
    if not waiting.follow:
        _check_caches(given)
    if stored:
        return build(DistillConfig, {"train.workers": default_workers()}, stored, given)
    first, wait_s = open_place(cache_places(place)[0]), 60 * waiting.follow_timeout_minutes
    facts = read_cache_facts(first, waiting.follow, wait_s, print_rank0)
    recipe = given.get("recipe")
    if not recipe and has_changed(facts.recipe, facts.distill):
        print_rank0(
            f"recipe {facts.recipe} has changed since stage 1; this run uses the options stored in the cache "
            f"(to use the file instead, set --recipe {facts.recipe})"
        )
    check_given_recipe(given, facts, place)
    defaults = {"cache": place, "train.workers": default_workers()}
    training = training_options(recipe, facts.recipe, facts.distill)
    return build(DistillConfig, defaults, training, fitting_micro_batch(training, given), given)


def distill_config_before_cache(given: Given) -> DistillConfig:
    """Build a stage-2 configuration without reading the cache, to check everything that does not depend on it: option
    values, recipe, tracker and student names.

    Raises:
        UserError: one of them is invalid.
    """
    _check_student(given)
    recipe = given.get("recipe") or default_recipe(str(given.get("data") or DataConfig.source))
    training = training_options(recipe, recipe, {})
    config = build(DistillConfig, {"cache": cache_place(given)}, training, fitting_micro_batch(training, given), given)
    from scalekd_cache.training.trackers import check_tracker

    check_tracker(config.train.tracker)
    _check_student_names(config)
    return config


def _check_student_names(config: DistillConfig) -> None:
    """Raise `UserError` if a student does not exist. The message suggests similar names."""
    from scalekd_cache.models.student import check_student_name
    from scalekd_cache.training.series import single_runs

    for one in single_runs(config):
        check_student_name(one.student.name)


def _check_caches(given: Given) -> None:
    """Raise `UserError` if a cache does not exist. Invalid options are reported first."""
    try:
        for place in cache_places(cache_place(given)):
            check_cache_path(place, data=given.get("data"))
    except UserError:
        distill_config_before_cache(given)
        if not given.get("cache") and "cache" in options_of_run(given):
            raise UserError(
                f"the cache is not at the path stored in the run {given['run']}",
                got=place,
                fix="set its current path with --cache, or run the command in the folder where the run was started",
            ) from None
        raise


def _check_student(given: Given) -> None:
    if "student.name" in {**options_of_run(given), **given}:
        return
    if action := next((name for name in ("resume", "extend") if given.get(name)), None):
        if given.get("train.seeds"):
            single = shell_command("distill", run=f"{given.get('run') or 'runs/resnet50'}-seed0")
            raise UserError(
                f"a series takes no options from its runs: repeat --student and the other options with --{action}",
                fix=f"to {action} a single run: {single} --{action}",
            )
        raise UserError(f"set the run to {action}, for example --run runs/resnet50")
    run, fix = given.get("run"), None
    if run and os.path.lexists(Path(run) / OPTIONS):
        again = shell_command("distill", run=run)
        fix = f"to resume the run in {run}: {again} --resume; to train it longer: {again} --epochs N --extend"
    raise UserError("set the student, for example --student resnet50", fix=fix)


def cache_place(given: Given) -> str:
    """Path of the cache that stage 2 reads: the given one, that of the run to resume, or the dataset's default."""
    cache = given.get("cache") or options_of_run(given).get("cache")
    return str(cache or default_cache(given.get("data") or DataConfig.source))


def fitting_micro_batch(training: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """A micro-batch size that divides the given global batch size: the largest one up to the recipe's. Nothing if it
    would be less than half of the recipe's and of the batch."""
    micro = build(DistillConfig, training).train.micro_batch_size
    text = str(given.get("train.global_batch_size", ""))
    batch = int(text) if text.isdecimal() and len(text) < 10 else 0
    largest = next((size for size in range(min(micro, batch), 0, -1) if batch % size == 0), micro)
    return {} if largest == micro or 2 * largest < min(micro, batch) else {"train.micro_batch_size": largest}
