"""Shared code of the tests of caches behind a URL."""

from store_cases import NUM_SAMPLES

from scalekd_cache.config.remote import RemoteConfig

ALL = range(NUM_SAMPLES)


def config(folder, **changes):
    return RemoteConfig(**{"folder": str(folder), "backoff_s": 0.01, "timeout_s": 0.5, "attempts": 4, **changes})
