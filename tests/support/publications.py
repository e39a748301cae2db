"""Small caches to publish, and a call of `publish` with licenses."""

from store_cases import GROUPS, RANGES, facts, write_unit

from scalekd_cache.config.publishing import PublishConfig
from scalekd_cache.publishing.publish import publish
from scalekd_cache.store.manifest import build_manifest, write_manifest
from scalekd_cache.store.plan import Plan, write_plan

LICENSES = {"data_license": "cc-by-4.0", "teacher_license": "apache-2.0"}


def finish(root, backend, groups, **changes):
    """Manifest and plan of the first groups."""
    known = facts(backend, groups=groups, **changes)
    write_plan(root, Plan(facts=known, ranges=[list(pair) for pair in RANGES]))
    write_manifest(root, build_manifest(root, known, RANGES))
    return root


def finished_cache(root, backend, groups=GROUPS, **changes):
    """A cache as stage 1 leaves it. With more groups it grows."""
    for group in range(len(groups)):
        for range_id in range(len(RANGES)):
            write_unit(root, backend, group, range_id)
    return finish(root, backend, groups, **changes)


def published(cache, to, **options):
    """The facts of a publication."""
    return publish(PublishConfig(cache=str(cache), to=str(to), **{**LICENSES, **options}))
