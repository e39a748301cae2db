"""Python functions for the commands, with the same names, defaults, checks and errors.

In: plain names (`epochs=2`) and dotted options (`{"optim.lr": 0.1}`). Out: a `CacheInfo` or a `RunSummary`.
Invariant: commands and functions build their configurations with the same code, so they behave identically.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scalekd_cache.caching.cache_info import CacheInfo, cache_info, caches_info
from scalekd_cache.caching.configure import Given, cache_teacher_config, checked_student
from scalekd_cache.config.base import require
from scalekd_cache.config.downstream import FinetuneConfig, ProbeConfig
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import DryRun, build, options_of, plain_values, take
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.config.stage2 import DistillConfig
from scalekd_cache.errors import UserError, unknown_name, worker_failures
from scalekd_cache.training.configure import distill_config
from scalekd_cache.training.run_files import RunSummary

if TYPE_CHECKING:
    from scalekd_cache.distributed import Process

Downstream = TypeVar("Downstream", ProbeConfig, FinetuneConfig, PullConfig)
CLASSES: dict[str, type] = {
    "cache-teacher": CacheTeacherConfig,
    "distill": DistillConfig,
    "probe": ProbeConfig,
    "finetune": FinetuneConfig,
    "publish": PublishConfig,
    "pull": PullConfig,
}
"""The options of each command."""
COMMAND_LINE_ONLY = ("plugin", "debug", "help")
"""Options of all commands that are in no configuration."""


@worker_failures()
def cache_teacher(
    *,
    data: str | os.PathLike[str] | None = None,
    teacher: str | None = None,
    teachers: str | None = None,
    teacher_weights: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    views: int | None = None,
    size: int | None = None,
    codec: str | None = None,
    student: str | None = None,
    recipe: str | None = None,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> CacheInfo | Any:
    """Stage 1: run the teacher once over augmented views and store the targets for students.

    Calling it again creates only what is missing. Under torchrun, every rank must call it.

    Args:
        data: demo, cifar10, imagenette, or a folder, tars or parquet files (None: demo).
        teacher: a timm model name (None: the recipe's).
        teachers: comma-separated timm model names. A single pass over the images makes one cache per teacher.
        teacher_weights: a .safetensors file (None: timm's pretrained weights); with `teachers`, a comma-separated
            list in the same order.
        cache: the cache folder (None: `caches/<data>`); with `teachers`, the parent folder of all caches.
        views: views per image (None: the recipe's).
        size: side length of a view in pixels (None: the recipe's).
        codec: feature codec (None: int8).
        student: a student to check before stage 1 starts.
        recipe: name or YAML file of a recipe (None: demo, or traditional for other data).
        dry_run: run all checks and print what would be done, without writing anything.
        options: any other option, by dotted name, such as `{"views.seed": 1}`.
        more: any other option of the command, by plain name, such as `store="zarr"`, except the options that start
            several processes and `json`.

    Returns:
        Information about the cache. With multiple teachers, this is the first cache, and `others` lists the rest.
        None after a dry run.

    Raises:
        UserError: anything that the command would report as an error.
    """
    given = _given("cache-teacher", options, more, data=data, teacher=teacher, teachers=teachers,
                   teacher_weights=teacher_weights, cache=cache, views=views, size=size, codec=codec, student=student,
                   recipe=recipe, dry_run=dry_run or None)  # fmt: skip
    is_dry = take(given, DryRun).dry_run
    config = cache_teacher_config(CacheTeacherConfig, given)
    checked = checked_student(config)
    from scalekd_cache.caching import job
    from scalekd_cache.distributed import this_process

    process = this_process(config.device)
    if is_dry:
        job.dry_run(config, process, checked)
        return None
    return caches_info(config, job.cache_teachers(config, process, checked))


@worker_failures()
def distill(
    *,
    student: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    epochs: int | None = None,
    targets: str | None = None,
    heads: str | None = None,
    data: str | os.PathLike[str] | None = None,
    recipe: str | None = None,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
    **more: Any,
) -> RunSummary | Any:
    """Stage 2: train a student from a cache, then evaluate and export it.

    Calling it again resumes the run, or returns the summary if the run is finished. Under torchrun, every rank must
    call it.

    Args:
        student: a timm model name, or several separated by commas (only optional with `resume` or `extend`).
        cache: folder or URL of the cache (None: `caches/<data>`, or caches/demo). To learn from multiple teachers,
            give a comma-separated list of caches with the same views.
        run: the run folder (None: `runs/<student>`, followed by `-<targets>` unless the targets are cached).
        epochs: passes over the data (None: the recipe's).
        targets: cached, live (the teacher runs in the training loop) or none (the baseline without distillation).
        heads: projector type: cap (as published), lite or linear.
        data: validation images (None: the ones recorded in the cache).
        recipe: name or YAML file of a recipe (None: the cache's).
        dry_run: run all checks and print what would be done, without writing anything.
        options: any other option, by dotted name, such as `{"optim.lr": 0.1}`.
        more: any other option of the command, by plain name, such as `batch=64`, except the options that start
            several processes and `json`.
        log: called on rank 0 with (step, values) for every line written to metrics.jsonl.

    Returns:
        The run's summary. With multiple students (`student="resnet18,resnet50"`) or seeds (`seeds="0,1,2"`), it is
        that of the first run; `runs` has all summaries, and `series` the mean and standard deviation over the seeds.
        None after a dry run.

    Raises:
        UserError: anything that the command would report as an error.
        RunInterrupted: the process was asked to stop (Ctrl-C, SIGTERM or SIGUSR1); a checkpoint was saved.
    """
    require(log is None or callable(log), "log", log, "a function of (step, values)")
    given = _given("distill", options, more, student=student, cache=cache, run=run, epochs=epochs, targets=targets,
                   heads=heads, data=data, recipe=recipe, dry_run=dry_run or None)  # fmt: skip
    is_dry = take(given, DryRun).dry_run
    config = distill_config(given)
    from scalekd_cache.distributed import this_process
    from scalekd_cache.training.series import plan_series, single_runs

    runs, process = single_runs(config), this_process(config.device)
    if is_dry:
        plan_series(runs, process)
        return None
    return train_students(runs, process, log)


def train_students(
    runs: Sequence[DistillConfig], process: "Process", log: Callable[[int, Mapping[str, float]], None] | None = None
) -> RunSummary:
    """Train one student after another, print the mean and spread of several, and write their reports."""
    from scalekd_cache.reports.end_of_run import write_reports
    from scalekd_cache.training.series import distill_series, series_facts, series_table

    summary = series_facts(distill_series(runs, process, log))
    if "series" in summary:
        process.print_rank0(series_table(summary["series"]))
    write_reports([Path(str(one.run)) for one in runs], process)
    return summary


@worker_failures()
def probe(
    *,
    backbone: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Measure a backbone's k-NN and linear-probe accuracy on labeled images, with two baselines.

    The baselines are the same architecture with random weights, and raw pixels.

    Args:
        backbone: a finished run folder, an exported student's folder, or a timm model name.
        data: demo, cifar10, imagenette, or a folder, tars or parquet files with labels (None: demo).
        weights: for a model name, a .safetensors file (None: the file in teachers/, or timm's pretrained weights).
        size: image size in pixels (None: the backbone's).
        options: any other option, by dotted name, such as `{"device": "cpu"}`.
        more: any other option of the command, by plain name, such as `device="cpu"`.

    Returns:
        The image counts, and `results`: the `knn` and `linear_probe` accuracy in percent for `backbone`,
        `random_weights` and `pixels`.

    Raises:
        UserError: anything that the command would report as an error.
    """
    config = with_workers(
        ProbeConfig,
        _given("probe", options, more, backbone=backbone, data=data, weights=weights, size=size),
    )
    from scalekd_cache.devices import choose_device
    from scalekd_cache.training.probe import probe as measure

    return measure(config, choose_device(config.device))


@worker_failures()
def finetune(
    *,
    init: str | os.PathLike[str] | None = None,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    size: int | None = None,
    epochs: int | None = None,
    labels_per_class: int | None = None,
    out: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Fine-tune a backbone with a new classifier on labeled images and export the result for timm.

    Give either `init` or `model`.

    Args:
        init: a finished run folder, or an exported student's folder, to start from.
        model: a timm model name to start from.
        weights: for `model`, a .safetensors file (None: the file in teachers/, or timm's pretrained weights).
        data: demo, cifar10, imagenette, or a folder, tars or parquet files with labels (None: demo).
        size: image size in pixels (None: the model's).
        epochs: passes over the images (None: 30).
        labels_per_class: number of training images per class (None: all).
        out: output folder (None: `finetuned/<model>`).
        options: any other option, by dotted name, such as `{"layer_decay": 0.8}`.
        more: any other option of the command, by plain name, such as `lr=1e-4`.

    Returns:
        The output folder, image counts, and validation accuracy in percent (None without validation images).

    Raises:
        UserError: anything that the command would report as an error.
    """
    given = _given("finetune", options, more, init=init, model=model, weights=weights, data=data, size=size,
                   epochs=epochs, labels_per_class=labels_per_class, out=out)  # fmt: skip
    config = with_workers(FinetuneConfig, given)
    from scalekd_cache.devices import choose_device
    from scalekd_cache.training.finetune import finetune as train

    return train(config, choose_device(config.device))


@worker_failures()
def publish(
    *,
    cache: str | os.PathLike[str],
    to: str | os.PathLike[str],
    data_license: str,
    teacher_license: str,
    without_pixels: bool = False,
    pixels_from: str | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Publish a finished cache to the model hub, a bucket or a folder. Calling it again resumes.

    Args:
        cache: the cache folder.
        to: `hf://datasets/USER/NAME`, `s3://bucket/folder`, `gs://bucket/folder`, or a folder.
        data_license: the images' license, such as cc-by-4.0.
        teacher_license: the license of the teacher's weights, such as apache-2.0.
        without_pixels: leave out the pixels, which `pull` can recreate from the images.
        pixels_from: for a cache with shared pixels, the published URL or folder of the cache that stores them.
        options: any other option, by dotted name.
        more: any other option of the command, by plain name, such as `private=True`.

    Returns:
        The destination, fingerprint, number of units and bytes, and commands that use the published cache (`next`).

    Raises:
        UserError: anything that the command would report as an error.
    """
    given = _given("publish", options, more, cache=cache, to=to, data_license=data_license,
                   teacher_license=teacher_license, without_pixels=without_pixels, pixels_from=pixels_from)  # fmt: skip
    from scalekd_cache.publishing.publish import publish as run

    return run(build(PublishConfig, given))


@worker_failures()
def pull(
    url: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    views: str | None = None,
    without_pixels: bool | None = None,
    data: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> CacheInfo:
    """Download a published cache into a folder and verify every file.

    Calling it again resumes. If the folder already has all requested views, it does nothing.

    Args:
        url: hf://datasets/USER/NAME, s3://..., gs://..., https://... or a folder.
        cache: output folder (None: `caches/` followed by the last part of the URL).
        views: range of views to pull, starting at 0, such as `"0-3"` (None: all).
        without_pixels: regenerate the pixels from the images in `data` instead of downloading them.
        data: with `without_pixels`, the images that the cache was made from.
        options: any other option, by dotted name, such as `{"connections": 16}`.
        more: any other option of the command, by plain name, such as `connections=16`.

    Raises:
        UserError: anything that the command would report as an error.
    """
    config = with_workers(
        PullConfig,
        _given(
            "pull",
            options,
            more,
            url=url,
            cache=cache,
            views=views,
            without_pixels=without_pixels,
            data=data,
        ),
    )
    from scalekd_cache.publishing.pull import pull_cache

    return cache_info(Path(config.folder), pull_cache(config).manifest)


def with_workers(config_class: type[Downstream], given: Given) -> Downstream:
    """Build a configuration whose default number of `workers` fits this machine."""
    return build(config_class, {"workers": default_workers()}, given)


def _given(command: str, options: Mapping[str, Any] | None, more: Mapping[str, Any], **plain: Any) -> dict[str, Any]:
    """A function's arguments, keyed by dotted name.

    Raises:
        UserError: a name is unknown or given twice, only the command line has this option, or a value is empty or has
            the wrong type.
    """
    infos, names = {option.name: option.info for option in options_of(CLASSES[command])}, PLAIN_NAMES[command]
    groups = {name[:dot] for name in infos for dot, letter in enumerate(name) if letter == "."}
    require(isinstance(options, Mapping | None), "options", options, "a dict keyed by option name")
    pairs = [(name, value) for name, value in [*plain.items(), *more.items()] if value is not None]
    pairs += (options or {}).items()
    known = {*infos, *names, *COMMAND_LINE_ONLY}
    texts = {name for name, info in infos.items() if info.annotation in (str, str | None)}
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in known | groups:
            raise unknown_name("option", name, known, "--help lists all", listed=0)
        dotted = names.get(name, name)
        if dotted in given:
            raise UserError(f"{name} is set twice, for example as an argument and in options")
        given[dotted] = _text(value) if dotted in texts else value
    for name in given.keys() & {*names.values(), *COMMAND_LINE_ONLY} - {*infos, "dry_run"}:
        _check_unset(command, name, given.pop(name))
    given = plain_values(given)
    for name in given.keys() & infos.keys():  # before code that needs text reads them
        require(name not in texts or isinstance(given[name], str | None), name, given[name], "text")
    return given


def _text(value: Any) -> Any:
    """A path as text; a list of paths, text or whole numbers separated by commas, as on the command line."""
    if isinstance(value, list | tuple) and value and all(isinstance(one, str | int | os.PathLike) for one in value):
        return ",".join(str(one) for one in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _check_unset(command: str, name: str, value: object) -> None:
    """Raise `UserError` for an option that only the command line has, unless the value changes nothing."""
    if value is None or value is False or (name in ("nproc", "nnodes") and str(value) == "1"):
        return
    typed = f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')} {value}"
    raise UserError(
        f"{name} is available only on the command line: the function runs in this process and returns its result",
        fix=f"remove {name}, or run `scalekd {command} {typed} ...`",
    )
