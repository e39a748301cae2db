"""The cache report: summary, sizes, fidelity, a gallery of views, and outliers.

In: a finished cache, and its teacher if available. Out: HTML.
Invariant: if something cannot be shown (missing pixels, no teacher weights), the page says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalekd_cache import __version__
from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.audit.rerun_teacher import has_features, sample_places
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.config.base import require
from scalekd_cache.data.base import sample_indices
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.evaluate import describe_teacher
from scalekd_cache.models.teacher import Teacher, cache_teacher_config, load_cache_teacher
from scalekd_cache.models.weights import weights_available
from scalekd_cache.reports.charts import Chart, histogram, stacked_bar
from scalekd_cache.reports.gallery import Card, Gallery, TeacherOutputs, load_views, rerun_on_views
from scalekd_cache.reports.page import render
from scalekd_cache.reports.views import ViewInfo, ViewSample, closest_pairs, read_sample
from scalekd_cache.store.base import repair_fix
from scalekd_cache.store.manifest import NAME as MANIFEST
from scalekd_cache.store.manifest import Manifest, ManifestFacts, stored_share
from scalekd_cache.store.path import absolute
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_shared_pixels
from scalekd_cache.store.sidecar import read_unit, unit_folder

OUTLIERS = 6
"""Number of views shown for each type of outlier."""
GALLERY_VIEWS = 2
SWITCHES = {"flip_": "flip_probability", "randaugment_": "randaugment_ops", "erase_": "erase_probability"}
"""Prefixes of option names in a view recipe, each with the option that must be nonzero for them to have an effect."""
UNITS = 500
"""Maximum number of units whose fidelity is plotted."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Options for the cache report."""

    views: int = 1000
    """Number of views to sample when looking for outliers."""
    teacher_views: int = 64
    """Number of sampled views on which to re-run the teacher, if its weights are available (0: none)."""
    images: int = 8
    """Number of images in the gallery, each with up to two views."""
    seed: int = 0
    """Seed for sampling views."""
    data: str | None = None
    """Path of the images, for a cache without pixels (None: as recorded in the cache)."""
    teacher_weights: str | None = None
    """The teacher's weights file (None: as recorded in the cache)."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (None: as recorded)."""

    def __post_init__(self) -> None:
        require(self.views >= 2, "views", self.views, ">= 2")
        require(1 <= self.images <= 24, "images", self.images, "1 to 24")
        require(self.teacher_views >= 0, "asked", self.teacher_views, ">= 0")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


def cache_report(cache: Cache, options: CacheReport, process: Process) -> str:
    """Build the page for a finished cache.

    Raises:
        UserError: the cache has a different format version, or a codec file is damaged.
    """
    notes: list[str] = []
    checker = _record_checker(cache, options, notes)
    teacher = _teacher(cache.manifest, options, process, notes) if options.teacher_views else None
    sample = read_sample(cache, checker, sample_places(cache, options.views, options.seed))
    places = _gallery_places(cache, options)
    rerun = _evenly_spaced([info.place for info in sample.views], options.teacher_views)
    outputs = (
        rerun_on_views(cache, checker, teacher, [*places, *rerun], set(places)) if teacher else TeacherOutputs({}, {})
    )
    gallery = Gallery(cache, checker, places, outputs)
    damage = [f"Damaged records: {repair_fix(cache.root / MANIFEST)}."] if sample.unreadable else []
    worst = sorted(outputs.cosines, key=lambda place: outputs.cosines[place])[:OUTLIERS]
    pairs = [
        (gallery.cards([(sample.views[pair.first], ""), (sample.views[pair.second], "")]), pair)
        for pair in closest_pairs(sample, OUTLIERS // 2)
    ]
    shown = [(cards, pair) for cards, pair in pairs if len(cards) == 2]  # without a palette there are no cards
    return render(
        "cache.html",
        title=f"Cache {absolute(cache.root).name}",
        version=__version__,
        facts=facts_of_cache(cache),
        sizes=_sizes(cache.manifest),
        fidelity=_fidelity(cache, outputs),
        notes=[*notes, *sample.unreadable[:20], *damage],
        gallery=_by_image(gallery.cards([(info, _closeness(outputs, info)) for info in gallery.views])),
        scanned=len(sample.views),
        labeled=cache.manifest.facts.labeled,
        disagreeing=sum(info.disagrees for info in sample.views),
        judged=sum(info.predicted is not None for info in sample.views),
        disagreements=gallery.cards([(info, "") for info in _top_disagreements(sample)]),
        lowest=gallery.cards([(info, _closeness(outputs, info)) for info in load_views(cache, checker, worst)]),
        has_teacher=teacher is not None,
        pairs=shown,
        same_pixels=sum(pair.same_pixels for _, pair in shown),
    )


def _record_checker(cache: Cache, options: CacheReport, notes: list[str]) -> RecordChecker:
    """A checker with access to the pixels. If they are unavailable, adds a note."""
    manifest, source, shared = cache.manifest, None, None
    try:
        if manifest.facts.pixels_from:
            other = open_shared_pixels(cache, options.pixels_from, manifest.num_views)
            shared = PixelCache(other) if other is not None else None
        elif manifest.facts.view_recipe["pixels"] == "replayed":
            source = open_cache_source(manifest.facts.data, options.data, "train")
    except UserError as error:
        if options.pixels_from or options.data:
            raise
        option = "--pixels-from" if manifest.facts.pixels_from else "--data"
        notes.append(f"Pixels are not shown: {str(error).splitlines()[0]} (set {option})")
    return RecordChecker(manifest.facts.fingerprint_fields, cache.root, len(manifest.facts.class_names), source, shared)


def _teacher(manifest: Manifest, options: CacheReport, process: Process, notes: list[str]) -> Teacher | None:
    """Load the teacher offline. If this fails, adds a note and returns None."""
    config = cache_teacher_config(
        manifest.facts.teacher["config"], options.teacher_weights, manifest.facts.fingerprint_fields["precision"]
    )
    if not weights_available(config):
        notes.append(
            "The teacher's weights are not available, so stored feature maps are not compared with live ones "
            f"(weights file: {config.weights or 'none recorded'}; set --teacher-weights)."
        )
        return None
    try:
        return load_cache_teacher(manifest, config, process.device)
    except UserError as error:
        if options.teacher_weights:
            raise
        notes.append(f"The teacher was not run: {str(error).splitlines()[0]}")
        return None


def _gallery_places(cache: Cache, options: CacheReport) -> list[tuple[int, int]]:
    """Positions of randomly sampled images, for the views with features in one view group. An image has the same
    position in all views of a group."""
    places = []
    for position in sample_indices(len(cache), options.images, seed=options.seed):
        of_image = ((view, position) for view in cache.manifest.facts.groups[0])
        places += [place for place in of_image if has_features(cache, place)][:GALLERY_VIEWS]
    return places


def _by_image(cards: list[Card]) -> list[list[Card]]:
    """Group the views by image."""
    images: dict[int, list[Card]] = {}
    for card in cards:
        images.setdefault(card.info.position, []).append(card)
    return list(images.values())


def _evenly_spaced(places: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """At most `count` positions, evenly spaced."""
    return [places[index] for index in sample_indices(len(places), count)]


def _top_disagreements(sample: ViewSample) -> list[ViewInfo]:
    """Views whose predicted class differs from the label, highest probability first."""
    wrong = [info for info in sample.views if info.disagrees]
    return sorted(wrong, key=lambda info: -info.top_classes[0].percent)[:OUTLIERS]


def _closeness(outputs: TeacherOutputs, info: ViewInfo) -> str:
    cosine = outputs.cosines.get(info.place)
    return "" if cosine is None else f"cosine between stored and live map, mean removed: {cosine:.5f}"


def _sizes(manifest: Manifest) -> dict[str, Any]:
    parts = {name: size for name, size in manifest.bytes_per_view.items() if name != "total" and size}
    total = manifest.bytes_per_view["total"] * manifest.num_samples * manifest.num_views
    return {
        "figure": stacked_bar(parts, "bytes per view", "Disk size of a view"),
        "bytes_per_view": manifest.bytes_per_view["total"],
        "total_mb": total / 1e6,
    }


def _fidelity(cache: Cache, outputs: TeacherOutputs) -> dict[str, Any]:
    """Fidelity, as measured per unit in stage 1 and by re-running the teacher."""
    manifest, charts = cache.manifest, list[Chart]()
    rows = manifest.units[:: max(1, len(manifest.units) // UNITS)][:UNITS]
    units = [read_unit(unit_folder(cache.root, row.group, row.range_id))[0].fidelity for row in rows]
    worst = [unit["cosine_mean_removed"]["p1"] for unit in units if "cosine_mean_removed" in unit]
    if len(worst) > 1:
        title = "1st percentile of each unit, measured in stage 1"
        charts.append(histogram(worst, "mean-removed cosine, 1st percentile", "units", title))
    if len(outputs.cosines) > 1:
        p1 = manifest.fidelity.get("cosine_mean_removed", {}).get("p1")
        mark = None if p1 is None else ("1st percentile in stage 1", p1)
        text = "Stored maps compared with live maps"
        charts.append(histogram(list(outputs.cosines.values()), "mean-removed cosine of a view", "views", text, mark))
    table = [
        {
            "measured in stage 1": name.replace("_", " "),
            "mean": f"{row['mean']:.6f}",
            "1st percentile": f"{row['p1']:.6f}" if "p1" in row else "",
            "views": f"{row['count']:,}",
        }
        for name, row in manifest.fidelity.items()
    ]
    return {"rows": table, "charts": charts}


def facts_of_cache(cache: Cache) -> list[tuple[str, str]]:
    """Information about the cache, as table rows."""
    manifest = cache.manifest
    spec, recipe = manifest.facts.teacher["spec"], manifest.facts.view_recipe
    codec = ", ".join(
        f"{name} {value}" for name, value in manifest.facts.codec.items() if name != "id" and _short(value)
    )
    views = ", ".join(f"{name.replace('_', ' ')} {_text(recipe[name])}" for name in recipe if _is_on(name, recipe))
    return [
        ("path", str(cache.root)),
        (
            "images",
            f"{manifest.num_samples:,} {_classes(manifest.facts)}, {counted(manifest.num_views, 'view')} each",
        ),
        ("dataset", str(manifest.facts.data.get("source"))),
        ("teacher", describe_teacher(manifest.facts.teacher, labeled=manifest.facts.labeled)),
        ("feature map", "{} channels, {} x {} positions".format(*spec["feature_shape"])),
        (
            "feature codec",
            ", ".join(
                filter(None, (f"{manifest.facts.codec['id']} ({codec})", stored_share(manifest.facts.features_every)))
            ),
        ),
        *([("logits", str(manifest.facts.logit_codec.get("id")))] if spec["has_classifier"] else []),
        ("pixels", "in another cache" if manifest.facts.pixels_from else str(recipe["pixels"])),
        ("views", views),
        ("recipe", manifest.facts.recipe),
        (
            "store",
            f"{manifest.facts.backend}, {counted(len(manifest.units), 'unit')}, "
            f"format version {manifest.format_version}",
        ),
        ("fingerprint", manifest.facts.fingerprint),
        ("written with", ", ".join(f"{name} {version}" for name, version in manifest.facts.versions.items())),
    ]


def _classes(facts: ManifestFacts) -> str:
    return f"of {counted(len(facts.class_names), 'class')}" if facts.labeled else "without labels"


def _is_on(name: str, recipe: Mapping[str, Any]) -> bool:
    """Whether a view recipe option has an effect and does not have its own row."""
    off = [part for part, switch in SWITCHES.items() if not recipe.get(switch)]
    if recipe["pixels"] == "replayed":
        off += ["pixel_format", "jpeg_"]
    elif recipe.get("pixel_format") in ("png", "webp"):
        off.append("jpeg_" if recipe["pixel_format"] == "png" else "jpeg_subsampling")
    return name != "pixels" and not name.startswith(tuple(off))


def _text(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: object) -> bool:
    return len(str(value)) <= 40
