"""Download pretrained weights to a local folder, for nodes without network access."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from pipelines.command import Command, Given, run
from scalekd_cache.config.base import STRICT
from scalekd_cache.config.options import build
from scalekd_cache.config.stage1 import TeacherConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FetchConfig:
    """Options of `fetch`."""

    teacher: str
    """A timm model name."""
    weights_dir: str = TeacherConfig().weights_dir
    """Folder for the weights; `cache-teacher` looks there first."""


def main(given: Given) -> None:
    """Download the weights and save them as safetensors."""
    config = build(FetchConfig, given)
    from scalekd_cache.models.timm_models import fetch_weights

    file = fetch_weights(config.teacher, Path(config.weights_dir))
    print(f"{file}: `scalekd cache-teacher --teacher {config.teacher}` will use this file")


COMMAND = Command("fetch", main, [FetchConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
