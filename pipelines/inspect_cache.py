"""Show a cache or one of its records."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.command import Command, Given, run
from scalekd_cache.config.options import build, options_class
from scalekd_cache.errors import UserError

if TYPE_CHECKING:
    from scalekd_cache.store.reader import Cache


@options_class()
class InspectConfig:
    """Options of `inspect`."""

    cache: str = "caches/demo"
    """Folder or URL of the cache."""
    key: str | None = None
    """Sample key: the image's path without its suffix, or a line in keys.txt. Without `key` and `index`, the cache
    itself is shown."""
    index: int | None = None
    """Position of the record in the view's canonical order (an alternative to `key`)."""
    view: int = 0
    """View number."""
    pixels_from: str | None = None
    """Folder or URL of the cache that stores the shared pixels (default: the path recorded in this cache)."""
    out: str | None = None
    """Also write the view's stored pixels to this file (.jpg, .webp or .png)."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(given: Given) -> None:
    """Print information about the cache or one record."""
    config = build(InspectConfig, given)
    if config.key is not None and config.index is not None:
        raise UserError(
            "--key and --index cannot be combined", got=f"{config.key} and {config.index}", fix="set only one"
        )
    if config.key is None and config.index is None and (config.out is not None or config.view):
        raise UserError(f"{'--view' if config.out is None else '--out'} needs a record: set --key or --index")
    from scalekd_cache.audit.describe import describe_cache, describe_record
    from scalekd_cache.data.base import encode_key
    from scalekd_cache.store.reader import Cache

    cache = Cache.open(config.cache)
    if config.key is None and config.index is None:
        facts = describe_cache(cache)
    else:
        index = config.index
        if config.key is not None:  # as in keys.txt, or as a report shows it
            key = config.key if "%" in config.key else encode_key(config.key)
            index = cache.position(key, config.view)
        assert index is not None
        pixels = _pixels(cache, config)
        facts = describe_record(cache, config.view, index, pixels)
        if config.out is not None:
            _write_pixels(bytes((pixels or cache).read([index], config.view)[0].pixels), Path(config.out))
    print(json.dumps(facts, indent=1) if config.json else "\n".join(_lines(facts)))


def _pixels(cache: "Cache", config: InspectConfig) -> "Cache | None":
    """The cache that stores the shared pixels, if there is one and it is available."""
    from scalekd_cache.store.shared_pixels import open_shared_pixels

    try:
        return open_shared_pixels(cache, config.pixels_from, 1)
    except UserError:
        if config.pixels_from is not None:
            raise
        return None


def _write_pixels(pixels: bytes, path: Path) -> None:
    from scalekd_cache.store.base import pixels_suffix
    from scalekd_cache.store.durable_files import disk_errors, write_atomically

    if not pixels:
        raise UserError(
            "this cache stores no pixels: it shares those of another cache, or its views are replayed from the images",
            where=f"--out {path}",
            fix="if it shares pixels, set --pixels-from to the cache that stores them",
        )
    end = pixels_suffix(pixels)
    if path.suffix not in (end, end.replace("jpg", "jpeg")):
        raise UserError(
            "--out does not have the file extension of the stored pixel format",
            got=path.name,
            expected=f"a file name ending in {end}",
        )
    with disk_errors(path.parent, len(pixels)):
        write_atomically(path, pixels)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """One line per value."""
    lines = []
    for name, value in facts.items():
        title = indent + name.replace("_", " ")
        if isinstance(value, dict):
            lines += [f"{title}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [
                f"{title}:",
                *(f"{indent}  " + ", ".join(f"{k} {_text(v)}" for k, v in row.items()) for row in value),
            ]
        else:
            lines.append(f"{title}: {_text(value)}")
    return lines


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "-" if value is None else str(value)


COMMAND = Command("inspect", main, [InspectConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
