"""Uses an existing cache as the source of views for a new one.

In: the existing cache's folder, and the options for the new cache. Out: a `PixelCache` with the same units, images,
views and skipped images; or `PixelFacts`, which only needs the existing cache's plan.
Invariant: position p of view v is the same view of the same image in both caches.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import NamedTuple

from scalekd_cache.config.base import to_plain
from scalekd_cache.config.stage1 import CacheTeacherConfig
from scalekd_cache.data.base import ListedSource, SampleList, sample_indices
from scalekd_cache.data.source import data_facts, open_source
from scalekd_cache.errors import UserError, counted, shell_command
from scalekd_cache.store.base import NO_LABEL
from scalekd_cache.store.manifest import ManifestFacts
from scalekd_cache.store.reader import Cache
from scalekd_cache.store.shared_pixels import open_pixel_cache
from scalekd_cache.store.sidecar import read_unit, unit_folder


class PixelFacts(NamedTuple):
    """What a plan needs to know about the cache that stores the pixels. That cache may be incomplete."""

    root: Path
    facts: ManifestFacts
    ranges: list[range]
    """The image ranges, which are the same in every view group."""

    def extend_groups(self, groups: list[list[int]], num_views: int) -> list[list[int]]:
        """View groups for a new cache with at least `num_views` views, starting with its existing `groups`.

        A new group never spans two groups in this cache.

        Raises:
            UserError: this cache has fewer views.
        """
        if num_views > self.facts.num_views:
            raise UserError(
                "the cache that stores the shared pixels has fewer views",
                got=counted(self.facts.num_views, "view"),
                expected=f"at least {num_views}",
                where=self.root,
                fix=f"add views to it first: {shell_command('cache-teacher', cache=self.root, views=num_views)}",
            )
        first = sum(len(group) for group in groups)
        new = [[view for view in group if first <= view < num_views] for group in self.facts.groups]
        return [*(list(group) for group in groups), *(group for group in new if group)]


class PixelCache:
    """A finished cache that provides pixels, view records, labels and digests for a new one."""

    def __init__(self, cache: Cache) -> None:
        assert isinstance(cache.root, Path)  # stage 1 reads shared pixels from a local folder
        self.cache = cache
        self._group_of = {view: group for group, views in enumerate(cache.manifest.facts.groups) for view in views}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names."""
        return tuple(self.cache.manifest.facts.class_names)

    @functools.cached_property
    def shared(self) -> PixelFacts:
        """What the new cache's plan needs to know about this one."""
        manifest = self.cache.manifest
        numbers = [unit.range_id for unit in manifest.units if unit.group == 0]
        infos = [read_unit(self._folder(0, number))[0] for number in numbers]
        assert isinstance(self.cache.root, Path)
        return PixelFacts(self.cache.root, manifest.facts, [range(info.start, info.stop) for info in infos])

    def records(self, view: int, range_id: int) -> range:
        """The positions of a range's records in the view's canonical order."""
        return self.cache.positions(view, range_id)

    def skipped(self, view: int, range_id: int) -> list[dict[str, str]]:
        """The images in a range without records, as {key, reason}."""
        return read_unit(self._folder(self._group_of[view], range_id))[0].skipped

    def sample_images(self, count: int) -> ListedSource:
        """At most `count` evenly spaced labeled images, using the stored view 0 instead of the image file."""
        records = [r for r in self.cache.read(sample_indices(len(self.cache), count), 0) if r.label != NO_LABEL]
        return ListedSource(
            name=str(self.cache.root),
            class_names=self.class_names,
            samples=SampleList([record.key for record in records], [record.label for record in records]),
            reader=_Encoded([bytes(record.pixels) for record in records]),
        )

    def _folder(self, group: int, range_id: int) -> Path:
        assert isinstance(self.cache.root, Path)
        return unit_folder(self.cache.root, group, range_id)


class _Encoded:
    """A `Reader` for encoded images."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images

    def __call__(self, index: int) -> bytes:
        return self._images[index]


def open_shared_views(config: CacheTeacherConfig, *, download: bool = True) -> PixelCache:
    """Open the cache named by `cache.pixels_from` and check that it has the requested views.

    Raises:
        NotDownloadedError: the dataset is needed for the check but is missing, and `download` is false.
        UserError: that cache has a different view recipe or dataset, has no pixels, or is the new cache itself.
    """
    assert config.cache.pixels_from is not None
    root = Path(config.cache.pixels_from)
    if os.path.realpath(root) == os.path.realpath(config.cache.path):
        raise UserError(
            "--pixels-from and --cache are the same folder",
            got=f"--pixels-from {root}",
            where=config.cache.path,
            fix="choose a different folder for the new cache (--cache ...)",
        )
    cache = open_pixel_cache(root)
    kept, asked = cache.manifest.facts.view_recipe, to_plain(config.views)
    different = [name for name in asked if kept.get(name) != asked[name]]
    if different:
        raise UserError(
            "the cache that stores the shared pixels was made with different view options",
            got=", ".join(f"views.{name}={kept.get(name)}" for name in different),
            expected=", ".join(f"views.{name}={asked[name]}" for name in different),
            where=root,
            fix="use that cache's --recipe and --views.* options, or remove --pixels-from",
        )
    _check_data(config, cache, download)
    return PixelCache(cache)


def _check_data(config: CacheTeacherConfig, cache: Cache, download: bool) -> None:
    """Check that the cache was made from the requested dataset, which is opened only if its name or options differ."""
    kept, asked = cache.manifest.facts.data, to_plain(config.data)
    if all(kept.get(field.name) == asked[field.name] for field in dataclasses.fields(config.data)):
        return
    source = open_source(config.data, "train", download=download)
    got = data_facts(source)
    expected = cache.manifest.facts.fingerprint_fields["data"]
    if got != expected:
        raise UserError(
            "the cache that stores the shared pixels was made from a different dataset (images, labels or class names)",
            got=f"{source.name}: {counted(got['samples'], 'image')}, hash of the image list {got['listing'][:16]}",
            expected=f"{kept.get('source')}: {counted(expected['samples'], 'image')}, "
            f"hash of the image list {expected['listing'][:16]}",
            where=cache.root,
            fix="use the same --data and data.max_samples, or remove --pixels-from",
        )
