"""The places images come from, one file per kind; `scalekd_cache.images` is the door."""
