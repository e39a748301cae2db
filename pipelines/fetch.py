"""Bring pretrained weights to a folder that nodes without a network can read (`make fetch TEACHER=name`)."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.command import parse, run
from scalekd_cache.config.stage1 import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Options of `fetch`."""

    teacher: str
    """A timm model name."""
    weights_dir: str = TeacherConfig().weights_dir
    """Folder for the weights; `cache_teacher` looks there first."""


def main(argv: list[str]) -> None:
    """Fetch and save as safetensors."""
    config = parse(FetchConfig, "fetch", argv, {}, __doc__ or "")
    from scalekd_cache.models.timm_models import fetch_weights

    file = fetch_weights(config.teacher, Path(config.weights_dir))
    print(f"{file}: used by `make cache-teacher TEACHER={config.teacher}` from now on")


if __name__ == "__main__":
    run(main)
