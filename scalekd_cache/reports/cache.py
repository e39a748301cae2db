"""The report of a cache: what it is, its sizes and fidelity, a gallery of views, and outliers.

In: a finished cache, and its teacher where it is at hand. Out: HTML.
Invariant: what cannot be shown here (pixels that are elsewhere, a teacher that is not at hand) is said on the page.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scalekd_cache.audit.records import RecordChecker
from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.config.base import require
from scalekd_cache.data.source import open_cache_source
from scalekd_cache.distributed import Process
from scalekd_cache.errors import UserError
from scalekd_cache.models.evaluate import teacher_accuracy
from scalekd_cache.models.teacher import Teacher, cache_teacher_config, load_cache_teacher
from scalekd_cache.models.weights import weights_available
from scalekd_cache.reports.figures import histogram, stacked_bar
from scalekd_cache.reports.gallery import Gallery, TeacherOutputs, ask, load_views
from scalekd_cache.reports.page import Picture, render
from scalekd_cache.reports.views import Look, Scan, choose, closest_pairs, scan
from scalekd_cache.store.manifest import Manifest
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import pixels_of
from scalekd_cache.store.sidecar import read_unit, unit_folder
from scalekd_cache.versions import __version__

OUTLIERS = 6
"""Views of each kind of outlier."""
GALLERY_VIEWS = 2
UNITS = 500
"""Units whose fidelity is plotted, at most."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What is looked at."""

    views: int = 1000
    """Views that are read to find outliers, drawn at random."""
    asked: int = 64
    """Of those, how many are shown to the teacher again when it is at hand (0: none)."""
    images: int = 8
    """Images in the gallery, each with up to two views."""
    seed: int = 0
    """Chooses them."""
    data: str | None = None
    """Where the images are, for a cache without pixels (None: where stage 1 found them)."""
    teacher_weights: str | None = None
    """The teacher's weights (None: where stage 1 found them)."""
    pixels_from: str | None = None
    """Folder or URL of the cache whose pixels are shared (None: where it was)."""

    def __post_init__(self) -> None:
        require(self.views >= 2, "views", self.views, ">= 2")
        require(1 <= self.images <= 24, "images", self.images, "1 to 24")
        require(self.asked >= 0, "asked", self.asked, ">= 0")
        require(self.seed >= 0, "seed", self.seed, ">= 0")


def cache_report(cache: Cache, options: CacheReport, process: Process) -> str:
    """The page of a finished cache.

    Raises:
        UserError: a cache of another version, or a codec's file that is damaged.
    """
    notes: list[str] = []
    checker = _examiner(cache, options, notes)
    teacher = _teacher(cache.manifest, options, process, notes) if options.asked else None
    found = scan(cache, checker, choose(cache, options.views, options.seed))
    places = _gallery_places(cache, options)
    asked = _spread([look.place for look in found.looks], options.asked)
    outputs = ask(cache, checker, teacher, [*places, *asked], set(places)) if teacher else TeacherOutputs({}, {})
    gallery = Gallery(cache, checker, places, outputs)
    worst = sorted(outputs.cosines, key=lambda place: outputs.cosines[place])[:OUTLIERS]
    pairs = [
        (gallery.cards([(found.looks[pair.first], ""), (found.looks[pair.second], "")]), pair)
        for pair in closest_pairs(found, OUTLIERS // 2)
    ]
    shown = [(cards, pair) for cards, pair in pairs if len(cards) == 2]  # without a palette there are none
    return render(
        "cache.html",
        title=f"Cache {cache.root.name}",
        version=__version__,
        facts=facts_of_cache(cache),
        sizes=_sizes(cache.manifest),
        fidelity=_fidelity(cache, outputs, len(asked)),
        notes=[*notes, *found.unreadable[:20]],
        gallery=gallery.cards([(look, _closeness(outputs, look)) for look in gallery.looks]),
        scanned=len(found.looks),
        disagreeing=sum(look.disagrees for look in found.looks),
        judged=sum(look.answered is not None for look in found.looks),
        disagreements=gallery.cards([(look, "") for look in _surest_disagreements(found)]),
        lowest=gallery.cards([(look, _closeness(outputs, look)) for look in load_views(cache, checker, worst)]),
        has_teacher=teacher is not None,
        pairs=shown,
        same_pixels=sum(pair.same_pixels for _, pair in shown),
    )


def _examiner(cache: Cache, options: CacheReport, notes: list[str]) -> RecordChecker:
    """Decodes records; finds their pixels where they are, and says where they are not."""
    manifest, source, shared = cache.manifest, None, None
    try:
        if manifest.pixels_from:
            other = pixels_of(cache, options.pixels_from, manifest.num_views)
            shared = PixelCache(other) if other is not None else None
        elif manifest.view_recipe["pixels"] == "replayed":
            source = open_cache_source(manifest.data, options.data, "train")
    except UserError as error:
        if options.pixels_from or options.data:
            raise
        notes.append(f"The views' pixels are not shown: {str(error).splitlines()[0]}")
    return RecordChecker(manifest.fingerprint_fields, cache.root, len(manifest.class_names), source, shared)


def _teacher(manifest: Manifest, options: CacheReport, process: Process, notes: list[str]) -> Teacher | None:
    """The teacher, when it can be had without a network."""
    config = cache_teacher_config(
        manifest.teacher["config"], options.teacher_weights, manifest.fingerprint_fields["precision"]
    )
    if not weights_available(config):
        notes.append(
            "The teacher's weights are not at hand, so stored maps are not compared with its own "
            f"(looked for {config.weights or 'a file'}; give TEACHER_WEIGHTS=)."
        )
        return None
    try:
        return load_cache_teacher(manifest, config, process.device)
    except UserError as error:
        if options.teacher_weights:
            raise
        notes.append(f"The teacher was not asked: {str(error).splitlines()[0]}")
        return None


def _gallery_places(cache: Cache, options: CacheReport) -> list[tuple[int, int]]:
    """Some images, spread over the data set; views of one group, in which an image keeps its place."""
    views = cache.manifest.groups[0][:GALLERY_VIEWS]
    count = min(options.images, len(cache))
    positions = np.random.default_rng(options.seed).choice(len(cache), size=count, replace=False)
    return [(view, int(position)) for position in np.sort(positions) for view in views]


def _spread(places: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    return places[:: max(1, len(places) // count)][:count] if count else []


def _surest_disagreements(found: Scan) -> list[Look]:
    """Views whose teacher names another class than the label, the surest first."""
    wrong = [look for look in found.looks if look.disagrees]
    return sorted(wrong, key=lambda look: -look.answers[0].percent)[:OUTLIERS]


def _closeness(outputs: TeacherOutputs, look: Look) -> str:
    cosine = outputs.cosines.get(look.place)
    return "" if cosine is None else f"cosine of stored and fresh map, mean removed: {cosine:.5f}"


def _sizes(manifest: Manifest) -> dict[str, Any]:
    parts = {name: size for name, size in manifest.bytes_per_view.items() if name != "total"}
    total = manifest.bytes_per_view["total"] * manifest.num_samples * manifest.num_views
    return {
        "figure": stacked_bar(parts, "bytes a view", "What a view takes on disk"),
        "bytes_per_view": manifest.bytes_per_view["total"],
        "total_mb": total / 1e6,
    }


def _fidelity(cache: Cache, outputs: TeacherOutputs, asked: int) -> dict[str, Any]:
    """Figures of stage 1, over units, and of the teacher asked again."""
    manifest, pictures = cache.manifest, list[Picture]()
    rows = manifest.units[:: max(1, len(manifest.units) // UNITS)][:UNITS]
    units = [read_unit(unit_folder(cache.root, row.group, row.range_id))[0].fidelity for row in rows]
    worst = [unit["cosine_mean_removed"]["p1"] for unit in units if "cosine_mean_removed" in unit]
    if len(worst) > 1:
        title = "1st percentile of each unit, measured when it was written"
        pictures.append(histogram(worst, "mean-removed cosine, 1st percentile of a unit", "units", title))
    if len(outputs.cosines) > 1:
        p1 = manifest.fidelity.get("cosine_mean_removed", {}).get("p1")
        mark = None if p1 is None else ("1st percentile at stage 1", p1)
        text = "Stored maps against the teacher's own, asked again now"
        pictures.append(histogram(list(outputs.cosines.values()), "mean-removed cosine of a view", "views", text, mark))
    return {"rows": manifest.fidelity, "pictures": pictures, "asked": asked}


def facts_of_cache(cache: Cache) -> list[tuple[str, str]]:
    """What the cache is, a line each."""
    manifest = cache.manifest
    spec, recipe = manifest.teacher["spec"], manifest.view_recipe
    codec = ", ".join(f"{name} {value}" for name, value in manifest.codec.items() if name != "id" and _short(value))
    views = ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in recipe.items())
    return [
        ("place", str(cache.root)),
        (
            "images",
            f"{manifest.num_samples:,} of {len(manifest.class_names):,} classes, {manifest.num_views} views each",
        ),
        ("data set", str(manifest.data.get("source"))),
        ("teacher", f"{spec['name']}, {teacher_accuracy(manifest.teacher)}"),
        ("teacher's map", "{} channels, {} x {} positions".format(*spec["feature_shape"])),
        ("feature codec", f"{manifest.codec['id']} ({codec})"),
        ("logits", str(manifest.logit_codec.get("id"))),
        ("pixels", "shared with another cache" if manifest.pixels_from else str(recipe["pixels"])),
        ("views", views),
        ("recipe", manifest.recipe),
        ("store", f"{manifest.backend}, {len(manifest.units)} units, format version {manifest.format_version}"),
        ("fingerprint", manifest.fingerprint),
        ("written with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]


def _text(value: object) -> str:
    if isinstance(value, list):
        return " to ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: object) -> bool:
    return len(str(value)) <= 40
