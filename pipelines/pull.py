"""Download a published cache into a folder and verify it, optionally only its first few views, or without pixels."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.cache_teacher import next_command
from pipelines.command import WORKERS, Command, Given, JsonOutput, run
from scalekd_cache.api import with_workers
from scalekd_cache.caching.cache_info import cache_info
from scalekd_cache.config.options import take
from scalekd_cache.config.pull import PullConfig
from scalekd_cache.errors import UserError, counted
from scalekd_cache.progress import size_text


def main(given: Given) -> None:
    """Pull the cache, then print what the folder contains."""
    output = take(given, JsonOutput)
    config = with_workers(PullConfig, given)
    from scalekd_cache.publishing.pull import pull_cache

    facts: dict[str, Any] = {}
    with output.printed(facts):
        done = pull_cache(config)
        manifest = done.manifest
        has = f"{counted(manifest.num_samples, 'image')} x {counted(manifest.num_views, 'view')}"
        what = "already complete; nothing to pull" if done.complete else f"{size_text(done.bytes)} pulled and verified"
        print(f"{config.folder}: {has}, {what}")
        print(f"next: {next_command(config.folder, manifest)}")
        facts |= {
            **asdict(cache_info(Path(config.folder), manifest)),
            "path": config.folder,
            "fetched_bytes": done.bytes,
        }


class PullCommand(Command):
    """The command, which takes its URL with or without `--url`."""

    def given(self, values: Mapping[str, str | None]) -> Given:
        """The options. Raises `UserError` for two URLs."""
        urls = [url for url in (values.get("url_"), values.get("url")) if url is not None]
        if len(urls) > 1:
            raise UserError("the published cache is given twice", got=" and ".join(urls), expected="one URL or folder")
        return super().given(values)


COMMAND = PullCommand("pull", main, [PullConfig, JsonOutput], __doc__, argument="url", defaults={"workers": WORKERS})

if __name__ == "__main__":
    run(COMMAND)
