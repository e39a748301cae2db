"""Export a run's student to a standard format."""

import re
from pathlib import Path

from pipelines.command import Command, Given, run
from scalekd_cache.config.base import require
from scalekd_cache.config.options import build, options_class


@options_class()
class ExportConfig:
    """Options of `export`."""

    run: str
    """Folder of a run that has a checkpoint."""
    out: str | None = None
    """Output folder (timm) or output file (other formats). Default: in the run folder."""
    format: str = "timm"
    """timm: a folder with a model card; safetensors: a state dict; onnx; torch-export: a .pt2 program; torchvision or
    mmpretrain: a state dict with that library's parameter names (docs/METHOD.md lists the architectures)."""
    push: str | None = None
    """Also upload the folder to the model hub as user/name (format timm only)."""
    private: bool = False
    """With `push`, make a newly created repository private."""

    def __post_init__(self) -> None:
        require(self.push is None or self.format == "timm", "format", self.format, "timm with --push")
        is_name = self.push is None or re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.push) is not None
        require(is_name, "push", self.push, "a repository on the model hub, such as user/name")


def main(given: Given) -> None:
    """Export the student from the last checkpoint, check the export and print the result."""
    config = build(ExportConfig, given)
    from scalekd_cache.training.run_export import export_run

    path, difference = export_run(Path(config.run), Path(config.out) if config.out else None, config.format)
    how = f"timm.create_model('local-dir:{path}', pretrained=True)" if config.format == "timm" else config.format
    checked = (
        f"parameters renamed for {config.format}; the file was not loaded into {config.format}'s model; "
        "the logits match the plain architecture"
        if difference is None
        else f"largest logit difference after reloading: {difference:.2g}"
    )
    print(f"{path}: {how}; {checked}")
    if config.push is not None:
        from scalekd_cache.convert.hub import push_export

        print(f"uploaded: {push_export(path, config.push, private=config.private)}")


COMMAND = Command("export", main, [ExportConfig], __doc__)

if __name__ == "__main__":
    run(COMMAND)
