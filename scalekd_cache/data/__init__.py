"""The places images come from, one file per kind; `scalekd_cache.data.images` is the door."""
