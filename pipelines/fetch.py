"""Download pretrained weights to a local folder, for nodes without a network (`make fetch TEACHER=name`)."""

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
    """Download the weights and save them as safetensors."""
    config = parse(FetchConfig, "fetch", argv, {}, __doc__ or "")
    from scalekd_cache.models.timm_models import fetch_weights

    file = fetch_weights(config.teacher, Path(config.weights_dir))
    print(f"{file}: `make cache-teacher TEACHER={config.teacher}` will use this file")


if __name__ == "__main__":
    run(main)
