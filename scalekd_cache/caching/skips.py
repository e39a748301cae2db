"""Which images the units of a job leave out.

In: a filled unit and what the first view group leaves out. Out: whether the unit may be committed.
Invariant: every view group leaves out the images that the first one does. A unit that cannot be made so is not
committed: it is made again at the end of the job, when the image may be readable, and named when it is not.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from scalekd_cache.caching.pixel_cache import PixelCache
from scalekd_cache.caching.sample_views import Unit
from scalekd_cache.data.base import Source
from scalekd_cache.data.images import UnreadableImage, decode_image
from scalekd_cache.errors import UserError
from scalekd_cache.store.resume import Ledger
from scalekd_cache.store.same_images import named
from scalekd_cache.store.unit import UnitWriter
from scalekd_cache.store.verify import unit_name


class SkipPolicy:
    """Decides what is left out, and keeps the units that were put off.

    Args:
        root: the cache's folder.
        source: the images; those that a `PixelCache` leaves out are the same in every group.
        ledger: the units of the cache.
    """

    def __init__(self, root: Path, source: Source | PixelCache, ledger: Ledger) -> None:
        self._root, self._source, self._ledger = root, source, ledger
        self._put_off: dict[tuple[int, int], dict[str, str]] = {}
        self._last = False

    def before(self, unit: Unit) -> Mapping[str, str]:
        """Sample keys that a unit leaves out whether they can be decoded or not, with the reasons."""
        return {} if unit.group == 0 else self._ledger.left_out() or {}

    def accepts(self, unit: Unit, writer: UnitWriter) -> bool:
        """Whether a filled unit may be committed; one that may not is put off."""
        wrong = {} if isinstance(self._source, PixelCache) else self._wrong(unit, writer)
        if wrong:
            place = unit.group, unit.range_id
            self._put_off[place] = wrong
            if not self._last:
                print(f"{unit_name(place)} is made again at the end of this job: {named(wrong)}", flush=True)
        return not wrong

    def last_try(self) -> None:
        """What is put off from now on is an error."""
        self._put_off, self._last = {}, True

    def check(self) -> None:
        """UserError when the last try failed for some units."""
        if not self._put_off:
            return
        keys = {key for wrong in self._put_off.values() for key in wrong}
        held = ", ".join(unit_name(place) for place in self._ledger.holding(keys))
        raise UserError(
            "images that the first view group holds cannot be decoded now",
            got="; ".join(f"{unit_name(place)}: {named(wrong)}" for place, wrong in self._put_off.items()),
            expected="the same images in every view group",
            where=self._root,
            fix="restore these image files and rerun: only these units are missing. If a file is lost, remove the "
            f"units that hold its image ({held}) and rerun: the image is then left out of every view",
        )

    def _wrong(self, unit: Unit, writer: UnitWriter) -> dict[str, str]:
        if unit.group == 0:
            again = [] if self._last else self._readable(unit, writer.skipped)
            return {key: f"{writer.skipped[key]}; it can be decoded now" for key in again}
        first = self._ledger.left_out()
        if first is None:  # whether it holds these images is not known yet
            return dict(writer.skipped)
        wrong = {key: reason for key, reason in writer.skipped.items() if key not in first}
        return wrong | dict.fromkeys(writer.keys & first.keys(), "left out of view group 0")

    def _readable(self, unit: Unit, skipped: Mapping[str, str]) -> Iterator[str]:
        """Those of the skipped images that can be decoded by now: a fault that has passed."""
        assert not isinstance(self._source, PixelCache)
        order = self._source.order(unit.group)
        for position in unit.positions if skipped else []:
            index = int(order[position])
            key = self._source.samples[index].key
            if key in skipped:
                try:
                    decode_image(self._source.read(index), key)
                except UnreadableImage:
                    continue
                yield key
