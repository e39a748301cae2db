"""Python functions for the commands, with the same names, defaults, checks and errors.

In: plain names (`epochs=2`) and dotted options (`{"optim.lr": 0.1}`). Out: a `CacheInfo` or a `RunSummary`.
Invariant: the command line builds its configurations here too, so commands and functions behave identically.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scalekd_cache.caching.cache_info import CacheInfo, cache_info, caches_info
from scalekd_cache.config.base import to_plain
from scalekd_cache.config.downstream import FinetuneConfig, ProbeConfig
from scalekd_cache.config.machine import default_workers
from scalekd_cache.config.options import build
from scalekd_cache.config.places import cache_places, default_cache, expand_home
from scalekd_cache.config.plain_names import PLAIN_NAMES
from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.config.recipes import (
    DEMO,
    OTHER,
    check_recipe,
    different_views,
    has_changed,
    recipe_section,
    training_options,
)
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig
from scalekd_cache.config.stage2 import DistillConfig, TrainConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.growing import read_cache_facts
from scalekd_cache.store.manifest import ManifestFacts, read_manifest
from scalekd_cache.store.remote.remote_path import open_place
from scalekd_cache.training.run_files import RunSummary, options_of_run

if TYPE_CHECKING:
    from scalekd_cache.distributed import Process

Stage1 = TypeVar("Stage1", bound=CacheTeacherConfig)
Downstream = TypeVar("Downstream", ProbeConfig, FinetuneConfig, PullConfig)
Given = Mapping[str, Any]
"""The options that the user set, keyed by dotted name."""


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
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> CacheInfo:
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
        options: any other option, by dotted name, such as `{"views.seed": 1}`.
        more: any other option of the command, by plain name, such as `store="zarr"`.

    Returns:
        Information about the cache. With multiple teachers, this is the first cache, and `others` lists the rest.

    Raises:
        UserError: anything that the command would report as an error.
    """
    given = _given("cache-teacher", options, more, data=data, teacher=teacher, teachers=teachers,
                   teacher_weights=teacher_weights, cache=cache, views=views, size=size, codec=codec, student=student,
                   recipe=recipe)  # fmt: skip
    config = cache_teacher_config(CacheTeacherConfig, given)
    from scalekd_cache.caching.job import cache_teachers
    from scalekd_cache.distributed import this_process

    return caches_info(config, cache_teachers(config, this_process(config.device), checked_student(config)))


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
    options: Mapping[str, Any] | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
    **more: Any,
) -> RunSummary:
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
        options: any other option, by dotted name, such as `{"optim.lr": 0.1}`.
        more: any other option of the command, by plain name, such as `batch=64`.
        log: called on rank 0 with (step, values) for every line written to metrics.jsonl.

    Returns:
        The run's summary. With multiple students (`student="resnet18,resnet50"`) or seeds (`seeds="0,1,2"`), it is
        that of the first run; `runs` has all summaries, and `series` the mean and standard deviation over the seeds.

    Raises:
        UserError: anything that the command would report as an error.
    """
    given = _given("distill", options, more, student=student, cache=cache, run=run, epochs=epochs, targets=targets,
                   heads=heads, data=data, recipe=recipe)  # fmt: skip
    config = distill_config(given)
    from scalekd_cache.distributed import this_process
    from scalekd_cache.training.series import single_runs

    return train_students(single_runs(config), this_process(config.device), log)


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
        ProbeConfig, _given("probe", options, more, backbone=backbone, data=data, weights=weights, size=size)
    )
    from scalekd_cache.devices import choose_device
    from scalekd_cache.training.probe import probe as measure

    return measure(config, choose_device(config.device))


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
        _given("pull", options, more, url=url, cache=cache, views=views, without_pixels=without_pixels, data=data),
    )
    from scalekd_cache.publishing.pull import pull_cache

    return cache_info(Path(config.folder), pull_cache(config).manifest)


def with_workers(config_class: type[Downstream], given: Given) -> Downstream:
    """Build a configuration whose default number of `workers` fits this machine."""
    return build(config_class, {"workers": _workers()}, given)


def cache_teacher_config(config_class: type[Stage1], given: Given) -> Stage1:
    """Build the stage-1 configuration from defaults, the recipe and the given options.

    A cache with shared pixels takes its views, dataset and recipe from the cache that stores the pixels.

    Args:
        config_class: `CacheTeacherConfig` or a subclass.
        given: options keyed by dotted name.
    """
    if given.get("teachers") and given.get("teacher.name"):
        raise UserError("set either --teacher or --teachers, not both")
    pixels_from = given.get("cache.pixels_from")
    shared = read_manifest(Path(pixels_from)).facts if pixels_from else None
    source = given.get("data.source") or (shared.data["source"] if shared else DataConfig.source)
    recipe = given.get("recipe") or (shared.recipe if shared else default_recipe(source))
    section = recipe_section(recipe, "cache")
    if shared is not None:
        check_given_recipe(given, shared, pixels_from)
        section = _of_pixels(section, shared)
    defaults = {"cache.path": default_cache(source), "workers": _workers()}
    return build(config_class, defaults, section, {"recipe": recipe}, given)


def checked_student(config: CacheTeacherConfig) -> DistillConfig | None:
    """The training options for the student that stage 1 checks before it starts; None without a student.

    Raises:
        UserError: the recipe's training options are invalid (checked even without a student).
    """
    student = {"student.name": config.student} if config.student else {}
    training = build(DistillConfig, recipe_section(config.recipe, "distill"), student)
    return training if config.student else None


def distill_config(given: Given) -> DistillConfig:
    """Build the stage-2 configuration from defaults, the recipe and the given options.

    If no recipe is given, the cache's recipe is used. A command that resumes or extends a run takes the options that
    are not given from that run.

    Raises:
        UserError: the cache does not exist, an option is invalid, or the given recipe has different views than the
            cache.
    """
    if stored := options_of_run(given):
        return build(DistillConfig, {"train.workers": _workers()}, stored, given)
    _check_student(given)
    place = cache_place(given)
    waiting = build(DistillConfig, {name: given[name] for name in given if name.startswith("follow")})
    first, wait_s = open_place(cache_places(place)[0]), 60 * waiting.follow_timeout_minutes
    facts = read_cache_facts(first, waiting.follow, wait_s, _print_rank0)
    recipe = given.get("recipe")
    if not recipe and has_changed(facts.recipe, facts.distill):
        _print_rank0(
            f"recipe {facts.recipe} has changed since stage 1; this run uses the options stored in the cache "
            f"(to use the file instead, set --recipe {facts.recipe})"
        )
    check_given_recipe(given, facts, place)
    defaults = {"cache": place, "train.workers": _workers()}
    training = training_options(recipe, facts.recipe, facts.distill)
    return build(DistillConfig, defaults, training, fitting_micro_batch(training, given), given)


def distill_config_before_cache(given: Given) -> DistillConfig:
    """Build a stage-2 configuration without reading the cache, to check the given options.

    Raises:
        UserError: the options or the recipe are invalid.
    """
    _check_student(given)
    recipe = given.get("recipe") or default_recipe(str(given.get("data") or DataConfig.source))
    training = training_options(recipe, recipe, {})
    return build(DistillConfig, {"cache": cache_place(given)}, training, fitting_micro_batch(training, given), given)


def _check_student(given: Given) -> None:
    if "student.name" not in {**options_of_run(given), **given}:
        raise UserError("set the student, for example --student resnet50")


def cache_place(given: Given) -> str:
    """Path of the cache that stage 2 reads: the given one, that of the run to resume, or the dataset's default."""
    cache = given.get("cache") or options_of_run(given).get("cache")
    return str(cache or default_cache(given.get("data") or DataConfig.source))


def check_given_recipe(given: Given, facts: ManifestFacts, where: object) -> None:
    """Check that the given recipe has the same view options as the cache.

    A cache's views can differ from its own recipe if `views.*` options were set in stage 1. This is only a note.

    Raises:
        UserError: view options of another recipe differ; the message lists them.
    """
    recipe, kept = given.get("recipe"), facts.view_recipe
    if not recipe:
        return
    views = to_plain(build(CacheTeacherConfig, recipe_section(recipe, "cache")).views)
    if recipe != facts.recipe:
        check_recipe(kept, recipe, views, where)
    elif different := different_views(kept, views):
        found = ", ".join(f"views.{name}={kept.get(name)}" for name in different)
        _print_rank0(f"the cache was made with other views than those of its recipe {recipe}: {found}")


def default_recipe(source: str) -> str:
    """The default recipe for a dataset: `demo` for the built-in digits, otherwise `traditional`."""
    return DEMO if source == DataConfig.source else OTHER


def _given(command: str, options: Mapping[str, Any] | None, more: Mapping[str, Any], **plain: Any) -> dict[str, Any]:
    """A function's arguments, keyed by dotted name.

    Raises:
        UserError: a name is given twice.
    """
    names = PLAIN_NAMES[command]
    given = {names[name]: os.fspath(value) if isinstance(value, os.PathLike) else value
             for name, value in plain.items() if value is not None}  # fmt: skip
    for name, value in (
        *(options or {}).items(),
        *((name, value) for name, value in more.items() if value is not None),
    ):
        dotted = names.get(name, name)
        if dotted in given:
            raise UserError(f"{name} is set twice, for example as an argument and in options")
        given[dotted] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return {name: expand_home(value) for name, value in given.items()}


def fitting_micro_batch(training: Mapping[str, Any], given: Given) -> dict[str, Any]:
    """A micro-batch size that divides the given global batch size: the largest one up to the recipe's. Nothing if it
    would be less than half of the recipe's and of the batch."""
    micro = training.get("train", {}).get("micro_batch_size", TrainConfig.micro_batch_size)
    text = str(given.get("train.global_batch_size", ""))
    batch = int(text) if text.isdecimal() and len(text) < 10 else 0
    largest = next((size for size in range(min(micro, batch), 0, -1) if batch % size == 0), micro)
    return {} if largest == micro or 2 * largest < min(micro, batch) else {"train.micro_batch_size": largest}


def _of_pixels(section: dict[str, Any], shared: ManifestFacts) -> dict[str, Any]:
    """Replace a recipe's views and dataset with those of the cache that stores the shared pixels."""
    data = {name: shared.data[name] for name in DataConfig.__dataclass_fields__ if name in shared.data}
    views = {"num_views": shared.num_views}
    return {**section, "views": shared.view_recipe, "data": data, "cache": {**section.get("cache", {}), **views}}


def _workers() -> int:
    return default_workers(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _print_rank0(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
