"""Download pretrained weights to a local folder, for nodes without network access."""

from pathlib import Path

from pipelines.command import Command, Given, run, typed_command
from scalekd_cache.config.options import build, options_class
from scalekd_cache.config.stage1 import TeacherConfig


@options_class()
class FetchConfig:
    """Options of `fetch`."""

    teacher: str
    """A timm model name."""
    weights_dir: str = TeacherConfig().weights_dir
    """Folder for the weights. `cache-teacher` searches it if `teacher.weights_dir` is set to the same folder."""


def main(given: Given) -> None:
    """Download the weights and save them as safetensors."""
    config = build(FetchConfig, given)
    from scalekd_cache.models.timm_models import fetch_weights

    file = fetch_weights(config.teacher, Path(config.weights_dir))
    is_default = config.weights_dir == TeacherConfig().weights_dir
    folder = [] if is_default else [f"teacher.weights_dir={config.weights_dir}"]
    command = typed_command("cache-teacher", {"teacher": config.teacher}, folder)
    print(f"{file}: `{command}` will use this file")


COMMAND = Command("fetch", main, [FetchConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
