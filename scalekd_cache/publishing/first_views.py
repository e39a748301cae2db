"""Selects the first views of a published cache, giving a cache with fewer views.

In: `0-3` or nothing, a manifest, and sidecars. Out: the number of views, and facts and sidecars for a cache with only
these views.
Invariant: views are numbered 0, 1, ..., so only the first ones can be selected. Shards are unchanged, and a unit keeps
its sidecar if all its views are selected.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scalekd_cache.errors import UserError, counted, join_or
from scalekd_cache.store.base import ShardId, shard_reader
from scalekd_cache.store.image_digests import NAME as IMAGES
from scalekd_cache.store.manifest import Manifest, ManifestFacts
from scalekd_cache.store.sidecar import UnitInfo, read_keys

LISTS = ("keys.txt", IMAGES)
"""Files shared by all views in a unit."""
BATCH_RECORDS = 64


def number_of_views(text: str | None, manifest: Manifest, where: object) -> int:
    """The number of views selected by a text such as `0-3`; an empty text selects all.

    Raises:
        UserError: the selection does not start at view 0, exceeds the number of views in the cache, or gives a number
            of views that a sparse cache cannot have.
    """
    views = manifest.num_views
    if text is None:
        return views
    match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (-1, -1)
    if first != 0 or last >= views:
        number = f": --views 0-{last} for views 0 to {last}" if 0 < last < views else ""
        shorter = " or a shorter range from 0" if views > 1 else ""
        raise UserError(
            "the published cache has fewer views" if first == 0 else "only views from 0 onward can be pulled",
            got=f"--views {text}",
            expected=f"0-{views - 1}{shorter} ({counted(views, 'published view')}, numbered from 0)",
            where=where,
            fix=f"set --views 0-N, where N is the last view{number}" if views > 1 else "omit --views",
        )
    count, every = last + 1, manifest.facts.features_every
    possible = [
        number
        for number in range(1, manifest.num_views + 1)
        if not any(len(group) % every for group in first_groups(manifest.facts.groups, number))
    ]
    if count not in possible:
        near = sorted(sorted(possible, key=lambda number: abs(number - count))[:3])
        raise UserError(
            "with this number of views, some images would have more stored features than others",
            got=f"--views {text}: {counted(count, 'view')}",
            expected=f"{join_or([f'--views 0-{number - 1}' for number in near])}",
            where=where,
        )
    return count


def first_groups(groups: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The groups for the first `count` views; the last group may be truncated."""
    kept = [[view for view in group if view < count] for group in groups]
    return [group for group in kept if group]


def with_first_views(facts: ManifestFacts, count: int) -> ManifestFacts:
    """The facts for a cache with only the first `count` views."""
    return dataclasses.replace(facts, groups=first_groups(facts.groups, count))


def with_views(info: UnitInfo, views: Sequence[int]) -> UnitInfo:
    """The sidecar for a unit with only these views. Its payload sizes are 0 until `with_payload` sets them. `fidelity`
    is unchanged: it was measured over all views in the published unit.
    """
    if list(views) == info.views:
        return info
    stems = {f"v{view:04d}" for view in views}
    files = {name: fact for name, fact in info.files.items() if name in LISTS or name.partition(".")[0] in stems}
    return dataclasses.replace(info, views=list(views), files=files, payload_bytes=dict.fromkeys(info.payload_bytes, 0))


def with_payload(info: UnitInfo, folder: Path) -> UnitInfo:
    """The sidecar with the payload sizes of the shards in `folder`."""
    payload = dict.fromkeys(info.payload_bytes, 0)
    keys = read_keys(folder, info)
    for view in info.views:
        reader = shard_reader(info.backend, folder, ShardId(info.group, info.range_id, view), keys)
        for start in range(0, info.count, BATCH_RECORDS):
            for kind, size in reader.payload(np.arange(start, min(start + BATCH_RECORDS, info.count))).items():
                payload[kind] += size
        reader.close()
    return dataclasses.replace(info, payload_bytes=payload)
